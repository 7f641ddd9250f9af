"""Words for people: a command is taken apart by a shell into just the words it was made of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from featcache.words import shell_command

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
