"""Pictures with captions: folders, tar shards, parquet, and what may be wrong with each."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.captioned import CaptionedSource, num_without_caption, write_captioned
from megatron_mdm.data.records import BadRecords

PICTURE = b"the content of a picture"  # which nothing here looks into


def content(image: Path | bytes) -> bytes:
    return image.read_bytes() if isinstance(image, Path) else image


def read(path: Path, on_error: str = "stop", **options: Any) -> list[tuple[bytes, str]]:
    found = CaptionedSource(str(path), **options).read(BadRecords(on_error))
    return [(content(each.image), each.caption) for each in found]


def write_folder(folder: Path, records: list[dict[str, Any]], name: str = "captions.jsonl") -> Path:
    (folder / "below").mkdir(parents=True)
    for picture in ("a.png", "B.JPG", "below/c.webp"):
        (folder / picture).write_bytes(PICTURE + picture.encode())
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_a_folder_with_captions(tmp_path: Path) -> None:
    records = [
        {"image": "a.png", "caption": "first", "digit": 3},
        {"image": "./below/c.webp", "caption": "third ✓"},
        {"image": "a.png", "caption": "again"},
    ]
    folder = write_folder(tmp_path / "it", records)
    assert read(folder) == [
        (PICTURE + b"a.png", "first"),
        (PICTURE + b"below/c.webp", "third ✓"),
        (PICTURE + b"a.png", "again"),
    ]
    assert [each.fields.get("digit") for each in CaptionedSource(str(folder)).read(BadRecords())] == [3, None, None]
    assert num_without_caption(str(folder)) == 1


def test_what_datasets_writes_beside_pictures(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "it", [{"file_name": "B.JPG", "text": "second"}], "metadata.jsonl")
    assert read(folder) == [(PICTURE + b"B.JPG", "second")]


def test_a_folder_of_pictures_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "it", [])
    (folder / "captions.jsonl").unlink()
    (folder / "notes.txt").write_text("no picture")
    found = [name for name, _ in read(folder, needs_captions=False)]
    assert found == [PICTURE + name for name in (b"B.JPG", b"a.png", b"below/c.webp")]


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz")])
def test_tar_shards(name: str, mode: str, tmp_path: Path) -> None:
    members = [
        ("0001.jpg", PICTURE),
        ("0001.json", b'{"prompt": "one", "id": 7}'),
        ("in/0002.txt", b"zwei\n"),
        ("in/0002.PNG", PICTURE),
        ("._0002.png", b"macOS"),
        ("0003.v2.jpeg", b"of another kind of ending"),
        ("0003.webp", PICTURE + b"3"),
        ("0003.json", b'{"caption": "three"}'),
    ]
    path = write_tar(tmp_path / name, members, mode)
    assert read(path) == [(PICTURE, "one"), (PICTURE, "zwei"), (PICTURE + b"3", "three")]
    assert [each.where for each in CaptionedSource(str(path)).read(BadRecords())][1] == f"{path}, in/0002"


def test_parquet_of_bytes_and_of_datasets(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_captioned(path, [(PICTURE, {"caption": "one", "digit": 1}), (PICTURE + b"2", {"caption": "two", "digit": 2})])
    assert read(path) == [(PICTURE, "one"), (PICTURE + b"2", "two")]
    first = next(CaptionedSource(str(path)).read(BadRecords()))
    assert first.fields == {"caption": "one", "digit": 1}
    rows = [{"image": {"bytes": PICTURE, "path": None}, "long": "a long one", "text": "short"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [(PICTURE, "short")]
    assert read(path, caption_field="long") == [(PICTURE, "a long one")]


GOOD = {"image": "a.png", "caption": "x"}
GOOD_PARTS = [("0.jpg", PICTURE), ("0.json", b'{"prompt": "x"}')]


def folder_of(*records: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda path: write_folder(path / "it", [GOOD, *records])


def tar_of(*members: tuple[str, bytes]) -> Callable[[Path], Path]:
    return lambda path: write_tar(path / "x.tar", [*GOOD_PARTS, *members])


def table_of(*rows: dict[str, Any]) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        parquet.write_table(pyarrow.Table.from_pylist([{"image": PICTURE, "caption": "x"}, *rows]), path / "x.parquet")
        return path / "x.parquet"

    return write


BAD_RECORDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no caption": (
        folder_of({"image": "a.png", "title": "x"}),
        r"line 2: no caption \('caption'\); found image, title",
    ),
    "empty caption": (folder_of({"image": "a.png", "caption": " "}), r"line 2: the caption \('caption'\) is empty"),
    "a number": (folder_of({"image": "a.png", "caption": 3}), r"line 2: the caption \('caption'\) is no text"),
    "absent picture": (folder_of({"image": "z.png", "caption": "x"}), r"z.png: no such picture"),
    "no picture": (folder_of({"caption": "x"}), r"line 2: no picture \('image'\); found caption"),
    "above": (folder_of({"image": "../z.png", "caption": "x"}), "lies outside its folder"),
    "absolute": (folder_of({"image": "/etc/hostname", "caption": "x"}), "lies outside its folder"),
    "tar without caption": (tar_of(("1.jpg", PICTURE)), "x.tar, 1: no caption"),
    "tar without picture": (tar_of(("1.json", b'{"prompt": "x"}')), "x.tar, 1: no picture among .json"),
    "tar with bad JSON": (tar_of(("1.jpg", PICTURE), ("1.json", b"{")), "x.tar, 1: not valid JSON"),
    "tar with bad text": (tar_of(("1.jpg", PICTURE), ("1.txt", b"\xff")), "x.tar, 1: UnicodeDecodeError"),
    "null picture": (table_of({"image": None, "caption": "y"}), "row 2: no column of bytes; found image, caption"),
    "null caption": (table_of({"image": PICTURE, "caption": None}), "row 2: the caption .* is no text"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_costs_itself_only(name: str, tmp_path: Path) -> None:
    write, message = BAD_RECORDS[name]
    path = write(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        read(path)
    assert "\n" not in str(raised.value)
    assert len(read(path, "skip")) == 1


def cut_tar(path: Path) -> Path:
    whole = write_tar(path / "x.tar", [*GOOD_PARTS, ("1.jpg", PICTURE * 1000), ("1.json", b"{}")])
    whole.write_bytes(whole.read_bytes()[:3000])
    return whole


def damaged_tar(name: str, mode: str) -> Callable[[Path], Path]:
    """With a header in the middle that is none: tarfile takes it for the end."""

    def write(path: Path) -> Path:
        write_tar(path / "x.tar", [*GOOD_PARTS, ("1.jpg", PICTURE), ("1.json", b'{"prompt": "y"}')])
        content = bytearray((path / "x.tar").read_bytes())
        content[2048 + 100 : 2048 + 160] = b"\xff" * 60  # of the third member
        (path / name).write_bytes(gzip.compress(content) if mode else content)
        return path / name

    return write


def text_file(name: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        (path / name).write_text("not what its name says")
        return path / name

    return write


def bare_folder(path: Path) -> Path:
    folder = write_folder(path / "it", [])
    (folder / "captions.jsonl").unlink()
    return folder


BAD_SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda path: path / "absent", "no such folder or file of pictures"),
    "no captions file": (bare_folder, "no captions.jsonl with a line"),
    "cut tar": (cut_tar, "not a tar file that can be read to its end"),
    "damaged tar": (
        damaged_tar("y.tar", ""),
        "not a tar file that can be read to its end .ReadError: damaged at byte 2048",
    ),
    "damaged tgz": (
        damaged_tar("y.tgz", "gz"),
        "not a tar file that can be read to its end .ReadError: damaged at byte 2048",
    ),
    "no tar": (text_file("x.tar"), "not a tar file"),
    "no gzip": (text_file("x.tar.gz"), "not a tar file"),
    "no parquet": (text_file("x.parquet"), "not a parquet file"),
    "another kind": (text_file("x.zip"), "pictures are read from a folder, from .tar"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_bad_source_is_one_line(name: str, tmp_path: Path) -> None:
    write, message = BAD_SOURCES[name]
    path = write(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        read(path, "skip")
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)
