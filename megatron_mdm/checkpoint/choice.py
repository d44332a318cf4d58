"""Which of a run's checkpoints is meant: the best by validation loss, the newest, or that of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_mdm.checkpoint.store import first_intact, read_state, steps, validation_loss
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext

AUTO = "auto"
BEST = "best"
NEWEST = "newest"
CHOICES = "best (validation loss), newest, or a step's number; auto: best where the run keeps it, else newest"


class Choice(NamedTuple):
    path: Path
    reason: str  # for a person

    def __str__(self) -> str:
        return f"{self.path.name}, {self.reason}"


def choose(run_folder: Path, wish: str = AUTO) -> Choice:
    """The intact checkpoint that a wish names.

    auto is best for a run whose `checkpoint.keep_best` holds, as it does after early stopping unless it was switched
    off: what Hugging Face's trainer calls load_best_model_at_end. Where no checkpoint has a validation loss, or the run
    keeps no best one, it is newest. A damaged one is named and the next best (newest) taken. Raises UserError where
    there is none.
    """
    found = steps(run_folder / "checkpoints")
    losses = {path: validation_loss(path) for path in found}
    validated = [path for path in found if losses[path] < math.inf]
    keeps_best = load_config(run_folder / "config.yaml").checkpoint.keep_best is True
    if wish == BEST and not validated:
        raise UserError(f"{run_folder}: no checkpoint has a validation loss; take the newest, or name a step")
    if wish == BEST or (wish == AUTO and keeps_best and validated):
        path = _intact(run_folder, sorted(validated, key=lambda path: losses[path]))
        return Choice(path, _why_best(losses[path], found[-1]))
    if wish in (AUTO, NEWEST):
        return Choice(_intact(run_folder, found[::-1]), "the newest")
    named = [path for path in found if _step(path.name) == _step(wish)]
    if not named:
        there = ", ".join(_step(path.name) for path in found) or "none yet"
        raise UserError(f"{run_folder}: no checkpoint '{wish}'; {BEST}, {NEWEST}, or a step of: {there}")
    return Choice(_intact(run_folder, named), "as asked for")


def choose_together(run_folder: Path, wish: str, context: ParallelContext) -> Choice:
    """What the main rank, which alone reads and checks the files, has chosen, on every rank. Collective."""
    choice = None
    fault = ""
    if context.is_main:
        try:
            choice = choose(run_folder, wish)
        except UserError as error:
            fault = str(error)
    choice, fault = gather_objects((choice, fault), context)[0]
    if choice is None:
        raise UserError(fault)
    return choice


def located(path: Path) -> tuple[Path, str]:
    """(run's folder, wish) of a path to a run, or to one of the checkpoints in it."""
    run = path.parent.parent
    if path.parent.name == "checkpoints" and path.name.startswith("step-") and (run / "config.yaml").is_file():
        return run, path.name
    return path, AUTO


def _step(name: str) -> str:
    return name.removeprefix("step-").lstrip("0") or "0"


def _intact(run_folder: Path, candidates: Sequence[Path]) -> Path:
    path, fault = first_intact(candidates)
    if path is None and fault:
        raise UserError(f"{run_folder}: no intact checkpoint ({candidates[0].name}: {fault}); name another step")
    if path is None:
        raise UserError(f"{run_folder}: the run has no checkpoint yet")
    return path


def _why_best(loss: float, newest: Path) -> str:
    """Why the best checkpoint was chosen, with a word where a better validation was never saved."""
    text = f"the best by validation loss ({loss:.6g}; newest: {newest.name})"
    try:
        train = read_state(newest).get("train", {})
    except (OSError, ValueError):  # damaged; it says nothing
        train = {}
    if train.get("best_validation", math.inf) < loss:
        text += f"; a better one, {train['best_validation']:.6g} after step {train.get('best_step')}, was not saved"
    return text
