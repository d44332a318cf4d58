"""The section `image`: a run on captions and images; the ids of a row of both."""

from __future__ import annotations

import math

from pydantic import Field, field_validator, model_validator

from megatron_mdm.config.sections.section import Section


class ImageVocabulary(Section):
    """A row is task, bos, caption …, eos, image_begin, codes …, image_end. The defaults are MMaDA-8B's: reserved ids of
    LLaDA's tokenizer, and image codes behind its last id, 126,348."""

    task: int = Field(default=126_088, ge=0)  # <|t2i|>
    bos: int = Field(default=126_080, ge=0)
    eos: int = Field(default=126_081, ge=0)
    image_begin: int = Field(default=126_084, ge=0)  # <|soi|>
    image_end: int = Field(default=126_085, ge=0)  # <|eoi|>
    first_id: int = Field(default=126_349, ge=0)  # of image code 0
    num_codes: int = Field(default=8192, gt=0)
    # Places behind the task token: bos, the caption's tokens, eos. Longer captions are cut before eos.
    caption_tokens: int = Field(default=512, gt=2)

    @model_validator(mode="after")
    def _codes_apart(self) -> ImageVocabulary:
        for name in ("task", "bos", "eos", "image_begin", "image_end"):
            if self.first_id <= getattr(self, name) < self.num_ids:
                raise ValueError(f"{name} {getattr(self, name)} is the id of an image code")
        return self

    @property
    def num_ids(self) -> int:
        """Rows that a model's table needs: up to the last image code."""
        return self.first_id + self.num_codes

    @classmethod
    def behind(cls, num_ids: int, eos: int, num_codes: int) -> ImageVocabulary:
        """For a model from scratch: everything but eos gets an id behind the tokenizer's."""
        task, bos, image_begin, image_end, first_id = range(num_ids, num_ids + 5)
        return cls(
            task=task,
            bos=bos,
            eos=eos,
            image_begin=image_begin,
            image_end=image_end,
            first_id=first_id,
            num_codes=num_codes,
        )


class ImageConfig(Section):
    """Text to image: whose codes the image tokens are, and where they stand in the vocabulary."""

    # Folder of the image tokenizer. Training on codes does without it; pictures are made with it.
    tokenizer: str = ""
    # Its fingerprint, which the rows of training carry; empty: the rows did not say. Others are refused.
    made_by: str = ""
    vocabulary: ImageVocabulary = ImageVocabulary()
    num_tokens: int = Field(default=0, ge=0)  # of an image, a square number; 0: not said, though generation has to know
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)  # share of samples that training shows without caption
    # Captions, as JSON lines or a line of text each: 16 of them are drawn at validations, to samples/; empty: none
    preview: str = ""

    @field_validator("num_tokens")
    @classmethod
    def _square(cls, value: int) -> int:
        if math.isqrt(value) ** 2 != value:
            raise ValueError("must be a square number: images are squares")
        return value

    @property
    def is_used(self) -> bool:
        """Whether the run says anything about images."""
        return self != ImageConfig()
