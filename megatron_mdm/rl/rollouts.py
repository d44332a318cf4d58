"""A rollout: completions with their rewards and all that the updates on them need. One file format for recording,
replaying and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import Bools

Ints = NDArray[np.int64]

ROLLOUTS = "rollouts"  # a run's folder of recorded ones, and of samples.jsonl


def nothing() -> Floats:
    return np.zeros(0)


@dataclass(frozen=True)
class Rollout:
    """B·G completions, group by group: completion c is of prompt c // G. The same on every rank.

    Values are those of rl/estimators.py, of tokens or of rows, 0 behind the last.
    """

    number: Ints  # [] counted from 0
    rows: Ints  # [B]: of the data set
    prompt_lengths: Ints  # [B]
    prompts: Ints  # [Σ prompt_lengths]: token ids, one prompt after another
    tokens: Ints  # [B·G, L]
    denoising_steps: Ints  # [B·G]
    lengths: Ints  # [B·G]: tokens up to and with the first end; L without one
    truncated: Bools  # [B·G]: no end
    scores: Floats  # [B·G, F]: each reward function's; NaN: not applicable
    rewards: Floats  # [B·G]: their weighted sum
    advantages: Floats  # [B·G]
    t: Floats  # [μ, B·G, repeats]: mask rates of the updates, by the density in force when it began …
    weight: Floats  # [μ, B·G, repeats]: … and importance weights
    old: Floats = field(
        default_factory=nothing
    )  # [μ, B·G, L]: values of the weights that drew the completions; empty: not measured yet
    reference: Floats = field(
        default_factory=nothing
    )  # [μ, B·G, L]: values of the reference; empty: not measured yet, or not wanted

    @property
    def num_groups(self) -> int:
        return len(self.rows)

    @property
    def group_size(self) -> int:
        return len(self.tokens) // len(self.rows)

    def prompt_of_group(self, group: int) -> Ints:
        end = int(self.prompt_lengths[: group + 1].sum())
        return self.prompts[end - int(self.prompt_lengths[group]) : end]

    def prompt_of(self, completion: int) -> Ints:
        return self.prompt_of_group(completion // self.group_size)

    def with_updates(self, advantages: Floats, t: Floats, weight: Floats) -> Rollout:
        """With what its updates are to be, and no values."""
        return replace(self, advantages=advantages, t=t, weight=weight, old=nothing(), reference=nothing())

    def with_values(self, old: Floats, reference: Floats) -> Rollout:
        return replace(self, old=old, reference=reference)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """For a file: np.savez and of() are each other's inverse."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Rollout:
        return cls(**{part.name: arrays[part.name] for part in fields(cls)})


def path_of(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def record(rollout: Rollout, folder: Path) -> None:
    """Write a rollout into a folder of recorded ones. Raises UserError where the disk refuses it."""
    path = path_of(folder, int(rollout.number))
    temporary = path.with_suffix(".tmp.npz")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = rollout.arrays()
        np.savez(temporary, **arrays)
        temporary.rename(path)
    except OSError as error:
        raise UserError(
            f"{path}: a rollout cannot be recorded ({error.strerror}); make room, or set 'rl.record' false"
        ) from None


def recorded(folder: Path, number: int) -> Rollout:
    """A rollout that was recorded. Raises UserError where there is none, or none that can be read."""
    path = path_of(folder, number)
    try:
        with np.load(path, allow_pickle=False) as file:
            return Rollout.of(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recorded rollout ('rl.replay'); shorten 'schedule', or record more") from None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: not a recorded rollout ({' '.join(str(error).split())})") from None
