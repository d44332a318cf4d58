"""Captions and image codes → rows of token ids for training, with the paper's splits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.config.sections.image import ImageVocabulary
from megatron_mdm.data.image_text import image_row
from megatron_mdm.data.public_sets import Sets, nine_to_one
from megatron_mdm.data.records import BadRecords, Record, read_records
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer

_NUM_CODES = 8192  # of records that do not say
_MASK = 126_336  # MMaDA's
_SHOWN = 12  # digits of a checksum


class Codes(NamedTuple):
    """Of which image tokenizer a file's codes are."""

    made_by: str  # its checksum; empty: not said
    number: int


def prepare(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """{"caption", "image_codes"} lines: --samples of them (0: all) in equal parts from each file, 9 : 1 for training
    and validation, and --test of those that follow. Beside them vocabulary.json, the ids of what is no text."""
    if not arguments.tokenizer:
        raise UserError("text-to-image: name the captions' tokenizer with --tokenizer")
    tokenizer, vocabulary_of = VOCABULARIES[arguments.vocabulary](arguments)
    found: dict[str, list[tuple[str, Record]]] = {"train": [], "test": []}
    for place, path in enumerate(paths):
        records = read_records(path)
        for name, number in (("train", arguments.samples), ("test", arguments.test)):
            wanted = _part(number, place, len(paths))
            taken = list(islice(records, wanted or (None if name == "train" else 0)))
            found[name] += taken
            if len(taken) < wanted:
                print(f"warning: {path}: {len(taken):,} of {wanted:,} {name} samples are there", file=sys.stderr)
    everything = [*found["train"], *found["test"]]
    if not everything:
        raise UserError(f"{', '.join(paths)}: no records")
    vocabulary = vocabulary_of(_codes_of(everything))
    rows = {name: [*_rows(records, tokenizer, vocabulary)] for name, records in found.items()}
    num_cut = sum(is_cut for part in rows.values() for _, is_cut in part)
    if num_cut:
        most = vocabulary.caption_tokens - 2
        print(f"warning: {num_cut:,} captions were longer than {most} tokens and were cut", file=sys.stderr)
    write_json(arguments.output / "vocabulary.json", vocabulary.model_dump(mode="json"))
    sets = nine_to_one([row for row, _ in rows["train"]], arguments.seed)
    if rows["test"]:
        sets["test"] = [row for row, _ in rows["test"]]
    return sets


def _part(number: int, place: int, num_parts: int) -> int:
    """Of `number` things in parts as equal as can be, those of one part."""
    return number // num_parts + (place < number % num_parts)


def _codes_of(records: Sequence[tuple[str, Record]]) -> Codes:
    """Raises UserError where the records disagree."""
    codes = None
    for where, record in records:
        mine = Codes(record.get("codes_of", ""), record.get("num_codes", _NUM_CODES))
        if not isinstance(mine.made_by, str) or type(mine.number) is not int or mine.number < 1:
            raise UserError(f"{where}: 'codes_of' must be a text and 'num_codes' a positive number")
        codes = codes or mine
        if mine != codes:
            raise UserError(
                f"{where}: codes of another image tokenizer ({mine.made_by[:_SHOWN] or 'not said'}, {mine.number} "
                f"codes) than those before ({codes.made_by[:_SHOWN] or 'not said'}, {codes.number} codes)"
            )
    assert codes is not None
    return codes


def _rows(
    records: Sequence[tuple[str, Record]], tokenizer: Tokenizer, vocabulary: ImageVocabulary
) -> Iterator[tuple[Record, bool]]:
    """(row, whether its caption was cut) of each record."""
    bad = BadRecords()
    for where, record in records:
        caption = record.get("caption")
        codes = record.get("image_codes")
        with bad.of(where):
            if (
                not isinstance(caption, str)
                or not isinstance(codes, list)
                or any(type(code) is not int for code in codes)
            ):
                raise UserError("expected a string 'caption' and a list of integers 'image_codes'")
            row = image_row(tokenizer.encode(caption), codes, vocabulary)
            made_by = {"codes_of": record["codes_of"]} if record.get("codes_of") else {}
            yield {"input_ids": row.ids, "spans": [list(row.span)], "caption": caption, **made_by}, row.is_cut


Resolved = tuple[Tokenizer, Callable[[Codes], ImageVocabulary]]


def _mmada(arguments: argparse.Namespace) -> Resolved:
    """MMaDA-8B's ids, over LLaDA's tokenizer."""
    vocabulary = ImageVocabulary(first_id=arguments.image_offset)
    eos = vocabulary.eos
    data = DataConfig(
        train="", tokenizer=arguments.tokenizer, mask_token=_MASK, pad_token=eos, eos_token=eos, max_length=2
    )
    tokenizer = load_tokenizer(data)
    if tokenizer.backend.num_ids > vocabulary.first_id:
        raise UserError(
            f"{arguments.tokenizer}: its {tokenizer.backend.num_ids} ids reach into the image codes, which begin at "
            f"{vocabulary.first_id}; take the tokenizer that came with the model, or name its --image-offset"
        )

    def of(codes: Codes) -> ImageVocabulary:
        if codes.number != vocabulary.num_codes:
            raise UserError(
                f"the image codes are of {codes.number}, MMaDA's of {vocabulary.num_codes}; --vocabulary behind is for "
                "models from scratch"
            )
        return vocabulary

    return tokenizer, of


def _behind(arguments: argparse.Namespace) -> Resolved:
    """Ids behind the tokenizer's, for a model from scratch."""
    tokenizer = load_tokenizer(DataConfig(train="", tokenizer=arguments.tokenizer, max_length=2))
    return tokenizer, lambda codes: ImageVocabulary.behind(tokenizer.num_ids, tokenizer.eos_id, codes.number)


# by --vocabulary: the options → the captions' tokenizer, and the ids for codes of some image tokenizer
VOCABULARIES: dict[str, Callable[[argparse.Namespace], Resolved]] = {"mmada": _mmada, "behind": _behind}
