"""What the generation of images is told: steps, guidance, how much chance; which tokens an image is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_mdm.batch import IdRange
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig, RunConfig, Section
from megatron_mdm.config.sections.image import ImageVocabulary
from megatron_mdm.data.image_text import suffix
from megatron_mdm.data.lengths import Room
from megatron_mdm.generation.remask import COMMIT_SCHEDULES
from megatron_mdm.generation.settings import SpecialIds


def product(step: int, num_steps: int) -> float:
    """MMaDA's, which multiplies the temperature of the step before: Π (1 − j/steps) over j = 1 … step."""
    result = 1.0
    for earlier in range(1, step + 1):
        result *= 1.0 - earlier / num_steps
    return result


def linear(step: int, num_steps: int) -> float:
    """MaskGIT's: 1 − step/steps."""
    return 1.0 - step / num_steps


# (step from 1 on, steps) → what confidence_temperature is multiplied by
CONFIDENCE_SCHEDULES: dict[str, Callable[[int, int], float]] = {"product": product, "linear": linear}


class ImageSampling(Section):
    """MMaDA's defaults (inference_t2i.py): 15 steps, guidance 3.5, the cosine law."""

    steps: int = Field(default=15, gt=0)  # forward passes of an image
    schedule: str = "cosine"  # how many tokens each step commits: cosine, linear, epsilon
    eps: float = Field(default=1e-3, gt=0.0, lt=1.0)  # of schedule epsilon: the last step's time
    cfg_scale: float = Field(default=3.5, ge=0.0)  # classifier-free guidance w: (1 + w)·l_caption − w·l_without
    # Of a token's value: 1 draws from the model's softmax, 0 takes the most likely one, which makes images flat.
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)  # draw from the fewest tokens that hold this probability; 1: all
    top_k: int = Field(default=0, ge=0)  # draw from so many most likely tokens; 0: all
    # τ of the order in which tokens are committed: ln p + τ · Gumbel; it falls with the steps. 0: by probability alone
    confidence_temperature: float = Field(default=1.0, ge=0.0)
    confidence_schedule: str = "product"  # how τ falls: product (MMaDA), linear (MaskGIT)
    images_per_caption: int = Field(default=1, gt=0)
    extrapolate: bool = False  # let caption and image be longer than model.max_sequence_length
    batch_size: int = Field(
        default=8, gt=0
    )  # images per forward pass and data-parallel rank; guidance doubles the rows
    noise: Literal["host", "device"] = "host"  # where random numbers are made, as of text (settings.py)
    seed: int = 0

    @model_validator(mode="after")
    def _known(self) -> ImageSampling:
        for name, table in (("schedule", COMMIT_SCHEDULES), ("confidence_schedule", CONFIDENCE_SCHEDULES)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}")
        return self

    def room(self, model: ModelConfig, image: ImageTokens) -> Room:
        """What a prefix and the image behind it may be together."""
        return Room.of(model, self.extrapolate, image.number + len(suffix(image.vocabulary)))


class ImageTokens(NamedTuple):
    """What an image of a run is made of."""

    vocabulary: ImageVocabulary
    number: int  # N

    @property
    def ids(self) -> IdRange:
        return self.vocabulary.first_id, self.vocabulary.num_codes

    @classmethod
    def of(cls, config: RunConfig, special: SpecialIds) -> ImageTokens:
        """A run's. Raises UserError where its model cannot denoise, where it does not say how many, or
        where they are not all of its model."""
        vocabulary, number = config.image.vocabulary, config.image.num_tokens
        if config.model.attention != "bidirectional":
            raise UserError("images are denoised, which this run's model, which sees only what comes before, cannot do")
        if not number:
            raise UserError("how many tokens an image has is not known; say it: image.num_tokens=256")
        num_ids = int(config.model.vocab_size)
        highest = max(vocabulary.num_ids - 1, vocabulary.task, vocabulary.bos, vocabulary.eos, *_marks(vocabulary))
        if highest >= num_ids:
            raise UserError(f"'image.vocabulary' has ids up to {highest}, the model {num_ids}: it knows no images")
        if vocabulary.first_id <= special.mask < vocabulary.num_ids:
            raise UserError(f"the mask's id, {special.mask}, is one of an image code in 'image.vocabulary'")
        return cls(vocabulary, number)


def _marks(vocabulary: ImageVocabulary) -> tuple[int, int]:
    return vocabulary.image_begin, vocabulary.image_end
