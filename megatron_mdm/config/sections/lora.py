"""The section `model.lora`: low-rank adapters beside frozen weights (Hu et al., LoRA, 2021)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from megatron_mdm.config.sections.section import Section

# Every linear map of a layer: what PEFT calls all-linear.
ALL_LINEAR = ("query", "key", "value", "output", "gate", "up", "down")


class LoraConfig(Section):
    """W + scaling · B·A in place of each target W: A and B are trained, all else is frozen."""

    rank: int = Field(default=0, ge=0)  # columns of B, rows of A; 0: no adapters, everything is trained
    alpha: float = Field(default=16.0, gt=0)  # the scaling is alpha / rank
    rslora: bool = False  # alpha / √rank instead (rank-stabilised LoRA, Kalajdzievski 2023)
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of what A reads, in training passes; see models/README.md
    # query, key, value, output, gate, up, down, embedding, head, or a family's names (q_proj, attn_out, …); all-linear:
    # those of the layers. Each target of a fused matrix has an adapter of its own, as in PEFT.
    targets: tuple[str, ...] = ALL_LINEAR
    # First adapters: a folder of PEFT's, or a run's with the same rank and targets; empty: new ones.
    init_from: str = ""
    # How the frozen matrices of the layers are kept: model, in the type that the model trains in; nf4, in 4 bits
    # (QLoRA, Dettmers et al. 2023), by bitsandbytes where it is installed; with ZeRO 0 to 2.
    base: Literal["model", "nf4"] = "model"

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @field_validator("targets", mode="before")
    @classmethod
    def _alone(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("targets")
    @classmethod
    def _written_out(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one matrix, or all-linear")
        others = tuple(name for name in value if name != "all-linear")
        return (*ALL_LINEAR, *others) if "all-linear" in value else value
