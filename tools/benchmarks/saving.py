"""How long training waits for a checkpoint, and what writing it in the background costs the steps meanwhile.

torchrun --nproc-per-node 2 -m tools.benchmarks saving --folder DISK (or plain python -m: one rank)
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from megatron_mdm.parallel import platform

platform.quiet_libraries()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_mdm.batch import Full, ModelInputs  # noqa: E402
from megatron_mdm.checkpoint.load import restored_engine  # noqa: E402
from megatron_mdm.checkpoint.store import CheckpointStore  # noqa: E402
from megatron_mdm.config.schema import RunConfig  # noqa: E402
from megatron_mdm.engine.base import Engine  # noqa: E402
from megatron_mdm.models.parameters import num_parameters  # noqa: E402
from megatron_mdm.parallel.collectives import barrier, gather_objects  # noqa: E402
from megatron_mdm.parallel.groups import ParallelContext, initialize, world_size_from_environment  # noqa: E402

MODEL = {  # 100 million parameters
    "num_layers": 12,
    "hidden_size": 768,
    "num_heads": 12,
    "num_kv_heads": 12,
    "ffn_hidden_size": 2048,
    "max_sequence_length": 128,
    "vocab_size": 10_000,
}


def config_of(folder: Path, zero: int, dtype: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": MODEL,
            "data": {"train": "none", "max_length": 128},
            "parallel": {"zero": zero},
            "batch": {"global_size": 2 * world_size_from_environment(), "micro_size": 2},
            "optimizer": {"lr": 1e-4},
            "schedule": {"steps": 1},
            "precision": {"dtype": dtype},
            "checkpoint": {"directory": str(folder), "keep_last": 1},
            # DeepSpeed's bucket, 5e8 elements by default, would be the largest thing here.
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": 50_000_000}},
        }
    )


def train(engine: Engine, steps: int) -> float:
    """Seconds of so many steps."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, MODEL["vocab_size"], (2, 128), generator=generator)
    selected = torch.rand(2, 128, generator=generator) < 0.5
    inputs = ModelInputs(tokens, Full(), selected, tokens, selected.float() / 100, torch.ones(2))
    began = time.monotonic()
    for _ in range(steps):
        engine.train_batch([inputs], 1e-4)
    return time.monotonic() - began


def one_round(store: CheckpointStore, engine: Engine, number: int, steps: int) -> dict[str, float]:
    """Seconds: of a save that is waited for; of the wait for one in the background; of steps beside it and alone."""
    seconds: dict[str, float] = {}

    def timed(name: str, began: float) -> None:
        seconds[name] = time.monotonic() - began

    barrier()
    began = time.monotonic()
    store.save(2 * number, engine, {})
    store.finish()
    timed("synchronous", began)
    barrier()
    seconds["steps_alone"] = train(engine, steps)
    barrier()
    began = time.monotonic()
    store.save(2 * number + 1, engine, {})
    timed("blocked", began)
    began_steps = time.monotonic()
    train(engine, steps)
    timed("steps_beside_writing", began_steps)
    seconds["was_still_writing"] = float(store.is_writing())
    store.finish()
    timed("asynchronous", began)
    return seconds


def measure(folder: Path, arguments: argparse.Namespace, context: ParallelContext) -> None:
    config = config_of(folder, arguments.zero, arguments.dtype)
    engine = restored_engine(None, config, context, 0)
    store = CheckpointStore(folder, config.checkpoint, context)
    train(engine, 1)
    store.save(1, engine, {})  # the first one allocates its memory
    store.finish()
    rounds = [one_round(store, engine, number, arguments.steps) for number in range(1, 1 + arguments.repeats)]
    slowest = [
        {key: max(rank[key] for rank in ranks) for key in rounds[0]}  # training goes on when the last rank does
        for ranks in (gather_objects(one, context) for one in rounds)
    ]
    medians = {key: float(np.median([one[key] for one in slowest])) for key in slowest[0]}
    size = sum(path.stat().st_size for path in next(folder.glob("step-*")).rglob("*.safetensors"))
    result = {
        "parameters": num_parameters(config.model),
        "ranks": context.layout.world_size,
        "zero": arguments.zero,
        "bytes": size,
        "median_seconds": medians,
        "blocked_over_synchronous": medians["blocked"] / medians["synchronous"],
        # what the whole save costs training: the wait, and what the steps beside it lose
        "cost_over_synchronous": (medians["blocked"] + medians["steps_beside_writing"] - medians["steps_alone"])
        / medians["synchronous"],
        "rounds": slowest,
    }
    if context.is_main:
        print(json.dumps(result, indent=1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to write to")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="to train beside each save")
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    arguments = parser.parse_args()
    context = initialize()
    folder = None
    if context.is_main:
        folder = tempfile.TemporaryDirectory(dir=arguments.folder)
    name = str(gather_objects(folder.name if folder else "", context)[0])
    measure(Path(name), arguments, context)
    if folder:
        folder.cleanup()
