"""Losses and gradients that are infinite or not numbers, and losses far off the others: counted, logged, dumped.

What follows from a spike where `faults.on_spike` is rewind is done by training/rewind.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_mdm.config.files import write_json
from megatron_mdm.parallel.collectives import barrier
from megatron_mdm.training.callbacks.base import Callback, Order, State
from megatron_mdm.training.loop import StepResult, Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import TrainState

FAULTS = "faults.jsonl"
DUMPS = "faults"
_LEAST_LOSSES = 20  # before a spike can be told
_MAD_TO_SIGMA = 1.4826  # a normal distribution's standard deviation per median absolute deviation
_SHOWN_IDS = 8


class Faults(Callback):
    """The engine has skipped the step already, on every rank; see engine/optimizer.py. Lines go to faults.jsonl."""

    name = "faults"
    order = Order.FAULTS

    def __init__(self, trainer: Trainer, metrics: MetricsLog, folder: Path) -> None:
        self.trainer = trainer
        self.metrics = metrics
        self.folder = folder
        self.settings = trainer.config.faults
        self.is_main = trainer.context.is_main
        self.skipped_in_a_row = 0
        self.recent_losses: list[float] = []  # which a spike is judged by

    def state_dict(self) -> State:
        """The recent losses, without the steps skipped in a row: whoever resumes a run that stopped for them wants them
        tried again."""
        return {"recent_losses": self.recent_losses}

    def load_state_dict(self, saved: State) -> None:
        self.recent_losses = saved["recent_losses"]

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if result.is_skipped:
            self._skipped(state, result)
            return
        self.skipped_in_a_row = 0
        if self.settings.spike_score:
            self._watch(state, result)

    def _skipped(self, state: TrainState, result: StepResult) -> None:
        state.num_skipped += 1
        if self.trainer.config.precision.dtype == "fp16" and np.isfinite(result.loss):
            return  # the loss scale was too large, as it is at times by design; it has been lowered
        self.skipped_in_a_row += 1
        suspects = result.sample_ids[~np.isfinite(result.sample_loss)]
        ids = suspects if len(suspects) else result.sample_ids  # only the gradient is at fault: any of them
        self._log(state.step, "skipped", result, {"sample_ids": ids.tolist(), "in_a_row": self.skipped_in_a_row})
        self.metrics.write(state.step, {"skipped_steps": state.num_skipped})
        if self.skipped_in_a_row >= self.settings.max_skipped_in_a_row:
            dump = self.folder / DUMPS / f"step-{state.step:08d}"
            write_batch(self.trainer, result, state.skipped_batches, dump)
            state.stop_reason = f"{self.skipped_in_a_row} steps in a row were skipped"
            state.failure = (
                f"step {state.step}: loss or gradient was infinite or not a number in {self.skipped_in_a_row} steps "
                f"in a row ('faults.max_skipped_in_a_row'); weights are those before them; last batch: {dump}"
            )

    def _watch(self, state: TrainState, result: StepResult) -> None:
        score = robust_score(result.loss, self.recent_losses)
        if score > self.settings.spike_score:
            worst = np.argsort(-result.term)[:_SHOWN_IDS]
            self._log(state.step, "spike", result, {"score": score, "sample_ids": result.sample_ids[worst].tolist()})
            self.metrics.write(state.step, {"loss_spike_score": score})
            state.rewinding = self.settings.on_spike == "rewind" and state.num_rewinds < self.settings.max_rewinds
        self.recent_losses = [*self.recent_losses, result.loss][-self.settings.spike_window :]

    def _log(self, step: int, kind: str, result: StepResult, more: dict[str, Any]) -> None:
        if not self.is_main:
            return
        record = {"step": step, "kind": kind, "loss": str(result.loss), "grad_norm": str(result.grad_norm), **more}
        ids = more["sample_ids"]
        shown = ", ".join(map(str, ids[:_SHOWN_IDS])) + (", …" if len(ids) > _SHOWN_IDS else "")
        tqdm.write(
            f"warning: step {step} {_WORDS[kind]}: loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}; "
            f"samples {shown}",
            file=sys.stderr,
        )
        append_fault(self.folder, record)


def append_fault(folder: Path, record: dict[str, Any]) -> None:
    """A line of the run's faults.jsonl; a disk that refuses it costs a line on the screen."""
    try:
        with (folder / FAULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        tqdm.write(f"error: {folder / FAULTS} cannot be written ({error.strerror})", file=sys.stderr)


_WORDS = {"skipped": "was skipped", "spike": "has an unusual loss"}


def robust_score(loss: float, before: list[float]) -> float:
    """The robust standard deviations by which a loss is above the median of those before; 0 while they are few."""
    if len(before) < _LEAST_LOSSES:
        return 0.0
    median = float(np.median(before))
    spread = _MAD_TO_SIGMA * float(np.median(np.abs(np.array(before) - median)))
    return (loss - median) / max(spread, np.finfo(np.float64).eps * max(1.0, abs(median)))


def write_batch(trainer: Trainer, result: StepResult, skipped_batches: int, folder: Path) -> None:
    """The inputs of a step as the engine got them, a file for each data-parallel rank, and what they were made of. The
    tensors of micro-batch i are named i/…; ModelInputs.from_tensors reads them.

    Collective. A disk that refuses them costs a line only: batch.json's step and the configuration make them again.
    """
    context = trainer.context
    micro_batches = trainer.source.prepare(result.step).micro_batches  # collective: not where a disk may refuse
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if context.tensor_rank == 0 and context.pipeline_rank == 0:
            tensors = {}
            for index, inputs in enumerate(micro_batches):
                for name, tensor in inputs.as_tensors().items():
                    tensors[f"{index}/{name}"] = tensor.clone().contiguous()
            save_file(tensors, folder / f"data-rank-{context.data_rank:03d}.safetensors")
        if context.is_main:
            content = {
                "step": result.step,  # counted from 0: the argument of the loader and of the noise
                "skipped_batches": skipped_batches,
                "seed": trainer.config.seed,
                "lr": result.lr,
                "sample_ids": result.sample_ids.tolist(),
                "t": result.t.tolist(),
                "sample_loss": [str(loss) for loss in result.sample_loss],
            }
            write_json(folder / "batch.json", content)
    except Exception as error:  # OSError, or the safetensors library's own
        tqdm.write(f"error: {folder} cannot be written ({error})", file=sys.stderr)
    barrier()
