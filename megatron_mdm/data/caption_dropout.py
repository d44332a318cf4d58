"""Dropout of captions: which images training shows without theirs, so that the model learns them by themselves, too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.sections.image import ImageVocabulary
from megatron_mdm.diffusion.randomness import Purpose, stream


@dataclass(frozen=True)
class CaptionDropout:
    """MMaDA's cond_dropout_prob: a function of (seed, step, position in the global batch)."""

    share: float  # of the images
    vocabulary: ImageVocabulary
    seed: int

    def drops(self, step: int, size: int) -> NDArray[np.bool_]:
        """By position in a global batch of this size [n]: whether an image there has no caption at this step."""
        return stream(self.seed, Purpose.CAPTION_DROPOUT, step).random(size) < self.share
