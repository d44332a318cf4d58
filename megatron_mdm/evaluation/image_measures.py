"""Scores of the images that a run generates: by a CLIP model, or, of tinted digits, by real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.captions import Caption, read_captions
from megatron_mdm.data.records import BadRecords
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation import clip_score, image_scores
from megatron_mdm.evaluation.clip_score import evaluate_clip, load_clip
from megatron_mdm.evaluation.image_scores import digit_scores
from megatron_mdm.evaluation.measure import Evaluate, Measure, Result, Source, left_out
from megatron_mdm.evaluation.trained import TrainedFor
from megatron_mdm.generation.generate import generate
from megatron_mdm.generation.image_sampler import denoise_images
from megatron_mdm.generation.image_settings import ImageSampling, ImageTokens
from megatron_mdm.generation.images import MOST_ON_SHEET, SHEET, name, picture, run_image_tokenizer
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.images.digits import RESOLUTION, read_caption
from megatron_mdm.images.pixels import to_png
from megatron_mdm.images.sheet import sheet
from megatron_mdm.images.tokenizer import ImageTokenizer
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext, rank_from_environment
from megatron_mdm.parallel.heartbeat import beat
from megatron_mdm.parallel.progress import progress_bar


class Drawing(NamedTuple):
    """Captions to be drawn by a run, and all that it takes but the model."""

    captions: list[Caption]  # one of every image
    num_cut: int  # distinct records whose captions were too long for a row
    sampling: ImageSampling
    special: SpecialIds
    image: ImageTokens
    tokenizer: ImageTokenizer
    bad: BadRecords

    @classmethod
    def of(cls, source: Source, sampling: ImageSampling, config: RunConfig, tokenizer: Tokenizer) -> Drawing:
        special = SpecialIds.of(tokenizer)
        image = ImageTokens.of(config, special)
        bad = BadRecords(source.on_error)
        room = sampling.room(config.model, image)
        found = read_captions(source.path, tokenizer, image.vocabulary, bad, room, source.limit)
        captions = [caption for caption in found for _ in range(sampling.images_per_caption)]
        num_cut = sum(caption.is_cut for caption in found)
        return cls(captions, num_cut, sampling, special, image, run_image_tokenizer(config.image), bad)

    @property
    def texts(self) -> list[str]:
        return [caption.text for caption in self.captions]

    @property
    def resolution(self) -> int:
        """Pixels of an image's side."""
        return math.isqrt(self.image.number) * self.tokenizer.down

    def draw(self, engine: Any, context: ParallelContext) -> list[Image.Image]:
        """The pictures, on the main rank; none elsewhere. Collective."""
        decode = partial(denoise_images, image=self.image)
        ids = [caption.ids for caption in self.captions]
        drawn = generate(engine, ids, self.sampling, self.special, context, decode)
        if not context.is_main:
            return []
        self.tokenizer.to(platform.device())
        pictures = []
        for response in progress_bar(drawn, desc="decode", unit="image"):
            beat()
            pictures.append(picture(self.tokenizer, response.tokens))
        return pictures

    def result(self, pictures: Sequence[Image.Image], scores: Result, of_each: Sequence[dict[str, Any]]) -> Result:
        """With what is written beside the scores. of_each: scores of every picture."""
        captions = self.texts
        shown = sheet(pictures[:MOST_ON_SHEET], captions[:MOST_ON_SHEET])
        samples = [
            {"caption": caption, "file": name(row), **each}
            for row, (caption, each) in enumerate(zip(captions, of_each, strict=True))
        ]
        files = {name(row): to_png(each) for row, each in enumerate(pictures)}
        return {
            **scores,
            "num_cut_for_the_model": self.num_cut,
            "image tokenizer": self.tokenizer.fingerprint(),
            "settings": self.sampling.model_dump(mode="json"),
            "samples": samples,
            "pictures": {**files, SHEET: to_png(shown)},
            **left_out(self.bad),
        }


def _clip_score(
    source: Source, sampling: ImageSampling, config: RunConfig, tokenizer: Tokenizer, _: TrainedFor
) -> Evaluate:
    if not source.clip:
        raise UserError("name the CLIP model to score by with --clip FOLDER; there is no default")
    drawing = Drawing.of(source, sampling, config, tokenizer)
    if len(set(drawing.texts)) < 2:
        raise UserError(f"{source.path}: a CLIP score needs two distinct captions at least: others are its floor")
    clip = load_clip(source.clip)  # every rank, so that all of them tell of a bad folder
    kept = [clip] if rank_from_environment() == 0 else []
    del clip

    def run(engine: Any, context: ParallelContext) -> Result:
        pictures = drawing.draw(engine, context)
        if not context.is_main:
            return {}
        scores = evaluate_clip(pictures, drawing.texts, kept[0])
        return drawing.result(pictures, scores, [{"score": score} for score in scores.pop("scores")])

    return run


def _digits(
    source: Source, sampling: ImageSampling, config: RunConfig, tokenizer: Tokenizer, _: TrainedFor
) -> Evaluate:
    real = source.digits
    if real is None:
        raise UserError("name real tinted digits to judge by with --digits TRAIN TEST: `mdm prepare digits`")
    drawing = Drawing.of(source, sampling, config, tokenizer)
    if drawing.resolution != RESOLUTION:
        raise UserError(f"the run's images have {drawing.resolution} pixels a side, the digits {RESOLUTION}")
    for text in drawing.texts:
        read_caption(text)

    def run(engine: Any, context: ParallelContext) -> Result:
        pictures = drawing.draw(engine, context)
        if not context.is_main:
            return {}
        pixels = np.stack([np.asarray(each) for each in pictures])
        seen = real.judge(pixels)
        of_each = [{"digit": digit, "color": color} for digit, color in zip(seen.digit.tolist(), seen.color)]
        return drawing.result(pictures, digit_scores(pixels, drawing.texts, *real), of_each)

    return run


IMAGE_MEASURES = {
    "clip_score": Measure(
        ImageSampling, _clip_score, clip_score.summary, "clip_score.json", "clip_score_samples.jsonl"
    ),
    "image_scores": Measure(
        ImageSampling, _digits, image_scores.summary, "image_scores.json", "image_scores_samples.jsonl"
    ),
}
