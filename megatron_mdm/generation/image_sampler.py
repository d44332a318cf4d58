"""Denoising of images (MMaDA's t2i_generate, after MaskGIT), batched: caption, N masks, the image's end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_mdm.batch import padded_rows
from megatron_mdm.data.image_text import null_prefix, prefix, suffix
from megatron_mdm.diffusion.randomness import Purpose
from megatron_mdm.engine.inputs import logits_inputs
from megatron_mdm.generation.candidates import draw, gumbel_noise
from megatron_mdm.generation.image_settings import CONFIDENCE_SCHEDULES, ImageSampling, ImageTokens
from megatron_mdm.generation.noise import NOISES, Noise
from megatron_mdm.generation.remask import COMMIT_SCHEDULES, Ranking, low_confidence, most_confident
from megatron_mdm.generation.settings import IdsEngine, Response, SpecialIds

UNKNOWN = -1  # in place of a code that has not been committed
_LEAST = 1e-20  # probability whose logarithm is taken
Watch = Callable[[Tensor], None]  # is shown the codes [R, N] after every step


def denoise_images(
    engine: IdsEngine,
    captions: Sequence[Sequence[int]],
    image_ids: Sequence[int],
    config: ImageSampling,
    special: SpecialIds,
    watch: Watch | None = None,
    *,
    image: ImageTokens,
) -> list[Response]:
    """The images of one batch of captions (their ids alone): N codes each, from 0 on, in raster order.

    A step draws a code for every place that is unknown and commits those of the greatest ln p + τ · Gumbel, which
    never change again. Randomness is a function of (seed, image id, step).
    """
    canvas = _Canvas(captions, image, special, is_guided=config.cfg_scale > 0)
    amounts = COMMIT_SCHEDULES[config.schedule](image.number, config.steps, config.eps)
    noise = [NOISES[config.noise](config.seed, Purpose.GENERATION, [index]) for index in image_ids]
    num_passes = 0
    for step, amount in enumerate(amounts):
        if not amount.count:
            continue
        logits = _guided_logits(engine, canvas, config)
        canvas.commit(*_ranked(logits, canvas.unknown, noise, step, config), amount.count)
        num_passes += 1
        if watch:
            watch(canvas.codes)
    return [Response(codes, num_passes) for codes in canvas.codes.tolist()]


class _Canvas:
    """R rows of caption, image and its end, padded on the right, where attention does not see, so that a row does not
    depend on its batch. Under guidance, R more rows hold the same images behind no caption, which is shorter."""

    def __init__(
        self, captions: Sequence[Sequence[int]], image: ImageTokens, special: SpecialIds, is_guided: bool
    ) -> None:
        before = [prefix(caption, image.vocabulary) for caption in captions]
        if is_guided:
            before += [null_prefix(image.vocabulary)] * len(captions)
        rows = [[*ids, *[special.mask] * image.number, *suffix(image.vocabulary)] for ids in before]
        self.image = image
        self.mask = special.mask
        self.copies = 2 if is_guided else 1
        self.lengths = torch.tensor([len(row) for row in rows])
        width = int(self.lengths.max())
        self.tokens = torch.tensor([row + [special.pad] * (width - len(row)) for row in rows])  # [copies · R, W]
        self.places = torch.tensor([[len(ids)] for ids in before]) + torch.arange(image.number)  # [copies · R, N]
        self.codes = torch.full((len(captions), image.number), UNKNOWN)  # [R, N]

    @property
    def unknown(self) -> Tensor:
        """[R, N] bool; as many in every row."""
        return self.codes == UNKNOWN

    def rows(self) -> Tensor:
        """What the model sees, [copies · R, W]."""
        ids = torch.where(self.unknown, self.mask, self.codes + self.image.vocabulary.first_id)
        return self.tokens.scatter(1, self.places, ids.repeat(self.copies, 1))

    def selected(self) -> Tensor:
        """The unknown places of rows(), [copies · R, W] bool."""
        nothing = torch.zeros_like(self.tokens, dtype=torch.bool)
        return nothing.scatter(1, self.places, self.unknown.repeat(self.copies, 1))

    def commit(self, codes: Tensor, ranking: Ranking, count: int) -> None:
        """Write the first codes, [R, N], of the ranking."""
        self.codes = torch.where(most_confident(ranking, count), codes, self.codes)


def _guided_logits(engine: IdsEngine, canvas: _Canvas, config: ImageSampling) -> Tensor:
    """Logits [R, M, codes] float32 of the M unknown places of each row, after guidance."""
    tokens = canvas.rows()
    inputs = logits_inputs(tokens, padded_rows(canvas.lengths, tokens.shape[1]), canvas.selected())
    logits = engine.logits(inputs, ids=canvas.image.ids).float()
    if canvas.copies == 2:
        with_caption, without = logits.chunk(2)
        logits = without + (config.cfg_scale + 1.0) * (with_caption - without)
    return logits.view(len(canvas.codes), -1, logits.shape[1])


def _ranked(
    logits: Tensor, unknown: Tensor, noise: Sequence[Noise], step: int, config: ImageSampling
) -> tuple[Tensor, Ranking]:
    """Codes [R, N] and their ranking; logits [R, M, codes] of the unknown places.

    Row by row: the noise of one image has as many numbers as its logits.
    """
    of_order = config.confidence_temperature * CONFIDENCE_SCHEDULES[config.confidence_schedule](step + 1, config.steps)
    codes = torch.zeros(unknown.shape, dtype=torch.int64)
    scores = torch.full(unknown.shape, float("-inf"), dtype=torch.float64)
    num_drawn = logits.shape[2] if config.temperature else 0
    for row, of_image in enumerate(noise):
        drawn = of_image.at(step, unknown[row : row + 1], num_drawn, logits.device)
        found = draw(logits[row], config.temperature, config.top_p, config.top_k, None, drawn.tokens)
        confidence = low_confidence(found, drawn.orders).cpu().clamp_min(_LEAST).log()
        codes[row, unknown[row]] = found.tokens.cpu()
        scores[row, unknown[row]] = confidence + of_order * gumbel_noise(drawn.orders)
    return codes, Ranking(scores, unknown, torch.zeros_like(unknown))
