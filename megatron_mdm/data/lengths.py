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
        """The model's room. extrapolate: rows may be longer than what the model was trained for."""
        return cls(sys.maxsize if extrapolate else model.max_sequence_length, gen_length)

    def check(self, num_prompt: int, num_behind: int = 0, behind: str = "gen_length") -> None:
        """Raise ValueError where num_prompt tokens of a prompt and what follows them do not fit: gen_length, and
        num_behind others, named by `behind`."""
        num_behind = num_behind or self.gen_length
        if num_prompt + num_behind > self.longest:
            raise ValueError(
                f"{num_prompt} tokens of prompt and {num_behind} of {behind} are {num_prompt + num_behind}, more than "
                f"'model.max_sequence_length' {self.longest}; shorten them, or set extrapolate=true to go beyond what "
                "the model was trained for"
            )


UNLIMITED = Room(sys.maxsize)
