"""Pictures with captions as they lie on disk: a folder with captions.jsonl, tar shards (webdataset), parquet.

Nothing is decoded here: a picture is a file's path, or its content.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.json_files import Record, parse_object
from megatron_mdm.data.records import BadRecords, read_parquet, read_records, reason

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
GENERATED_FILE = "images.jsonl"  # of a folder that `mdm generate` wrote: all that its own pictures need
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", GENERATED_FILE)  # the second is what `datasets` calls it
CAPTION_FIELDS = ("caption", "prompt", "text")
FILE_FIELDS = ("image", "file_name", "file", "path")
_MOST_BYTES = 1 << 28  # of a picture's file
_ROWS = 16  # of a parquet file at a time: pictures are large


class Captioned(NamedTuple):
    where: str  # for messages
    image: Path | bytes
    caption: str  # empty only where captions are not asked for
    fields: Record  # what else its record says


@dataclass(frozen=True)
class CaptionedSource:
    """One folder, tar file or parquet file."""

    path: str
    caption_field: str = ""  # empty: the first of CAPTION_FIELDS that there is
    needs_captions: bool = True

    def read(self, bad: BadRecords) -> Iterator[Captioned]:
        """In an order of its own, the same every time. Bad records raise UserError or are counted."""
        for where, image, record in READERS[self._kind()](self, bad):
            with bad.of(where):
                yield Captioned(where, image, self._caption(record), record)

    def _kind(self) -> str:
        path = Path(self.path)
        if path.is_dir():
            return "folder"
        if not path.exists():
            raise UserError(f"{path}: no such folder or file of pictures")
        kind = _KINDS.get(path.suffix) or _KINDS.get("".join(path.suffixes[-2:]))
        if not kind:
            raise UserError(f"{path}: pictures are read from a folder, from {', '.join(_KINDS)}")
        return kind

    def _caption(self, record: Record) -> str:
        names = (self.caption_field,) if self.caption_field else CAPTION_FIELDS
        if not self.needs_captions and not any(name in record for name in names):
            return ""
        return caption_of(record, self.caption_field)


def caption_of(record: Record, field: str = "", may_be_empty: bool = False) -> str:
    """A record's caption. field empty: the first of CAPTION_FIELDS that it has. Raises UserError where it has none."""
    names = (field,) if field else CAPTION_FIELDS
    name = next((name for name in names if name in record), None)
    if name is None:
        raise UserError(f"no caption ('{names[0]}'); found {', '.join(record) or 'nothing'}")
    caption = record[name]
    if not isinstance(caption, str):
        raise UserError(f"the caption ('{name}') is no text")
    if not caption.strip() and not may_be_empty:
        raise UserError(f"the caption ('{name}') is empty")
    return caption


Found = tuple[str, Path | bytes, Record]  # place, picture, record


def _folder(source: CaptionedSource, bad: BadRecords) -> Iterator[Found]:
    folder = Path(source.path)
    listed = next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    if listed is None:
        if source.needs_captions:
            example = '{"image": "a.png", "caption": "…"}'
            raise UserError(f"{folder}: no {CAPTION_FILES[0]} with a line {example} of each picture")
        yield from ((str(path), path, {}) for path in pictures_of(folder))
        return
    for where, record in read_records(str(listed), bad):
        with bad.of(where):
            yield where, _listed_picture(folder, record), record


def pictures_of(folder: Path) -> list[Path]:
    """All pictures in a folder and those below it, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())


def num_without_caption(path: str) -> int:
    """Pictures in a folder that its captions' file does not name; 0 for what is no folder of one's own."""
    folder = Path(path)
    listed = next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    if listed is None or listed.name == GENERATED_FILE:  # beside which the sheet lies
        return 0
    ignored = BadRecords("skip")
    names = {_file_name(record) for _, record in read_records(str(listed), ignored)}
    return sum(str(picture.relative_to(folder)) not in names for picture in pictures_of(folder))


def _file_name(record: Record) -> str:
    name = next((record[name] for name in FILE_FIELDS if isinstance(record.get(name), str)), "")
    return str(PurePosixPath(name)) if name else ""


def _listed_picture(folder: Path, record: Record) -> Path:
    name = _file_name(record)
    if not name:
        raise UserError(f"no picture ('{FILE_FIELDS[0]}'); found {', '.join(record) or 'nothing'}")
    if Path(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"the picture '{name}' lies outside its folder")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: no such picture")
    return path


def _tar(source: CaptionedSource, bad: BadRecords) -> Iterator[Found]:
    """Members of one name but for the ending, one behind another, are a sample: a picture, and .json or .txt."""
    try:
        with tarfile.open(source.path) as archive:
            for where, parts in _samples(source.path, archive):
                with bad.of(where):
                    yield where, _tar_picture(parts), _tar_record(parts)
            _check_end(archive)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{source.path}: not a tar file that can be read to its end ({reason(error)})") from None


Parts = dict[str, bytes | UserError]  # by ending, in lower case; the error of what cannot be taken


def _samples(path: str, archive: tarfile.TarFile) -> Iterator[tuple[str, Parts]]:
    """Contents are read as they come: a compressed file cannot go back."""
    key = ""
    parts: Parts = {}
    for member in archive:
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if not member.isfile() or not stem:  # hidden files, such as macOS's
            continue
        following = f"{folder}/{stem}" if folder else stem
        if parts and following != key:
            yield f"{path}, {key}", parts
            parts = {}
        key = following
        parts[f".{ending.lower()}"] = _content(archive, member)
    if parts:
        yield f"{path}, {key}", parts


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end; a block of zeros is there, or nothing."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {archive.offset}")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | UserError:
    if member.size > _MOST_BYTES:
        return UserError(f"{member.name} has {member.size:,} bytes; a picture has {_MOST_BYTES:,} at most")
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _tar_picture(parts: Parts) -> bytes:
    suffix = next((suffix for suffix in PICTURE_SUFFIXES if suffix in parts), None)
    if suffix is None:
        raise UserError(f"no picture among {', '.join(sorted(parts))}")
    return _taken(parts[suffix])


def _tar_record(parts: Parts) -> Record:
    if ".json" in parts:
        return parse_object(_taken(parts[".json"]))
    if ".txt" in parts:
        return {CAPTION_FIELDS[0]: _taken(parts[".txt"]).decode("utf-8").strip()}
    return {}


def _taken(content: bytes | UserError) -> bytes:
    if isinstance(content, UserError):
        raise content
    return content


def _parquet(source: CaptionedSource, bad: BadRecords) -> Iterator[Found]:
    for where, record in read_parquet(source.path, bad, _ROWS):
        with bad.of(where):
            name, image = _column_picture(record)
            yield where, image, {key: value for key, value in record.items() if key != name}


def _column_picture(record: Record) -> tuple[str, bytes]:
    """(name, content) of the column that holds bytes, or, as `datasets` writes pictures, {"bytes": …}."""
    found = dict[str, bytes]()
    for name, value in record.items():
        content: Any = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, bytes):
            found[name] = content
    if len(found) != 1:
        what = f"several columns of bytes ({', '.join(found)})" if found else "no column of bytes"
        raise UserError(f"{what}; found {', '.join(record)}")
    return next(iter(found.items()))


READERS: dict[str, Callable[[CaptionedSource, BadRecords], Iterator[Found]]] = {
    "folder": _folder,
    "tar": _tar,
    "parquet": _parquet,
}
_KINDS = {".tar": "tar", ".tgz": "tar", ".tar.gz": "tar", ".parquet": "parquet"}


def write_captioned(path: Path, rows: Sequence[tuple[bytes, Record]]) -> None:
    """A parquet file of pictures (contents of their files) and records with the same fields. Atomic."""
    import pyarrow
    from pyarrow import parquet

    records = [{"image": image, **record} for image, record in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    parquet.write_table(pyarrow.Table.from_pylist(records), temporary)
    temporary.replace(path)
