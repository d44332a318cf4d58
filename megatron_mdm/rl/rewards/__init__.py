"""Rewards of completions: those of a run, together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.schema import RlConfig
from megatron_mdm.data.json_files import Record
from megatron_mdm.rl.rewards.function import Batch, scores
from megatron_mdm.rl.rewards.limited import Limited
from megatron_mdm.rl.rewards.load import load, short_name
from megatron_mdm.rl.rewards.table import REWARDS

Floats = NDArray[np.float64]


class Rewards:
    """All reward functions of a run. They are pure, run on the CPU, and know no ranks: what is raised here is raised on
    the rank whose completions these are."""

    def __init__(self, rl: RlConfig) -> None:
        self.weights = np.array([reward.weight for reward in rl.rewards])
        self.names = _distinct([short_name(reward.name) for reward in rl.rewards])  # for metrics
        self.functions: list[Callable[[Batch], list[float]]] = [
            Limited(reward, rl.task) if reward.timeout else partial(scores, reward.name, load(reward, rl.task))
            for reward in rl.rewards
        ]

    @classmethod
    def of(cls, rl: RlConfig) -> Rewards:
        """Find and load them. Raises UserError naming the function, and what is wrong."""
        return cls(rl)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        *,
        tokens: Sequence[Sequence[int]] = (),
        steps: Sequence[int] = (),
        truncated: Sequence[bool] = (),
    ) -> Floats:
        """Scores [n, functions] of n completions; NaN where a function does not apply.

        columns: of the records, by name, one value a completion. tokens, steps, truncated: a completion's token ids,
        its denoising steps, whether it has no end; a function whose signature names them is given them.
        Raises UserError naming the function and the record where one raises, takes too long, or gives what is no score.
        """
        further: Mapping[str, Sequence[Any]] = {"tokens": tokens, "steps": steps, "truncated": truncated}
        given = {name: values for name, values in further.items() if len(values) == len(completions)}
        batch = Batch(list(prompts), list(completions), columns, given)
        values = np.full((len(completions), len(self.functions)), np.nan)
        if completions:
            for place, function in enumerate(self.functions):
                values[:, place] = function(batch)
        return values

    def total(self, values: Floats) -> Floats:
        """The weighted sum [n] of scores [n, functions] over the functions that apply; 0 where none does."""
        return np.asarray(np.nansum(values * self.weights, axis=1), dtype=np.float64)

    def close(self) -> None:
        """End the processes of functions with a time limit."""
        for function in self.functions:
            if isinstance(function, Limited):
                function.close()


def check_records(rl: RlConfig, records: Sequence[Record]) -> None:
    """Raise UserError naming the first record whose columns a function of our own cannot use: before anything is
    trained, and not when the record's turn comes."""
    batch = Batch([""] * len(records), [""] * len(records), columns_of(records), {})
    for reward in rl.rewards:
        if reward.name in REWARDS:
            scores(reward.name, load(reward, rl.task), batch)


def columns_of(records: Sequence[Record]) -> dict[str, list[Any]]:
    """A list of values for each column that any record has; None where a record lacks it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, of which a further one of the same is numbered."""
    found: list[str] = []
    for name in names:
        number = sum(other == name for other in names[: len(found)])
        found.append(f"{name}_{number + 1}" if number else name)
    return found
