"""Scanning folders: labels, splits, links, odd names, and what is passed over."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from featcache.errors import DataError
from featcache.images import SOURCES, scan_images, walk
from featcache.images.folder import find_images, scan_folder
from featcache.images.paths import escape_path, is_inside, resolve, show_path, unescape_path
from featcache.records import NO_FILE, FileStat


def _make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def _labels(root: Path, **options: bool) -> dict[str, str | None]:
    return {record.path: record.label for record in scan_images(root, **options).records}


def _note(root: Path, **options: bool) -> str:
    (note,) = scan_images(root, **options).notes
    return note


def test_the_class_is_the_first_folder(tmp_path: Path) -> None:
    listing = scan_images(_make(tmp_path, "dog/deep/er/2.PNG", "cat/1.jpg", "cat/3.Tiff"))
    assert [(r.path, r.label, r.split) for r in listing.records] == [
        ("cat/1.jpg", "cat", None),
        ("cat/3.Tiff", "cat", None),
        ("dog/deep/er/2.PNG", "dog", None),
    ]
    assert listing.classes == ("cat", "dog")
    assert listing.notes == ()
    assert listing.root == tmp_path


def test_records_carry_the_stat_of_their_file(tmp_path: Path) -> None:
    found = os.stat(_make(tmp_path, "cat/1.jpg") / "cat/1.jpg")
    (record,) = scan_images(tmp_path).records
    assert record.stat == FileStat(
        size=1, mtime_ns=found.st_mtime_ns, ctime_ns=found.st_ctime_ns, inode=found.st_ino
    )


@pytest.mark.parametrize("extension", walk.EXTENSIONS)
def test_every_extension_is_found_in_any_case(tmp_path: Path, extension: str) -> None:
    assert len(scan_images(_make(tmp_path, f"a/1{extension}", f"a/2{extension.upper()}")).records) == 2


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("train", "train"),
        ("val", "val"),
        ("valid", "val"),
        ("validation", "val"),
        ("test", "test"),
        ("Test", "test"),
    ],
)
def test_split_folders_become_splits(tmp_path: Path, folder: str, split: str) -> None:
    listing = scan_images(_make(tmp_path, f"{folder}/cat/1.jpg", "train/dog/x/2.jpg", f"{folder}/3.jpg"))
    found = {record.path: (record.label, record.split) for record in listing.records}
    assert found[f"{folder}/cat/1.jpg"] == ("cat", split)
    assert found["train/dog/x/2.jpg"] == ("dog", "train")
    assert found[f"{folder}/3.jpg"] == (None, split)
    assert listing.classes == ("cat", "dog")


def test_split_folders_beside_others_with_images_are_refused(tmp_path: Path) -> None:
    _make(tmp_path, "train/cat/1.jpg", "extra/1.jpg")
    with pytest.raises(
        DataError, match=r"split folders \(train\) beside others with images \(extra\): move the"
    ):
        scan_images(tmp_path)


def test_other_folders_without_images_do_not_matter_to_splits(tmp_path: Path) -> None:
    _make(tmp_path, "train/cat/1.jpg", "docs/readme.txt")
    assert scan_images(tmp_path).records[0].split == "train"


def test_images_in_the_root_have_no_label(tmp_path: Path) -> None:
    assert _labels(_make(tmp_path, "1.jpg", "2.jpg")) == {"1.jpg": None, "2.jpg": None}
    assert "2 images (first: 1.jpg) outside the class folders" in _note(_make(tmp_path, "cat/3.jpg"))


def test_other_files_are_counted_by_extension(tmp_path: Path) -> None:
    _make(tmp_path, "a/1.jpg", "a/2.txt", "b.TXT", "c.md", "d")
    said = "skipped 4 files that are not images by name: 2 .txt, 1 without extension, 1 .md"
    assert _note(tmp_path) == said


def test_hidden_files_and_folders_are_skipped_silently(tmp_path: Path) -> None:
    _make(tmp_path, "a/1.jpg", "a/._1.jpg", ".git/2.jpg", "__MACOSX/a/3.jpg", ".DS_Store")
    assert list(_labels(tmp_path)) == ["a/1.jpg"]
    assert scan_images(tmp_path).notes == ()


def test_a_folder_without_images_is_refused_and_says_what_was_there(tmp_path: Path) -> None:
    _make(tmp_path, "a/1.heic")
    with pytest.raises(DataError, match=r"no images under .* ending in \.jpg .*skipped 1 file .*: 1 \.heic"):
        scan_images(tmp_path)


def test_a_path_that_is_not_there_says_where_it_goes_wrong(tmp_path: Path) -> None:
    _make(tmp_path, "photos/cat/1.jpg")
    with pytest.raises(DataError, match=r"is not there; did you mean .*/photos\?"):
        scan_images(tmp_path / "photo")
    with pytest.raises(DataError, match=r"is not there; .*/photos is, and has no zebra"):
        scan_images(tmp_path / "photos" / "zebra" / "x")


def test_a_file_that_no_source_accepts_is_refused(tmp_path: Path) -> None:
    _make(tmp_path, "data.txt")
    with pytest.raises(DataError, match="is not " + " or ".join(source.form[:8] for source in SOURCES[:1])):
        scan_images(tmp_path / "data.txt")


def test_another_root_is_for_manifests(tmp_path: Path) -> None:
    _make(tmp_path, "a/1.jpg")
    assert scan_images(tmp_path, root=tmp_path).records
    with pytest.raises(DataError, match="another root is for CSV manifests"):
        scan_images(tmp_path / "a", root=tmp_path)


def test_classes_that_look_alike_are_noted(tmp_path: Path) -> None:
    assert "the classes 'Cat ', 'cat' differ only in case" in _note(
        _make(tmp_path, "cat/1.jpg", "Cat /1.jpg")
    )


# --- links and special files ----------------------------------------------------------------------------


def test_links_inside_the_root_are_followed(tmp_path: Path) -> None:
    _make(tmp_path, "cat/1.jpg")
    (tmp_path / "cat/2.jpg").symlink_to("1.jpg")
    (tmp_path / "dog").symlink_to("cat")
    assert list(_labels(tmp_path)) == ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"]


@pytest.mark.parametrize("follow_links", [False, True])
def test_a_link_loop_is_cut_and_noted(tmp_path: Path, follow_links: bool) -> None:
    _make(tmp_path, "cat/deep/1.jpg")
    (tmp_path / "cat/deep/up").symlink_to(tmp_path)
    assert list(_labels(tmp_path, follow_links=follow_links)) == ["cat/deep/1.jpg"]
    assert "1 link back to a folder above (first: cat/deep/up) not followed" in _note(
        tmp_path, follow_links=follow_links
    )


def test_a_link_out_of_the_root_is_followed_only_when_asked(tmp_path: Path) -> None:
    outside = _make(tmp_path / "root-and-more", "x/2.jpg")
    root = _make(tmp_path / "root", "cat/1.jpg")
    (root / "cat/link.jpg").symlink_to(outside / "x/2.jpg")
    (root / "dog").symlink_to(outside)
    assert list(_labels(root)) == ["cat/1.jpg"]
    assert _note(root) == (
        "2 links out of the folder (first: cat/link.jpg) not followed; --follow-links follows them"
    )
    followed = scan_images(root, follow_links=True)
    assert [r.path for r in followed.records] == ["cat/1.jpg", "cat/link.jpg", "dog/x/2.jpg"]
    assert followed.notes == ()


@pytest.mark.parametrize("target", ["nowhere.jpg", "self.jpg"])
def test_a_broken_link_stays_as_a_record_without_a_file(tmp_path: Path, target: str) -> None:
    (_make(tmp_path, "cat/1.jpg") / "cat/self.jpg").symlink_to(target)
    assert scan_images(tmp_path).records[1].stat == NO_FILE


def test_pipes_and_sockets_stay_in_and_a_folder_named_like_an_image_is_walked(tmp_path: Path) -> None:
    _make(tmp_path, "cat/x.jpg/1.jpg")
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "cat/socket.jpg"))
    assert list(_labels(tmp_path)) == ["cat/pipe.jpg", "cat/socket.jpg", "cat/x.jpg/1.jpg"]


def test_a_folder_that_cannot_be_read_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path, "cat/1.jpg", "dog/1.jpg")
    scandir = os.scandir

    def refuse_dog(path: str) -> object:
        if path.endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(walk.os, "scandir", refuse_dog)
    assert list(_labels(tmp_path)) == ["cat/1.jpg"]
    assert _note(tmp_path) == "1 folder (first: dog/) could not be read and left out"
    with pytest.raises(DataError, match="cannot be listed: Permission denied"):
        scan_images(tmp_path / "dog")


# --- names ----------------------------------------------------------------------------------------------

NAMES = [
    b"plain/a.jpg",
    "d\u00e9j\u00e0/\u732b.jpg".encode(),
    b"caf\xe9.jpg",
    b"back\\slash.jpg",
    b"\\xe9.jpg",
    b"\xff\\\xfe",
]


@pytest.mark.parametrize("raw", NAMES)
def test_escaped_paths_are_utf8_distinct_and_reversible(raw: bytes) -> None:
    text = escape_path(os.fsdecode(raw))
    text.encode("utf-8")
    assert os.fsencode(unescape_path(text)) == raw
    assert len({escape_path(os.fsdecode(name)) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("text", ["a\\b", "a\\x41", "a\\xc3\\xa9", "a\\xE9", "a\\"])
def test_text_that_no_path_escapes_to_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"backslash|escaped"):
        unescape_path(text)


def test_a_name_that_is_not_utf8_is_listed_and_found_again(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff\\.jpg", "wb") as file:
        file.write(b"here")
    listing = scan_images(tmp_path)
    (record,) = listing.records
    assert (record.path, record.label) == ("caf\\xe9/\\xff\\\\.jpg", "caf\\xe9")
    assert resolve(listing.root, record.path).read_bytes() == b"here"


def test_a_name_is_shown_on_one_line() -> None:
    assert show_path(os.fsdecode(b"a\nb\x1b[0m\xe9")) == "a\\nb\\x1b[0m\\xe9"


def test_inside_is_a_matter_of_folders_and_not_of_letters() -> None:
    assert is_inside("/a/b", "/a")
    assert is_inside("/a", "/")
    assert not is_inside("/ab", "/a")


# --- images to predict ----------------------------------------------------------------------------------


def test_files_are_taken_as_given_and_folders_searched_in_depth(tmp_path: Path) -> None:
    _make(tmp_path, "odd.dat", "f/z.jpg", "f/a/b.png", "f/notes.txt")
    images, notes = find_images([tmp_path / "odd.dat", tmp_path / "f"])
    assert images == [tmp_path / "odd.dat", tmp_path / "f/a/b.png", tmp_path / "f/z.jpg"]
    assert notes == ["skipped 1 file that is not an image by name: 1 .txt"]


def test_a_path_to_predict_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg is not there"):
        find_images([tmp_path / "gone.jpg"])


def test_an_empty_folder_to_predict_is_refused_alone_and_noted_beside_others(tmp_path: Path) -> None:
    _make(tmp_path, "1.jpg", "empty/x.txt")
    with pytest.raises(DataError, match="no images under"):
        find_images([tmp_path / "empty"])
    images, (note,) = find_images([tmp_path / "1.jpg", tmp_path / "empty"])
    assert images == [tmp_path / "1.jpg"]
    assert "no images under" in note


def test_a_folder_without_class_folders_says_that_it_has_no_labels(
    tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    save_image(tmp_path / "a.png")
    assert any("no image has a label" in note for note in scan_folder(tmp_path).notes)
    save_image(tmp_path / "cats/b.png")
    assert not any("no image has a label" in note for note in scan_folder(tmp_path).notes)
