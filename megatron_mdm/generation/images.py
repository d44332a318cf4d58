"""From captions to pictures in a folder, which an interrupted job resumes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.config.sections.image import ImageConfig
from megatron_mdm.data.captioned import GENERATED_FILE
from megatron_mdm.data.captions import Caption
from megatron_mdm.data.json_files import Record
from megatron_mdm.generation.answers import AnswerFile
from megatron_mdm.generation.generate import generate_by_turns
from megatron_mdm.generation.image_sampler import denoise_images
from megatron_mdm.generation.image_settings import ImageSampling, ImageTokens
from megatron_mdm.generation.settings import IdsEngine, Response, SpecialIds
from megatron_mdm.images.pixels import read_image, to_picture, to_png
from megatron_mdm.images.sheet import sheet
from megatron_mdm.images.tokenizer import ImageTokenizer, load_tokenizer
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext, rank_from_environment

SHEET = "sheet.png"
MOST_ON_SHEET = 100
_SHOWN = 12  # digits of a checksum


def run_image_tokenizer(config: ImageConfig) -> ImageTokenizer:
    """The image tokenizer of a run, on the CPU. Raises UserError where it is another one than whose codes the run was
    trained on."""
    if not config.tokenizer:
        raise UserError("the run does not say where its image tokenizer is; name its folder: image.tokenizer=FOLDER")
    tokenizer = load_tokenizer(config.tokenizer)
    fingerprint = tokenizer.fingerprint()
    if config.made_by and fingerprint != config.made_by:
        raise UserError(
            f"{config.tokenizer}: another image tokenizer ({fingerprint[:_SHOWN]}…) than the one that made the codes "
            f"of the run's training data ({config.made_by[:_SHOWN]}…); name that one: image.tokenizer=FOLDER"
        )
    if not config.made_by and rank_from_environment() == 0:
        line = f"warning: the run does not say whose codes it was trained on; {config.tokenizer} is taken for theirs"
        print(line, file=sys.stderr, flush=True)
    if tokenizer.num_codes != config.vocabulary.num_codes:
        raise UserError(
            f"{config.tokenizer}: {tokenizer.num_codes} codes, the run's image vocabulary has "
            f"{config.vocabulary.num_codes}"
        )
    return tokenizer


def picture(tokenizer: ImageTokenizer, codes: Sequence[int]) -> Image.Image:
    """N codes, a square in raster order → an RGB picture. Alone, so that its pixels do not depend on a batch."""
    side = math.isqrt(len(codes))
    device = next(tokenizer.parameters()).device
    (pixels,) = tokenizer.decode(torch.tensor([codes], device=device), side, side)
    return to_picture(pixels)


class ImageFolder:
    """000000.png …; images.jsonl, a line of each: {"caption", "file", "codes", "seed", "steps"}; sheet.png, the first
    ones with their captions. Until all are there, images.jsonl.partial takes the place of the last two, as in
    AnswerFile."""

    def __init__(
        self, path: Path, captions: Sequence[Caption], settings: dict[str, Any], context: ParallelContext
    ) -> None:
        """captions: one of every image. settings: as AnswerFile's. Collective."""
        self.path = path
        self.list = AnswerFile(path / GENERATED_FILE, captions, settings, context, self._is_drawn)

    def draw(
        self,
        engine: IdsEngine,
        tokenizer: ImageTokenizer,
        config: ImageSampling,
        special: SpecialIds,
        image: ImageTokens,
        context: ParallelContext,
    ) -> None:
        """Draw what is missing and finish the folder. Collective."""
        captions = self.list.prompts
        missing = self.list.missing
        if len(missing) < len(captions) and context.is_main:
            print(f"{self.list.partial}: {len(captions) - len(missing)} images are there already", flush=True)
        tokenizer.to(platform.device())
        decode = partial(denoise_images, image=image)
        ids = [caption.ids for caption in captions]
        for share in generate_by_turns(engine, ids, missing, config, special, context, decode):
            self._write(share, tokenizer, context)
            self.list.add(
                {
                    row: {"file": name(row), "codes": response.tokens, "seed": config.seed, "steps": response.steps}
                    for row, response in share.items()
                }
            )
        if context.is_main:
            self._write_sheet()
        self.list.finish()

    def _write(self, share: dict[int, Response], tokenizer: ImageTokenizer, context: ParallelContext) -> None:
        """The pictures of one turn, whose codes every rank has: each rank decodes its part of them."""
        problem = ""
        try:
            for row in sorted(share)[context.rank :: context.layout.world_size]:
                write_atomically(self.path / name(row), to_png(picture(tokenizer, share[row].tokens)))
        except OSError as error:
            problem = (
                f"{self.path}: pictures cannot be written ({error.strerror}); the same command goes on from what is "
                "there"
            )
        for found in gather_objects(problem, context):
            if found:
                raise UserError(found)

    def _write_sheet(self) -> None:
        captions = [caption.as_record()["caption"] for caption in self.list.prompts[:MOST_ON_SHEET]]
        pictures = [read_image(self.path / name(row)) for row in range(len(captions))]
        try:
            write_atomically(self.path / SHEET, to_png(sheet(pictures, captions)))
        except OSError as error:
            raise UserError(f"{self.path / SHEET}: cannot be written ({error.strerror})") from None

    def _is_drawn(self, record: Record) -> bool:
        return (self.path / str(record.get("file"))).is_file()


def name(row: int) -> str:
    """Of a picture's file."""
    return f"{row:06d}.png"
