"""What a step waits for before the device has work: batches, noise and packing, on the main thread or a step ahead.

python -m tools.benchmarks host --rate 500000

A GPU is not needed: a step of the device is a sleep of the step's tokens over --rate, in which the main thread, as on
CUDA, waits; its gradient's norm ends it. The host's work is the real one: collation, noise, weights, packing. Noise
alone, by tokens a second, is measured beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from megatron_mdm.parallel import platform

platform.quiet_libraries()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_mdm.config.files import write_json  # noqa: E402
from megatron_mdm.config.schema import RunConfig  # noqa: E402
from megatron_mdm.data.loader import PrefetchLoader, TrainLoader  # noqa: E402
from megatron_mdm.data.sample import Sample  # noqa: E402
from megatron_mdm.data.sft import SftDataset  # noqa: E402
from megatron_mdm.engine.inputs import InputLayout  # noqa: E402
from megatron_mdm.objectives import objective_of  # noqa: E402
from megatron_mdm.parallel.groups import ParallelContext, initialize  # noqa: E402
from megatron_mdm.training.source import SupervisedSource  # noqa: E402
from tools.benchmarks.cases import MASK_ID, NUM_SPECIAL, PAD_ID, SEED, Case, Method  # noqa: E402
from tools.benchmarks.measure import machine_info  # noqa: E402

VOCAB = 126_464
CASES = {4096: 64, 300: 512}  # tokens of a sample: samples of a global batch


def configuration(length: int, views: int) -> RunConfig:
    """Only data, batch and noise matter: no model is built."""
    case = Case("host", VOCAB, "fp32", "equal", CASES[length], CASES[length] // 8)
    config = case.config(0)
    return config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"mode": "packed"}),
            "diffusion": Method(views=views, strata="full").diffusion(),
        }
    )


def sources(config: RunConfig, length: int, context: ParallelContext) -> dict[str, SupervisedSource]:
    """Of the same batches, prepared when they are wanted, and a step ahead."""
    generator = np.random.default_rng(SEED)
    samples = [
        Sample.of(generator.integers(NUM_SPECIAL, VOCAB, length, dtype=np.int32), 0)
        for _ in range(2 * config.batch.global_size)
    ]
    result = {}
    layouts = {"when wanted": None, "a step ahead": InputLayout.of(config)}
    for name, layout in layouts.items():
        loader = TrainLoader(
            SftDataset(samples, 0, "random"),
            batch=config.batch,
            views=config.diffusion.rows_per_sample,
            data_rank=0,
            data_size=1,
            pad_id=PAD_ID,
            seed=SEED,
        )
        objective = objective_of(config)
        noise = objective.noise(np.empty(0), MASK_ID)
        result[name] = SupervisedSource(context, PrefetchLoader(loader), objective, noise, layout)
    return result


def before_the_first_kernel(source: SupervisedSource, layout: InputLayout, seconds: float, num_steps: int) -> float:
    """Median seconds of a step in which the device has no work yet. seconds: of the device's work in a step."""
    waits = []
    for step in range(num_steps + 2):
        began = time.perf_counter()
        prepared = source.prepare(step)
        for inputs in prepared.micro_batches:
            layout(inputs)  # the engine's part
        waits.append(time.perf_counter() - began)
        time.sleep(seconds)
    return float(np.median(waits[2:]))


def noise_rate(source: SupervisedSource, num_steps: int) -> float:
    """Tokens of samples a second, on one thread: every view of a token counts once."""
    tokens = 0
    seconds = 0.0
    for step in range(num_steps):
        batch = source.loader.batch(step)
        began = time.perf_counter()
        for micro_batch in batch.micro_batches:
            source.noise(micro_batch, step)
        seconds += time.perf_counter() - began
        tokens += batch.num_tokens
    return tokens / seconds


def measure(length: int, views: int, rate: float, num_steps: int, context: ParallelContext) -> dict[str, Any]:
    config = configuration(length, views)
    layout = InputLayout.of(config)
    seconds = CASES[length] * length * views / rate
    both = sources(config, length, context)
    waits = {name: before_the_first_kernel(source, layout, seconds, num_steps) for name, source in both.items()}
    return {
        "length": length,
        "views": views,
        "device_seconds": seconds,
        "noise_tokens_per_second": noise_rate(both["when wanted"], num_steps),
        "seconds": waits,
        "share": {name: wait / (wait + seconds) for name, wait in waits.items()},
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['length']:>5} tokens, {result['views']} view{'s' * (result['views'] > 1)}: noise "
        f"{result['noise_tokens_per_second'] / 1e6:.2f} M tokens/s; the device's step {result['device_seconds']:.3f} s"
    )
    for name, share in result["share"].items():
        print(f"  prepared {name:<13}{1000 * result['seconds'][name]:>8.1f} ms, {100 * share:>5.1f} % of a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rate", type=float, default=500_000, help="tokens a second of the device, forward and backward"
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--output", default="", help="JSON file for the results")
    arguments = parser.parse_args()
    context = initialize()
    torch.set_num_threads(1)
    info = machine_info()
    print(", ".join(f"{key} {value}" for key, value in info.items()), flush=True)
    results = []
    for length in CASES:
        for views in (1, 2):
            results.append(measure(length, views, arguments.rate, arguments.steps, context))
            show(results[-1])
    if arguments.output:
        write_json(Path(arguments.output), {"machine": info, "rate": arguments.rate, "results": results})
