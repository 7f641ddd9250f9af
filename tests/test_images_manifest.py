"""CSV manifests: what they list, and every way in which a line can be bad."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcache.errors import DataError, ManifestError
from featcache.images import scan_images
from featcache.records import NO_FILE, Listing


def _write(folder: Path, text: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (folder / name).write_bytes(b"x")
    path = folder / "data.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _scan(folder: Path, text: str | bytes, **options: bool) -> Listing:
    return scan_images(_write(folder, text), **options)


def _refusal(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ManifestError) as caught:
        _scan(folder, text)
    return str(caught.value)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_manifest_lists_images_with_labels_and_splits(tmp_path: Path, bom: bytes, newline: str) -> None:
    text = newline.join(["path,label,split", "2.jpg,dog,valid", "", "1.jpg,cät,train", "3.jpg,,"])
    listing = _scan(tmp_path, bom + text.encode())
    assert [(r.path, r.label, r.split, r.stat.size) for r in listing.records] == [
        ("1.jpg", "cät", "train", 1),
        ("2.jpg", "dog", "val", 1),
        ("3.jpg", None, None, 1),
    ]
    assert listing.classes == ("cät", "dog")
    assert listing.root == tmp_path
    assert listing.notes == ()


def test_paths_are_relative_to_the_root_that_is_given(tmp_path: Path) -> None:
    _write(tmp_path / "images", "")
    csv = tmp_path / "list.csv"
    csv.write_text("path,label\n./1.jpg,a\n")
    listing = scan_images(csv, root=tmp_path / "images")
    assert (listing.root, listing.records[0].path, listing.records[0].stat.size) == (
        tmp_path / "images",
        "1.jpg",
        1,
    )
    with pytest.raises(DataError, match="root .* is not a folder"):
        scan_images(csv, root=tmp_path / "nowhere")


def test_other_columns_are_ignored_with_a_note(tmp_path: Path) -> None:
    listing = _scan(tmp_path, "id,label,path,who\n7,cat,1.jpg,me\n")
    assert (listing.records[0].path, listing.records[0].label) == ("1.jpg", "cat")
    assert "ignored in" in listing.notes[0]
    assert "'id', 'who'" in listing.notes[0]


def test_an_image_that_is_not_on_disk_stays_in(tmp_path: Path) -> None:
    assert _scan(tmp_path, "path,label\ngone/1.jpg,cat\n").records[0].stat == NO_FILE


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (",cat", "the path is empty"),
        ("/etc/passwd,cat", "path '/etc/passwd' is absolute"),
        ("../x.jpg,cat", "path '../x.jpg' leads out of the root"),
        ("a/../../x.jpg,cat", "leads out of the root"),
        ("a\\b.jpg,cat", "has a backslash: write / between folders"),
        ("a\0.jpg,cat", "zero byte"),
        ("1.jpg,cat", "path '1.jpg' is on line 2 already"),
        ("./1.jpg,cat", "path '1.jpg' is on line 2 already"),
        ("2.jpg", "1 fields, the header has 2"),
        ("2.jpg,cat,train", "3 fields, the header has 2"),
        ("2.jpg, ", "only white space"),
        ('"2.jpg,cat', "not CSV from here on"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, reason: str) -> None:
    message = _refusal(tmp_path, f"path,label\n1.jpg,cat\n{line}\n")
    assert "1 bad line; nothing was read" in message
    assert "line 3: " in message
    assert reason in message


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    message = _refusal(tmp_path, "path,label,split\n1.jpg,cat,dev\n")
    assert "line 2: unknown split 'dev' (expected train, val, test or nothing)" in message


def test_a_line_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    message = _refusal(tmp_path, b"path,label\n1.jpg,cat\n2.jpg,caf\xe9\n")
    assert "line 3: not UTF-8" in message
    assert "UTF-16: save it as UTF-8" in _refusal(tmp_path, "path,label\n1.jpg,cat\n".encode("utf-16"))


def test_of_labels_that_look_alike_the_rare_ones_are_unknown_classes(tmp_path: Path) -> None:
    message = _refusal(tmp_path, "path,label\n1.jpg,Cat \n2.jpg,cat\n3.jpg,cat\n")
    assert "line 2: unknown class 'Cat ' (did you mean 'cat'?)" in message
    assert "1 bad line;" in message


def test_all_bad_lines_are_counted_and_five_shown_in_order(tmp_path: Path) -> None:
    lines = ["1.jpg,Cat", "2.jpg,cat", "3.jpg,cat", *[f"../{i}.jpg,cat" for i in range(6)]]
    message = _refusal(tmp_path, "path,label\n" + "\n".join(lines))
    assert "has 7 bad lines" in message
    assert message.count("\n  line ") == 5
    assert message.index("line 2: unknown class") < message.index("line 5: ")
    assert message.endswith("and 2 more")


def test_line_numbers_count_lines_inside_quotes(tmp_path: Path) -> None:
    assert "line 4: the path is empty" in _refusal(tmp_path, 'path,label\n"1\n.jpg",cat\n,cat\n')


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty: the first line is path,label"),
        ("path,label\n", "lists no images"),
        ("file,label\n1.jpg,cat\n", "no column 'path': line 1 names 'file', 'label'"),
        ("path;label\n1.jpg;cat\n", "no column 'path', 'label': line 1 names 'path;label'"),
        ("path,label,label\n1.jpg,cat,dog\n", "the column 'label' twice"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in _refusal(tmp_path, text)


@pytest.mark.parametrize("path", ["link.jpg", "folder/2.jpg"])
def test_a_link_out_of_the_root_is_a_bad_line_unless_asked(tmp_path: Path, path: str) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    _write(outside, "")
    csv = _write(root, f"path,label\n{path},cat\n")
    (root / "link.jpg").symlink_to(outside / "1.jpg")
    (root / "folder").symlink_to(outside)
    with pytest.raises(ManifestError, match=r"line 2: a link leads out of the root; --follow-links"):
        scan_images(csv)
    assert scan_images(csv, follow_links=True).records[0].stat.size == 1


def test_a_link_inside_the_root_is_followed(tmp_path: Path) -> None:
    csv = _write(tmp_path, "path,label\nlink.jpg,cat\n")
    (tmp_path / "link.jpg").symlink_to("1.jpg")
    assert scan_images(csv).records[0].stat.size == 1
