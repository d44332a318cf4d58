"""Text to image: masked diffusion of image codes behind their captions, with rows of text beside them where there are.

The settings of noise and loss are those of the section `diffusion`, for all rows alike; what an image row is made of is
in the section `image`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.sections.image import ImageVocabulary
from megatron_mdm.data.caption_dropout import CaptionDropout
from megatron_mdm.data.image_text import first_target, holds_image, suffix
from megatron_mdm.data.sample import Sample
from megatron_mdm.objectives.masked import Masked

if TYPE_CHECKING:  # megatron-core, which reports do without
    from megatron_mdm.data.splits import Dataset


class TextToImage(Masked):
    """Masked, of rows of captions and image codes. Training drops some captions; validation shows them all."""

    def check(self) -> None:
        super().check()
        data = self.config.data
        name = f"'objective.name' {self.options.name}"
        vocabulary = self.config.image.vocabulary
        num_ids = self.config.model.vocab_size
        if data.format != "sft":
            raise UserError(f"'data.format' {data.format} has no captions; {name} needs sft")
        if data.too_long == "truncate":
            raise UserError(f"'data.too_long' truncate would cut images; {name} needs drop or error")
        if data.eos_padding:
            raise UserError(f"'data.eos_padding' would put targets behind images; {name} needs false")
        if isinstance(num_ids, int) and num_ids < vocabulary.num_ids:
            raise UserError(
                f"'model.vocab_size' {num_ids} has no room for the image codes of 'image.vocabulary', which end at id "
                f"{vocabulary.num_ids - 1}; {name} needs {vocabulary.num_ids} ids at least"
            )

    def check_data(self, train: Dataset) -> None:
        """Every row is text, or an image as the section `image` describes it; there are images."""
        super().check_data(train)
        vocabulary = self.config.image.vocabulary
        num_images = 0
        for row, sample in enumerate(train.samples):
            is_image = holds_image(sample, vocabulary)
            num_images += is_image
            if fault := _fault(sample, vocabulary, is_image):
                raise UserError(f"{self._source}: sample {row + 1} {fault}")
        if not num_images:
            raise UserError(
                f"{self._source}: no sample holds an image by 'image.vocabulary' (task token {vocabulary.task}, "
                f"image_begin {vocabulary.image_begin}); make some by mdm prepare task text-to-image, and set "
                "'image.vocabulary' to its vocabulary.json"
            )

    @property
    def _source(self) -> str:
        train = self.config.data.train
        return train if isinstance(train, str) else ", ".join(train)

    @property
    def caption_dropout(self) -> CaptionDropout | None:
        image = self.config.image
        if not image.caption_dropout:
            return None
        return CaptionDropout(image.caption_dropout, image.vocabulary, self.config.seed)


def _fault(sample: Sample, vocabulary: ImageVocabulary, is_image: bool) -> str:
    """What is wrong with a row; empty: nothing."""
    if not is_image:
        if sample.codes_of:
            return "has image codes, but not the ids of 'image.vocabulary' before them; set it as vocabulary.json says"
        return ""
    first = first_target(sample)
    image = sample.tokens[first : first + int(sample.eligible.sum())]
    if not sample.eligible[first : first + len(image)].all():
        return "has targets that are no image: only the image between its begin and its end may be one"
    outside = image[(image < vocabulary.first_id) | (image >= vocabulary.num_ids)]
    if len(outside):
        return (
            f"has the target {outside[0]}, which is no image code ({vocabulary.first_id} to {vocabulary.num_ids - 1})"
        )
    if sample.tokens[first + len(image) :].tolist() != suffix(vocabulary):
        return f"does not end with 'image.vocabulary.image_end' {vocabulary.image_end} behind its image"
    return ""
