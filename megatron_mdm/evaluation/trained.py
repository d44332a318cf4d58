"""What evaluation has to know of the objective that a model was trained for."""

from __future__ import annotations

from typing import Protocol

from megatron_mdm.evaluation.likelihood import Scoring
from megatron_mdm.generation.generate import Decoder


class TrainedFor(Protocol):
    @property
    def decoder(self) -> Decoder:
        """How the model answers prompts."""
        ...

    @property
    def scoring(self) -> Scoring:
        """How its likelihoods are measured."""
        ...
