"""The command line: documented options, one line for a known failure, one JSON document where asked."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from conftest import make_toy_store, toy_records, toy_spec
from gaussians import gaussian_features, write_store

from featcache.cli import main
from featcache.store.creating import create_store
from featcache.store.layout import RowTable
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore

TOY = "channel_mean:channel_mean"
OPTIONS = [
    (command, option)
    for command in main.commands.values()
    for option in command.params
    if isinstance(option, click.Option)
]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def failure(*arguments: str | Path) -> str:
    """The line on stderr of a command that is known to fail."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def parsed(result: Result) -> Any:
    """The one JSON document on stdout."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout, parse_constant=refuse)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "s.h5", gaussian_features())


@pytest.fixture
def photos(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    for i in range(8):
        save_image(tmp_path / "photos" / f"class{i % 2}" / f"{i}.png", seed=i)
    return tmp_path / "photos"


@pytest.mark.parametrize("command", ["", *main.commands])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_there(command: str, flag: str) -> None:
    result = run(*([command] if command else []), flag)
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_the_help_of_the_group_lists_every_command() -> None:
    said = run("--help").stdout
    assert all(f"  {name} " in said for name in main.commands)


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda part: part.name)
def test_every_option_is_documented(command: click.Command, option: click.Option) -> None:
    assert not option.hidden
    assert option.help
    said = run(str(command.name), "--help").stdout
    assert all(name in said for name in option.opts)


def test_the_version_is_that_of_the_package() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert importlib.metadata.version("featcache") in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["fitt"],
        ["fit"],
        ["fit", "s.h5", "--no-such-option"],
        ["fit", "s.h5", "--param", "C"],
        ["fit", "s.h5", "--seed", "-1"],
        ["embed", "photos"],
        ["embed", "photos", "-o", "s.h5", "--precision", "float8"],
        ["embed", "photos", "-o", "s.h5", "--max-failures", "2"],
        ["embed", "photos", "-o", "s.h5", "--workers", "0"],
        ["repair"],
        ["repair", "s.h5", "--max-failures", "2"],
        ["explain"],
        ["explain", "s.h5", "t.h5", "--data", "photos"],
        ["finetune", "s.model", "photos", "-o", "t.model", "--seed", str(1 << 63)],
        ["explain", "s.h5", "t.h5", "--backbone", "resnet18"],
        ["explain", "s.h5", "t.h5", "--seed", "0"],
        ["predict", "s.model"],
        ["predict", "s.model", "a.png", "--json", "--csv", "-"],
        ["predict", "s.model", "a.png", "--top-k", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


def test_a_parameter_without_an_equals_sign_is_quoted(store: Path) -> None:
    assert "--param: 'C' is not KEY=VALUE" in run("fit", store, "--param", "C").stderr


def test_a_parameter_keeps_what_follows_its_first_equals_sign(store: Path) -> None:
    assert "not 'a=b'" in failure("fit", store, "-q", "--head", "logistic", "--param", "C=a=b")


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command, option in OPTIONS if not option.multiple and not option.is_flag],
    ids=lambda part: part.name,
)
def test_an_option_that_takes_one_value_takes_no_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: click.Command, option: click.Option
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(str(command.name), option.opts[0], "1", option.opts[-1], "2")
    assert result.exit_code == 2
    assert f"Error: {option.opts[-1]} takes one value, and is given more than once.\n" in result.stderr


def test_options_that_may_be_repeated_are(store: Path) -> None:
    more = run("fit", store, "--head", "ridge", "--param", "alpha=1", "--param", "temperature=1", "-q", "-q")
    assert more.exit_code == 0, more.output


def test_a_known_failure_is_one_line_and_exit_code_1(store: Path, photos: Path, tmp_path: Path) -> None:
    output, model = tmp_path / "new.h5", tmp_path / "no.model"
    assert "did you mean resnet" in failure("embed", photos, "-o", output, "--backbone", "resnet81", "-q")
    assert "is not there" in failure("embed", tmp_path / "none", "-o", output, "-q")
    assert "Did you mean logistic" in failure("fit", store, "--head", "logistik", "-q")
    assert "Did you mean alpha" in failure("fit", store, "--head", "ridge", "--param", "alfa=1", "-q")
    assert "cannot be opened" in failure("fit", model, "-q")
    assert "cannot be opened" in failure("predict", model, photos, "-q")
    assert "cannot be opened" in failure("info", model)
    assert "neither a feature store" in failure("info", next(photos.rglob("*.png")))
    assert not output.exists()


def test_an_unexpected_error_keeps_its_traceback(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: Path) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("featcache.commands.info.info", broken)
    result = run("info", store)
    assert isinstance(result.exception, RuntimeError)
    assert result.exc_info is not None
    assert "Error: " not in result.stderr


def test_an_interrupt_is_exit_code_130(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("featcache.commands.info.info", interrupted)
    result = run("info", store)
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"


def test_the_whole_way_gives_one_json_document_a_command(photos: Path, tmp_path: Path) -> None:
    store, model = tmp_path / "p.h5", tmp_path / "p.model"
    embedded = run("embed", photos, "-o", store, "--backbone", TOY, "--json")
    assert (embedded.exit_code, parsed(embedded)["embedded"]) == (0, 8)
    fitted = run("fit", store, "-o", model, "--head", "ncm", "--json")
    assert (fitted.exit_code, parsed(fitted)["head"]) == (0, "ncm")
    assert json.loads((tmp_path / "p.model.json").read_text()) == parsed(fitted)
    predicted = run("predict", model, photos, "--backbone", TOY, "--json")
    assert (predicted.exit_code, len(parsed(predicted))) == (0, 8)
    as_csv = run("predict", model, photos, "--backbone", TOY, "--csv", "-", "-q")
    assert (as_csv.exit_code, len(as_csv.stdout.splitlines())) == (0, 9)


def test_failed_images_are_exit_code_3(photos: Path, tmp_path: Path) -> None:
    store, model = tmp_path / "p.h5", tmp_path / "p.model"
    (photos / "class0" / "bad.png").write_bytes(b"no picture")
    embedded = run("embed", photos, "-o", store, "--backbone", TOY, "--json", "-q")
    assert (embedded.exit_code, parsed(embedded)["failed"]) == (3, 1)
    assert run("fit", store, "-o", model, "--head", "ncm", "-q").exit_code == 0
    predicted = run("predict", model, photos, "--backbone", TOY, "--json", "-q")
    assert (predicted.exit_code, len(parsed(predicted))) == (3, 9)


def test_repair_says_what_it_did_and_what_still_fails(photos: Path, tmp_path: Path) -> None:
    store, bad = tmp_path / "p.h5", photos / "class0" / "bad.png"
    bad.write_bytes(b"no picture")
    run("embed", photos, "-o", store, "--backbone", TOY, "-q")
    with open(store, "r+b") as file:
        file.seek(read_layout(store).features["penultimate"].offset)
        file.write(b"\xff\x00\xff")
    assert f"repeat it as --backbone {TOY}" in failure("repair", store, "-q")
    again = run("repair", store, "--backbone", TOY, "--json", "-q")
    assert (again.exit_code, parsed(again)["damaged"], parsed(again)["failed"]) == (3, 9, 1)
    bad.unlink()
    assert "class0/bad.png: the file is not there" in run("repair", store).stdout
    bad.write_bytes((photos / "class1" / "1.png").read_bytes())
    assert run("repair", store, "--backbone", TOY, "-q").exit_code == 0
    assert "nothing to repair" in run("repair", store).stdout
    photos.rename(tmp_path / "moved")
    FeatureStore.open(store)
    assert run("repair", store, "-q").exit_code == 0


def test_explain_gives_text_or_one_json_document(photos: Path, tmp_path: Path) -> None:
    store, half = tmp_path / "p.h5", tmp_path / "half.h5"
    run("embed", photos, "-o", store, "--backbone", TOY, "-q")
    run("embed", photos, "-o", half, "--backbone", TOY, "--store-dtype", "float16", "-q")
    assert "fingerprint" in run("explain", store).stdout
    assert "store_dtype: float32 -> float16: the features are rounded" in run("explain", store, half).stdout
    said = parsed(run("explain", store, "--data", photos, "--json", "-q"))
    assert {name: len(ids) for name, ids in said["images"]["reasons"].items()} == {"SAME_STAT": 8}
    assert "did you mean class0/0.png" in failure("explain", store, "--row", "class0/0.pn", "-q")


def test_info_describes_a_store_and_a_model(store: Path) -> None:
    facts = parsed(run("info", store, "--json"))
    assert (facts["kind"], facts["complete"], facts["rows"]) == ("feature store", True, 60)
    assert facts["classes"] == {"class0": 20, "class1": 20, "class2": 20}
    assert facts["splits"] == {"train": 36, "test": 24}
    assert facts["fingerprint"] == FeatureStore.open(store).fingerprint
    assert "complete:    yes" in run("info", store).stdout
    assert "checked:     no (`featcache verify` does)" in run("info", store).stdout
    assert facts["checked"] is False
    run("fit", store, "--head", "ncm", "-q")
    model = parsed(run("info", store.with_suffix(".model"), "--json"))
    assert (model["kind"], model["head"], model["fingerprint"]) == ("model", "ncm", facts["fingerprint"])
    assert model["classes"] == ["class0", "class1", "class2"]
    assert "class0, class1, class2" in run("info", store.with_suffix(".model")).stdout


def test_info_shows_names_on_one_line(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "p.h5"
    (photos / "class0" / "a\n\x1b[31m.png").write_bytes(b"no picture")
    assert run("embed", photos, "-o", store, "--backbone", TOY, "-q").exit_code == 3
    assert "class0/a\\n\\x1b[31m.png: undecodable" in run("info", store).stdout
    assert "\x1b" not in run("info", store).stdout
    assert parsed(run("info", store, "--json"))["failed"] == {"class0/a\n\x1b[31m.png": "undecodable"}


def test_what_a_store_says_of_itself_cannot_spoil_the_terminal(tmp_path: Path) -> None:
    """Trap: text from a file that cannot be encoded, or that the terminal obeys."""
    store, table = tmp_path / "s.h5", RowTable.from_records(toy_records(4), ("c0", "c1"))
    provenance = {"engine": "\x1b[2J", "command": "a\ud800b"}
    create_store(store, spec=toy_spec(), table=table, provenance=provenance, block_rows=4)
    for verb in ("info", "explain"):
        said = run(verb, store)
        assert said.exit_code == 0
        assert "\\x1b[2J" in said.stdout
        assert "a\\ud800b" in said.stdout


def test_info_of_an_incomplete_store_says_so(tmp_path: Path) -> None:
    store = make_toy_store(tmp_path / "toy.h5", n=10, fill=False)
    assert parsed(run("info", store, "--json"))["complete"] is False
    said = [line.split() for line in run("info", store).stdout.splitlines()]
    assert ["complete:", "no"] in said
    assert ["pending:", "10"] in said
    assert "10 of 10 rows are pending" in failure("fit", store, "-q")


def test_verify_says_what_it_checked_and_exits_by_what_it_found(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "p.h5"
    run("embed", photos, "-o", store, "--backbone", TOY, "-q")
    sound = run("verify", store, "--sources", "--recompute", "3", "--backbone", TOY, "--json", "-q")
    assert (sound.exit_code, parsed(sound)["sound"], parsed(sound)["sources"]["same"]) == (0, True, 8)
    assert parsed(sound)["recomputed"]["rows"] == 3
    with open(store, "r+b") as file:
        file.seek(read_layout(store).features["penultimate"].offset)
        file.write(b"\xff\x00\xff")
    damaged = run("verify", store)
    assert (damaged.exit_code, damaged.stdout.splitlines()[-1]) == (1, "damaged")
    assert "rows 0-7 (class0/0.png … class1/7.png): features do not match" in damaged.stdout


def test_verify_of_a_store_in_progress_is_exit_code_3(tmp_path: Path) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=10, fill=False)
    result = run("verify", path)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (3, "sound so far, 10 rows pending")
    assert parsed(run("verify", path, "--json"))["verdict"] == "pending"


def test_verify_of_images_that_changed_is_exit_code_1(
    photos: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    store = tmp_path / "p.h5"
    run("embed", photos, "-o", store, "--backbone", TOY, "-q")
    save_image(photos / "class0" / "0.png", seed=9)
    for options in (["--sources"], ["--recompute", "8", "--backbone", TOY]):
        result = run("verify", store, "-q", *options)
        assert result.exit_code == 1
        assert result.stdout.splitlines()[-1] == "sound, but not what the images are now"
        said = parsed(run("verify", store, "-q", "--json", *options))
        assert (said["sound"], said["verdict"]) == (False, "images differ")


def test_a_damaged_store_is_fitted_only_unchecked(store: Path) -> None:
    with open(store, "r+b") as file:
        file.seek(read_layout(store).features["penultimate"].offset)
        file.write(b"\x01")
    assert "is damaged" in failure("fit", store, "--head", "ncm", "-q")
    assert run("fit", store, "--head", "ncm", "-q", "--no-check").exit_code == 0
