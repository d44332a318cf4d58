"""Padded, bucketed and packed training of one model on one data file: useful tokens per second, interleaved in one run.

python -m tools.benchmarks batching --data gsm8k/train.jsonl --tokenizer gpt2.json --eos "<|endoftext|>"

Useful tokens are those of the samples; padding does not count. The step is the real one: collation, noising, forward,
backward, clipping, AdamW. Every mode trains on the same global batches. Runs on CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mdm.parallel import platform

platform.quiet_libraries()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_mdm.config.files import write_json  # noqa: E402
from megatron_mdm.config.schema import RunConfig  # noqa: E402
from megatron_mdm.data.batching import computed_tokens, cut  # noqa: E402
from megatron_mdm.data.loader import PrefetchLoader  # noqa: E402
from megatron_mdm.engine.build import build_engine  # noqa: E402
from megatron_mdm.engine.inputs import InputLayout  # noqa: E402
from megatron_mdm.engine.zero import ZeroEngine  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402
from megatron_mdm.training.build import build_trainer  # noqa: E402
from megatron_mdm.training.inputs import resolve  # noqa: E402
from megatron_mdm.training.loop import StepResult, Trainer  # noqa: E402
from tools.benchmarks.cases import source_of  # noqa: E402
from tools.benchmarks.measure import compare, interleaved, machine_info  # noqa: E402

CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}  # cpu: with one thread, on a machine that others use, too
TARGET = 1.4  # useful tokens per second, packed or bucketed / padded to the batch maximum
SAME_LOSS = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of the first step


def configuration(arguments: argparse.Namespace, batch: dict[str, Any]) -> RunConfig:
    sections = {
        "model": {
            "num_layers": arguments.layers,
            "hidden_size": arguments.hidden,
            "num_heads": arguments.hidden // 64,
            "num_kv_heads": arguments.hidden // 64,
            "ffn_hidden_size": 3 * arguments.hidden,
            "max_sequence_length": 512,
        },
        "data": {
            "train": arguments.data,
            "tokenizer": arguments.tokenizer,
            "eos_token": arguments.eos,
            "max_length": 512,
        },
        "parallel": {"zero": 0},
        "batch": {"global_size": arguments.global_size, "micro_size": arguments.micro_size, **batch},
        "optimizer": {"lr": 1e-4},
        "schedule": {"name": "constant", "steps": 10**6},
        "precision": {"dtype": arguments.dtype},
        "checkpoint": {"directory": "unused"},
    }
    return RunConfig.model_validate(sections)


def trainers(arguments: argparse.Namespace) -> dict[str, Trainer]:
    """One for each mode; all share an engine."""
    base, data = resolve(configuration(arguments, {}))
    context = initialize()
    torch.set_num_threads(arguments.threads)
    engine = build_engine(base, context)
    result: dict[str, Trainer] = {}
    for mode in ("padded", "bucketed", "packed"):
        config = base.model_copy(update={"batch": configuration(arguments, {"mode": mode}).batch})
        result[mode] = build_trainer(config, data, engine, None, context)
    return result


def step_of(trainer: Trainer) -> Callable[[int], StepResult]:
    def train_step(step: int) -> StepResult:
        engine_of(trainer).input_layout = InputLayout.of(trainer.config)
        return trainer.train_step(step)

    return train_step


def engine_of(trainer: Trainer) -> ZeroEngine:
    assert isinstance(trainer.engine, ZeroEngine)
    return trainer.engine


def check_losses(modes: dict[str, Trainer], tolerance: float) -> None:
    """The same micro-batches' losses without a step in between, whatever the mode."""
    losses = {}
    for mode, trainer in modes.items():
        engine_of(trainer).input_layout = InputLayout(pack=mode == "packed")
        batch = source_of(trainer).loader.batch(0)
        noised = [source_of(trainer).noise(micro_batch, 0) for micro_batch in batch.micro_batches]
        objective = source_of(trainer).objective
        weights = [objective.normalization(micro, batch.global_batch) for micro in noised]
        rows = trainer.engine.evaluate([objective.inputs(*pair) for pair in zip(noised, weights)])
        losses[mode] = sum(float((row.loss * weight.row).sum()) for row, weight in zip(rows, weights))
    for loss in losses.values():
        assert abs(loss / losses["padded"] - 1) < tolerance, losses


def efficiency(trainer: Trainer, num_steps: int) -> float:
    """Useful tokens / tokens that the model sees, over the first steps."""
    loader = source_of(trainer).loader
    batch = trainer.config.batch
    assert isinstance(loader, PrefetchLoader)
    loader = loader.loader
    useful = 0
    computed = 0
    for step in range(num_steps):
        lengths = loader.lengths[loader.sample_ids(step)]
        useful += int(lengths.sum())
        computed += sum(computed_tokens(lengths, part, batch.mode) for part in cut(lengths, batch, 1, 1))
    return useful / computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL of samples, as in training")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--eos", default="</s>", help="the tokenizer's end token")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--global-size", type=int, default=32)
    parser.add_argument("--micro-size", type=int, default=8)
    parser.add_argument("--dtype", default="bf16", choices=list(SAME_LOSS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: the process's own time")
    parser.add_argument("--output", default="", help="JSON file for the results")
    arguments = parser.parse_args()
    modes = trainers(arguments)
    check_losses(modes, SAME_LOSS[arguments.dtype])
    steps = {mode: step_of(trainer) for mode, trainer in modes.items()}
    seconds = interleaved(steps, arguments.repeats, "batching", CLOCKS[arguments.clock])
    tokens = [source_of(modes["padded"]).loader.batch(2 + step).num_tokens for step in range(arguments.repeats)]
    rows: dict[str, Any] = {}
    ratio = partial(compare, slow=seconds["padded"], bound=">=")
    for mode in modes:
        rows[mode] = {
            "useful_tokens_per_second": float(np.median(np.array(tokens) / np.array(seconds[mode]))),
            "padding_efficiency": efficiency(modes[mode], 100),
            "against_padded": ratio(mode, fast=seconds[mode], target=None if mode == "padded" else TARGET),
        }
        row = rows[mode]
        print(
            f"{mode:<10}{row['useful_tokens_per_second']:>9.0f} useful tokens/s, padding efficiency "
            f"{row['padding_efficiency']:.3f}, {row['against_padded']['ratio']:.2f} × padded"
        )
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        write_json(Path(arguments.output), {"machine": machine_info(), "settings": settings, "modes": rows})
