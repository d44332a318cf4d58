"""What generation is told: lengths, steps, rules; the special ids; and the engine it asks for logits."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from pydantic import model_validator
from torch import Tensor

from megatron_mdm.config.schema import Section
from megatron_mdm.generation.remask import REMASKING
from megatron_mdm.models.stages import Packet


class LogitsEngine(Protocol):
    def logits(self, packet: Packet) -> Tensor: ...


class GenerationConfig(Section):
    """Autoregressive models use gen_length, temperature, batch_size and seed only."""

    gen_length: int = 128  # response tokens
    block_length: int = 32  # blocks are finished left to right
    steps: int = 128  # denoising steps in all, shared evenly by the blocks
    temperature: float = 0.0
    remasking: str = "low_confidence"
    batch_size: int = 16  # prompts per forward pass and data-parallel rank
    seed: int = 0

    @model_validator(mode="after")
    def _divisible(self) -> GenerationConfig:
        if self.gen_length <= 0 or self.block_length <= 0 or self.gen_length % self.block_length:
            raise ValueError(f"gen_length {self.gen_length} must be a multiple of block_length {self.block_length}")
        if self.steps <= 0 or self.steps % (self.gen_length // self.block_length):
            raise ValueError(
                f"steps {self.steps} must be a multiple of the {self.gen_length // self.block_length} blocks"
            )
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking must be one of {', '.join(REMASKING)}")
        return self


class SpecialIds(NamedTuple):
    mask: int
    pad: int
    eos: int = -1  # −1: none
