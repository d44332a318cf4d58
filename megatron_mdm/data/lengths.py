"""How long a prompt and what follows it may be together."""

from __future__ import annotations

import sys
from typing import NamedTuple

from megatron_mdm.config.schema import ModelConfig


class Room(NamedTuple):
    """The tokens that a model has room for."""

    longest: int  # prompt and what follows it
    gen_length: int = 0  # of a response to be generated

    @classmethod
    def of(cls, model: ModelConfig, extrapolate: bool, gen_length: int = 0) -> Room:
        """extrapolate: rotary positions go on beyond what the model was trained for, and so may a row."""
        return cls(sys.maxsize if extrapolate else model.max_sequence_length, gen_length)

    def check(self, num_prompt: int, num_behind: int = 0, behind: str = "gen_length") -> None:
        """For a prompt of so many tokens and its response, or others behind it, by what they are. Raises ValueError
        where they do not fit."""
        num_behind = num_behind or self.gen_length
        if num_prompt + num_behind > self.longest:
            raise ValueError(
                f"{num_prompt} tokens of prompt and {num_behind} of {behind} are {num_prompt + num_behind}, more than "
                f"'model.max_sequence_length' {self.longest}; shorten them, or set extrapolate=true to go beyond what "
                "the model was trained for"
            )


UNLIMITED = Room(sys.maxsize)
