"""Words for people: names that have room beside each other, and commands that a shell takes apart rightly."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from featcache.words import NAME_LENGTH, name_some, shell_command

WORDS = [
    "plain",
    "two words",
    "it's",
    'a "b"',
    "$HOME",
    "back\\slash",
    "new\nline\\x41'",
    "tab\t",
    "é",
    "bad\udcff",
]


def test_a_shell_takes_a_command_apart_into_its_words() -> None:
    command = shell_command(["printf", "%s\\0", *WORDS])
    assert "\n" not in command
    ran = subprocess.run(["bash", "-c", os.fsencode(command)], capture_output=True, check=True)
    assert [os.fsdecode(word) for word in ran.stdout.split(b"\0")[:-1]] == WORDS


def test_a_path_is_no_option() -> None:
    assert shell_command(["rm", "-r", Path("-r"), Path("a/-r")]) == "rm -r ./-r a/-r"


def test_a_name_among_others_leaves_room_for_them() -> None:
    said = name_some(["x" * 5000, "short"])
    assert said.endswith("x…, short")
    assert len(said) == NAME_LENGTH + len(", short")
