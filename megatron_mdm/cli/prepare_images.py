"""`mdm prepare images`: pictures with captions → image codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_mdm.cli.codes_file import CodesFile
from megatron_mdm.cli.pictures import Faults, Square, notes, squares
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.data.captioned import CaptionedSource
from megatron_mdm.data.records import bad_lines
from megatron_mdm.images.pixels import as_model_input, to_png
from megatron_mdm.images.sheet import sheet
from megatron_mdm.images.tokenizer import ImageTokenizer, load_tokenizer
from megatron_mdm.images.train import reconstruct
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.progress import progress_bar

_PREVIEWED = 8


def encode_images(arguments: argparse.Namespace) -> None:
    """A line {"caption", "image_codes", "codes_of", "num_codes"} of each picture, and a page: the first pictures above
    what the tokenizer makes of their codes."""
    tokenizer = load_tokenizer(arguments.image_tokenizer)
    tokenizer.num_tokens(arguments.resolution)
    tokenizer.to(platform.device())
    sources = [CaptionedSource(path, arguments.caption_field) for path in arguments.input]
    file = CodesFile(arguments, tokenizer)
    faults = Faults.of(arguments.on_error)
    faults.pictures.count, faults.pictures.first = file.state.bad, list(file.state.first_bad)
    if file.state.done:
        print(f"{file.partial}: {file.state.rows:,} pictures are there already", flush=True)
    found = squares(sources, arguments.resolution, faults, skip=file.state.done, threads=arguments.threads)
    bar = progress_bar(found, desc="encode", unit="picture", initial=file.state.rows)
    try:
        for batch in _batches(bar, arguments.batch_size):
            file.add(batch, _codes(tokenizer, [square.pixels for square in batch]), faults)
    finally:  # what has been encoded is kept, whatever is wrong with the next picture
        file.save()
    if not file.state.rows:
        raise UserError(f"{', '.join(arguments.input)}: no pictures with captions ({faults.count} were bad)")
    file.finish()
    _write_preview(arguments, sources, tokenizer)
    for line in (
        *bad_lines(faults.count, faults.first),
        *notes(file.state.rows, file.state.enlarged, arguments.resolution, sources),
    ):
        print(line, file=sys.stderr)
    print(f"{arguments.output}: {file.state.rows:,} pictures, {tokenizer.num_tokens(arguments.resolution)} codes each")


def _codes(tokenizer: ImageTokenizer, pixels: Sequence[np.ndarray[Any, Any]]) -> list[list[int]]:
    batch = torch.from_numpy(np.stack(pixels)).to(platform.device())
    return tokenizer.encode(as_model_input(batch)).tolist()


def _batches(found: Iterable[Square], size: int) -> Iterator[list[Square]]:
    iterator = iter(found)
    while batch := list(islice(iterator, size)):
        yield batch


def _write_preview(
    arguments: argparse.Namespace, sources: Sequence[CaptionedSource], tokenizer: ImageTokenizer
) -> None:
    shown = list(islice(squares(sources, arguments.resolution, Faults.of("skip")), _PREVIEWED))
    pixels = torch.from_numpy(np.stack([square.pixels for square in shown]))
    again = reconstruct(tokenizer, pixels, platform.device(), arguments.batch_size).pixels
    images = [Image.fromarray(picture.numpy()) for picture in (*pixels, *again)]
    captions = [*(square.source.caption for square in shown), *["from its codes"] * len(shown)]
    path = arguments.output.with_name(f"{arguments.output.stem}-preview.png")
    write_atomically(path, to_png(sheet(images, captions, len(shown))))
