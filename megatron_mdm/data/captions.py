"""A file of captions to be drawn."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.sections.image import ImageVocabulary
from megatron_mdm.data.captioned import caption_of
from megatron_mdm.data.image_text import is_too_long, prefix
from megatron_mdm.data.json_files import Record
from megatron_mdm.data.lengths import UNLIMITED, Room
from megatron_mdm.data.records import BadRecords, read_records
from megatron_mdm.data.text_files import open_text
from megatron_mdm.data.tokenizer import Tokenizer


class Caption(NamedTuple):
    text: str
    ids: list[int]  # of the text alone
    is_cut: bool  # whether a row has no room for all of it

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer, vocabulary: ImageVocabulary, room: Room = UNLIMITED) -> Caption:
        """Raises ValueError where an image has no room behind it."""
        ids = tokenizer.encode(text)
        room.check(len(prefix(ids, vocabulary)), room.gen_length, "the image")
        return cls(text, ids, is_too_long(ids, vocabulary))

    def as_record(self) -> Record:
        return {"caption": self.text}


def read_captions(
    path: str,
    tokenizer: Tokenizer,
    vocabulary: ImageVocabulary,
    bad: BadRecords,
    room: Room = UNLIMITED,
    limit: int = 0,
) -> list[Caption]:
    """The captions of a text file, a line each, or of records (JSON lines, parquet) with 'caption', 'prompt' or 'text';
    an empty one asks for any image. limit: the first of them; 0: all."""
    captions = []
    for where, record in islice(_records(path, bad), limit or None):
        with bad.of(where):
            captions.append(Caption.of(caption_of(record, may_be_empty=True).strip(), tokenizer, vocabulary, room))
    if not captions:
        raise UserError(f"{path}: no captions{bad.summary()}")
    return captions


def _records(path: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    if Path(path).suffix != ".txt":
        yield from read_records(path, bad)
        return
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            with bad.of(where):
                if text := line.decode("utf-8").strip():
                    yield where, {"caption": text}
