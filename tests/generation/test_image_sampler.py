"""Denoising of images against a dense reference written from MMaDA's steps, one image and one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.batch import Full, IdRange, ModelInputs
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ImageVocabulary, RunConfig
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.engine.inputs import logits_inputs
from megatron_mdm.generation.image_sampler import UNKNOWN, denoise_images
from megatron_mdm.generation.image_settings import CONFIDENCE_SCHEDULES, ImageSampling, ImageTokens
from megatron_mdm.generation.noise import DeviceNoise
from megatron_mdm.generation.remask import COMMIT_SCHEDULES
from megatron_mdm.generation.settings import Response, SpecialIds
from tests.generation.test_sampler import built_engine
from tests.ranks import run_ranks
from tests.small import MASK, PAD, small_config

VOCABULARY = ImageVocabulary(task=20, bos=21, eos=1, image_begin=22, image_end=23, first_id=25, num_codes=20)
IMAGE = ImageTokens(VOCABULARY, 16)  # codes 25 … 44: tensor-parallel ranks hold 32 ids each
SPECIAL = SpecialIds(MASK, PAD)
CAPTIONS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13], [5, 6, 7]]  # the last has another number, so another image
SETTINGS: list[dict[str, Any]] = [
    {"cfg_scale": 0.0},
    {"cfg_scale": 3.5},
    {"cfg_scale": 1.0, "confidence_schedule": "linear", "confidence_temperature": 4.0, "seed": 3},
    {"temperature": 0.0, "confidence_temperature": 0.0},
    {"noise": "device"},
]


def drawn(batch_size: int, tensor: int = 1, pipeline: int = 1) -> list[list[list[int]]]:
    """On a rank: the codes of all captions, by setting."""
    from megatron_mdm.generation.generate import generate

    engine, context = built_engine(tensor, pipeline)
    decode = partial(denoise_images, image=IMAGE)
    configs = [ImageSampling(steps=6, batch_size=batch_size, **changes) for changes in SETTINGS]
    of_settings = [generate(engine, CAPTIONS, config, SPECIAL, context, decode) for config in configs]
    return [[response.tokens for response in responses] for responses in of_settings]


def reference() -> list[list[list[int]]]:
    """On a rank: the same, from logits of whole rows over the whole vocabulary."""
    engine, _ = built_engine(1, 1)

    def logits_of(row: list[int]) -> np.ndarray:
        tokens = torch.tensor([row])
        return engine.logits(logits_inputs(tokens, Full(), torch.ones_like(tokens, dtype=torch.bool))).double().numpy()

    return [
        [one_image(logits_of, caption, number, **changes) for number, caption in enumerate(CAPTIONS)]
        for changes in SETTINGS
    ]


def one_image(
    logits_of: Callable[[list[int]], np.ndarray],
    caption: list[int],
    number: int,
    cfg_scale: float = 3.5,
    temperature: float = 1.0,
    confidence_temperature: float = 1.0,
    confidence_schedule: str = "product",
    seed: int = 0,
    noise: str = "host",
) -> list[int]:
    """MMaDA's modeling_mmada.py:118-211 in other words."""
    num_places, num_steps, first = 16, 6, VOCABULARY.first_id
    ids = [MASK] * num_places
    tau = confidence_temperature
    drawn = np.zeros(num_places, dtype=int)
    for step in range(1, num_steps + 1):

        def image_logits(text: list[int], image: list[int]) -> np.ndarray:
            before = [VOCABULARY.task, VOCABULARY.bos, *text, VOCABULARY.eos, VOCABULARY.image_begin]
            rows = logits_of([*before, *image, VOCABULARY.image_end])[len(before) : len(before) + num_places]
            return rows[:, first : first + VOCABULARY.num_codes]

        logits = (1 + cfg_scale) * image_logits(caption, ids) - cfg_scale * image_logits([], ids)
        probability = np.exp(logits - logits.max(1, keepdims=True))
        probability /= probability.sum(1, keepdims=True)
        unknown = [place for place in range(num_places) if ids[place] == MASK]
        if noise == "device":
            masked = torch.tensor(ids)[None] == MASK
            hashed = DeviceNoise(seed, Purpose.GENERATION, [number])
            of_orders, of_tokens = hashed.at(step - 1, masked, VOCABULARY.num_codes, torch.device("cpu"))
            orders, tokens = of_orders.numpy(), of_tokens(slice(None)).numpy()
        else:
            generator = stream(seed, Purpose.GENERATION, step - 1, number)
            orders, tokens = (generator.random((len(unknown), *more)) for more in ((), (VOCABULARY.num_codes,)))
        of_order = -np.log(-np.log(orders))
        of_values = -np.log(-np.log(tokens)) if temperature else 0.0
        drawn[unknown] = (logits[unknown] + of_values).argmax(1)  # argmax of log p + Gumbel is multinomial
        tau *= 1 - step / num_steps
        if confidence_schedule == "linear":
            tau = confidence_temperature * (1 - step / num_steps)
        confidence = np.full(num_places, np.inf)
        for index, place in enumerate(unknown):
            confidence[place] = math.log(max(probability[place, drawn[place]], 1e-20)) + tau * of_order[index]
        still_masked = max(1, min(len(unknown) - 1, math.floor(num_places * math.cos(math.pi * step / 2 / num_steps))))
        cut = np.sort(confidence)[still_masked]
        ids = [MASK if confidence[place] < cut else first + drawn[place] for place in range(num_places)]
    return drawn.tolist()


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    return run_ranks(reference, 1)[0]


@pytest.mark.parametrize(
    ("batch_size", "num_ranks", "tensor", "pipeline"), [(1, 1, 1, 1), (5, 1, 1, 1), (2, 4, 2, 1), (3, 2, 1, 2)]
)
def test_images_equal_the_reference_on_any_layout_and_batch(
    batch_size: int, num_ranks: int, tensor: int, pipeline: int, expected: list[list[list[int]]]
) -> None:
    for found in run_ranks(drawn, num_ranks, batch_size, tensor, pipeline):
        assert found == expected


def test_images_differ_by_number_and_by_caption(expected: list[list[list[int]]]) -> None:
    for images in expected[:3]:
        assert len({tuple(codes) for codes in images}) == len(CAPTIONS)
    greedy = expected[3]
    assert greedy[0] == greedy[4]


class Recorder:
    """An engine that likes the greatest image code everywhere; keeps what it was asked."""

    def __init__(self) -> None:
        self.inputs: list[ModelInputs] = []
        self.ids: list[IdRange | None] = []

    def logits(self, inputs: ModelInputs, *, ids: IdRange | None = None) -> torch.Tensor:
        self.inputs.append(inputs._replace(tokens=inputs.tokens.clone()))
        self.ids.append(ids)
        assert ids is not None
        return torch.arange(ids[1]).float().expand(int(inputs.selected.sum()), -1)


def recorded(captions: list[list[int]], **changes: Any) -> tuple[Recorder, list[Response], list[torch.Tensor]]:
    engine = Recorder()
    seen: list[torch.Tensor] = []
    config = ImageSampling(**changes)
    image = ImageTokens(VOCABULARY, 16)
    watch = lambda codes: seen.append(codes.clone())  # noqa: E731
    numbers = [*range(len(captions))]
    return engine, denoise_images(engine, captions, numbers, config, SPECIAL, watch, image=image), seen


def test_known_places_are_kept_and_no_id_is_outside_the_image_s() -> None:
    engine, responses, seen = recorded([[5, 6, 7], []], steps=6, temperature=5.0)
    assert set(engine.ids) == {(25, 20)}
    for codes, earlier in zip(seen[1:], seen):
        known = earlier != UNKNOWN
        assert torch.equal(codes[known], earlier[known])
    assert [int((codes != UNKNOWN).sum(1).max()) for codes in seen] == [1, 3, 5, 8, 12, 16]
    for response in responses:
        assert response.steps == 6
        assert all(0 <= code < 20 for code in response.tokens)
    for inputs in engine.inputs:
        rows = [row[:length].tolist() for row, length in zip(inputs.tokens, inputs.pattern.lengths.tolist())]
        begins = [[20, 21, 5, 6, 7, 1, 22], *[[20, 21, 1, 22]] * 3]  # caption, none; without caption, twice
        for row, begin in zip(rows, begins, strict=True):
            assert row[: len(begin)] == begin
            assert row[-1] == 23
            assert len(row) == len(begin) + 17
            assert all(token == MASK or 25 <= token < 45 for token in row[len(begin) : -1])


def test_without_guidance_there_is_one_row_an_image() -> None:
    engine, *_ = recorded([[5], [6]], steps=2, cfg_scale=0.0)
    assert [inputs.tokens.shape for inputs in engine.inputs] == [(2, 22)] * 2


@pytest.mark.parametrize(
    ("num_tokens", "steps", "counts"),
    [
        (1024, 15, [6, 17, 28, 38, 49, 58, 68, 75, 84, 89, 96, 100, 104, 105, 107]),
        (256, 12, [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]),
        (16, 6, [1, 2, 2, 3, 4, 4]),
    ],
)
def test_mmada_s_commits(num_tokens: int, steps: int, counts: list[int]) -> None:
    assert [step.count for step in COMMIT_SCHEDULES["cosine"](num_tokens, steps, 0.0)] == counts


def test_how_confidence_temperature_falls() -> None:
    product = [round(CONFIDENCE_SCHEDULES["product"](step, 15), 3) for step in range(1, 11)]
    assert product == [0.933, 0.809, 0.647, 0.475, 0.316, 0.190, 0.101, 0.047, 0.019, 0.006]
    assert CONFIDENCE_SCHEDULES["product"](15, 15) == CONFIDENCE_SCHEDULES["linear"](15, 15) == 0.0
    assert CONFIDENCE_SCHEDULES["linear"](3, 15) == 0.8


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"vocabulary": VOCABULARY}, "how many tokens an image has is not known; say it: image.num_tokens=256"),
        ({"num_tokens": 16}, "'image.vocabulary' has ids up to 134540, the model 61: it knows no images"),
        (
            {"vocabulary": VOCABULARY.model_copy(update={"num_codes": 36}), "num_tokens": 16},
            "the mask's id, 60, is one of an image code in 'image.vocabulary'",
        ),
    ],
)
def test_runs_that_cannot_make_images(image: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(small_config(tmp_path, image=image), message)


def test_autoregressive_runs_cannot_make_images(tmp_path: Path) -> None:
    config = small_config(tmp_path, model={"attention": "causal"}, image={"vocabulary": VOCABULARY, "num_tokens": 16})
    refused(config, "images are denoised, which this run's model, which sees only what comes before, cannot do")


def refused(config: RunConfig, message: str) -> None:
    with pytest.raises(UserError) as error:
        ImageTokens.of(config, SPECIAL)
    assert str(error.value) == message
