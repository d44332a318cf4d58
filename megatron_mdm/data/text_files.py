"""Opening text files: byte order marks, compression, and the line in which that fails."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from megatron_mdm.config.errors import UserError

_GZIP = b"\x1f\x8b"
_OTHER_ENCODINGS = {  # longer marks first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_HEAD = 64  # bytes by which an encoding without a mark is told


@contextmanager
def open_text(path: str) -> Iterator[IO[bytes]]:
    """A UTF-8 file's bytes, decompressed (gzip), behind its byte order mark; tell() and seek() count from the file's
    first byte. Raises UserError where the file cannot be read, whenever that shows, or has another encoding."""
    try:
        with open(path, "rb") as raw:
            is_compressed = raw.read(2) == _GZIP
        with gzip.open(path, "rb") if is_compressed else open(path, "rb") as file:
            head = file.read(_HEAD)
            if encoding := _other_encoding(head):
                raise UserError(
                    f"{path}: is {encoding}; make it UTF-8 first (iconv -f {encoding} -t UTF-8 {path} > NEW)"
                )
            file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            yield cast(IO[bytes], file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _other_encoding(head: bytes) -> str:
    """Empty for UTF-8. Without a mark, UTF-16 shows in that every other byte of ASCII text is 0."""
    for mark, name in _OTHER_ENCODINGS.items():
        if head.startswith(mark):
            return name
    for zeros, others, name in ((head[1::2], head[::2], "UTF-16LE"), (head[::2], head[1::2], "UTF-16BE")):
        if len(head) >= 4 and not any(zeros) and all(others):
            return name
    return ""
