"""Captions and image codes → token ids in MMaDA's order; only the image's are targets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.public_sets import Sets, check_number, nine_to_one
from megatron_mdm.data.records import read_records
from megatron_mdm.data.tokenizer import load_tokenizer

NUM_SAMPLES = 5000
NUM_IMAGE_CODES = 8192
# Ids of MMaDA's vocabulary.
T2I = 126_088
BOS = 126_080
EOS = 126_081
IMAGE_BEGIN = 126_084
IMAGE_END = 126_085
MASK = 126_336


def prepare(paths: Sequence[str], arguments: argparse.Namespace) -> Sets:
    """{"caption", "image_codes"} lines; 5,000 of them, 9 : 1 for training and validation."""
    check_number(paths, (1,), "text-to-image", "one file, or one name for `datasets`")
    if not arguments.tokenizer:
        raise UserError("text-to-image: name the captions' tokenizer with --tokenizer")
    tokenizer = load_tokenizer(
        DataConfig(train="", tokenizer=arguments.tokenizer, mask_token=MASK, pad_token=EOS, eos_token=EOS, max_length=2)
    )
    rows = []
    for where, record in islice(read_records(paths[0]), NUM_SAMPLES):
        caption = record.get("caption")
        codes = record.get("image_codes")
        if not isinstance(caption, str) or not isinstance(codes, list) or not codes:
            raise UserError(f"{where}: expected a string 'caption' and a list of integers 'image_codes'")
        if not all(type(code) is int and 0 <= code < NUM_IMAGE_CODES for code in codes):
            raise UserError(f"{where}: image codes must be integers from 0 to {NUM_IMAGE_CODES - 1}")
        head = [T2I, BOS, *tokenizer.encode(caption), EOS, IMAGE_BEGIN]
        ids = [*head, *(arguments.image_offset + code for code in codes), IMAGE_END]
        rows.append({"input_ids": ids, "spans": [[len(head), len(head) + len(codes)]], "caption": caption})
    return nine_to_one(rows, arguments.seed)
