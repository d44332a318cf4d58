"""What is trained on the pretended device, and on the CPU to compare with: layouts, methods, precisions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_mdm.config.schema import RunConfig
from tests.small import EOS, MASK, PAD, small_config, small_model

NUM_STEPS = 3
COUNTED = 2  # the step whose waits are counted: what is made once has been made, and DeepSpeed's timers run
CALIBRATION = {"num_samples": 3, "num_times": 10, "num_masks": 4, "num_restarts": 3}
PAPER = {"t_sampler": "ppots", "views": 2, "strata": "full", "calibration": CALIBRATION}
UNIFORM: dict[str, Any] = {"strata": "full"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    num_ranks: int = 1
    method: str = "uniform"  # in METHODS
    precision: str = "fp32"
    gradients: str = "model"  # fp32: those of micro-batches are summed in it
    parallel: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: str = "train"  # in DATA


DATA = {"train": (8, 24), "one_length": (16, 17)}  # tokens of a sample: from, and less than
METHODS = {
    "uniform": UNIFORM,
    "paper": PAPER,
    "masked": {**UNIFORM, "normalization": "masked"},  # counts the masked tokens of the global batch, over ranks
}
PACKED = {"mode": "packed"}
LAYOUTS = {
    "one rank": Layout(parallel={"zero": 0}),
    "one rank, bf16, packed": Layout(batch=PACKED, precision="bf16", parallel={"zero": 1}),
    "one rank, bf16, packed, one length": Layout(
        batch=PACKED, precision="bf16", parallel={"zero": 1}, data="one_length"
    ),
    "one rank, fp16": Layout(precision="fp16", parallel={"zero": 0}),
    "one rank, bf16, fp32 gradients": Layout(precision="bf16", gradients="fp32", parallel={"zero": 1}),
    "offload": Layout(parallel={"zero": 2, "offload": "optimizer"}),
    "DP 2, ZeRO 0": Layout(num_ranks=2, parallel={"zero": 0}),
    "DP 2, ZeRO 1": Layout(num_ranks=2, parallel={"zero": 1}),
    "DP 2, ZeRO 2, counted": Layout(num_ranks=2, method="masked", parallel={"zero": 2}),
    "DP 2, ZeRO 3": Layout(num_ranks=2, parallel={"zero": 3}),
    "DP 2, ZeRO 2, fp16": Layout(num_ranks=2, precision="fp16", parallel={"zero": 2}),
    "DP 2, ZeRO 3, fp16": Layout(num_ranks=2, precision="fp16", parallel={"zero": 3}),
    "TP 2": Layout(num_ranks=2, parallel={"tensor": 2, "zero": 1}),
    "TP 2, sequence, packed": Layout(num_ranks=2, batch=PACKED, parallel={"tensor": 2, "sequence": True, "zero": 0}),
    "TP 2, fp16": Layout(num_ranks=2, precision="fp16", parallel={"tensor": 2, "zero": 0}),
    "TP 2, sequence, packed, adapters": Layout(
        num_ranks=2,
        batch=PACKED,
        parallel={"tensor": 2, "sequence": True, "zero": 1},
        model={"lora": {"rank": 4, "dropout": 0.1}},
    ),
    "PP 2": Layout(num_ranks=2, parallel={"pipeline": 2, "zero": 0}),
    "PP 2, bf16, packed": Layout(num_ranks=2, batch=PACKED, precision="bf16", parallel={"pipeline": 2, "zero": 1}),
    "PP 2, fp16, tied": Layout(
        num_ranks=2, precision="fp16", parallel={"pipeline": 2, "zero": 0}, model={"tie_embeddings": True}
    ),
    "calibrated, MIRROR": Layout(num_ranks=2, method="paper", parallel={"zero": 1}),
    "TP 2, PP 2, tied": Layout(
        num_ranks=4, method="paper", parallel={"tensor": 2, "pipeline": 2, "zero": 1}, model={"tie_embeddings": True}
    ),
}


def config_of(layout: Layout, folder: Path) -> RunConfig:
    return small_config(
        folder,
        model=small_model(num_layers=2, num_kv_heads=2, **layout.model).model_dump(),
        diffusion=METHODS[layout.method],
        data={"train": str(folder / f"{layout.data}.jsonl")},
        parallel=layout.parallel,
        batch=layout.batch,
        precision={"dtype": layout.precision, "gradients": layout.gradients},
        logging={"profile_every": 0, "tensorboard": False},
    )


def train_all(layouts: dict[str, Layout], folder: Path, pretend: bool) -> dict[str, dict[str, Any]]:
    """On a rank: train each layout a few steps, save, and go on from what was saved."""
    if pretend:
        from tests.cuda.pretended import install

        install()
    return {name: _train(config_of(layout, folder), folder / name) for name, layout in layouts.items()}


def _train(config: RunConfig, folder: Path) -> dict[str, Any]:
    from megatron_mdm.checkpoint.load import restore, restored_engine
    from megatron_mdm.checkpoint.store import CheckpointStore
    from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS
    from megatron_mdm.models.attention import executor
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.build import build_trainer
    from megatron_mdm.training.calibrate import calibrate
    from megatron_mdm.training.inputs import resolve
    from tests.cuda import record

    planned = len(executor("equal segments", "cuda", torch.bfloat16).shapes)
    config, data = resolve(config)
    context = initialize(config.parallel)
    engine = restored_engine(None, config, context, 0)
    calibrated = config.diffusion.t_sampler in CALIBRATED_SAMPLERS
    artifact = calibrate(engine, config, data, context) if calibrated else None
    trainer = build_trainer(config, data, engine, artifact, context)
    steps = []
    for step in range(NUM_STEPS):
        record.reset()
        steps.append(trainer.train_step(step))
        if step == COUNTED:
            synchronisations = Counter(record.synchronisations)
            unpinned = Counter(record.unpinned_copies)
    store = CheckpointStore(folder, config.checkpoint, context)
    store.save(NUM_STEPS, engine, {"x": 1})
    store.finish()
    went_on = trainer.train_step(NUM_STEPS)
    saved = folder / f"step-{NUM_STEPS:08d}"
    scales = {"went on": engine.loss_scale.state()}
    if config.precision.dtype == "fp16":  # in a new engine, whose loss scale is the initial one
        engine = restored_engine(saved, config, context, NUM_STEPS)
        trainer = build_trainer(config, data, engine, artifact, context)
    else:
        restore(engine, saved, config.model, context, NUM_STEPS)
    resumed = trainer.train_step(NUM_STEPS)
    scales["resumed"] = engine.loss_scale.state()
    return {
        "losses": [step.loss for step in steps],
        "sample_losses": np.array([step.sample_loss for step in steps]),
        "norms": [step.grad_norm for step in steps],
        "went on": (went_on.loss, went_on.grad_norm),
        "resumed": (resumed.loss, resumed.grad_norm),
        "loss scales": scales,
        "overlaps": _overlaps(engine),
        "equal segments": len(executor("equal segments", "cuda", torch.bfloat16).shapes) - planned,
        "synchronisations": dict(synchronisations),
        "unpinned": dict(unpinned),
        "of signed weights": _signed(engine, trainer.source.prepare(NUM_STEPS).micro_batches, config.optimizer.lr),
    }


def _signed(engine: Any, micro_batches: list[Any], lr: float) -> dict[str, Any]:
    """A step as reinforcement learning takes it, with weights of either sign that follow from the tokens' losses: waits
    of the two passes, and the rows' losses in both."""
    from megatron_mdm.parallel import platform
    from tests.cuda import record

    record.reset()
    losses = engine.token_losses(micro_batches)
    waits = [dict(record.synchronisations)]
    weights = [torch.where(each > each.mean(), -0.1, 0.1) * (each > 0) for each in losses]
    signed = [
        of._replace(token_weight=each.pin_memory() if platform.is_cuda() else each, dropout_keys=None)
        for of, each in zip(micro_batches, weights, strict=True)
    ]
    record.reset()
    rows = engine.train_batch(signed, lr).statistics
    waits.append(dict(record.synchronisations))
    expected = [(each * weight).sum(1).numpy() for each, weight in zip(losses, weights)]
    found = [each.loss.numpy() for each in rows]
    return {"waits": waits, "expected": np.concatenate(expected), "found": np.concatenate(found)}


def _overlaps(engine: Any) -> bool:
    """Whether gradients are reduced on a stream of their own, beside the backward pass."""
    optimizer = engine.engine.optimizer
    stream = getattr(optimizer, "reduce_and_partition_stream", None)  # of ZeRO 3
    if stream is None:
        return getattr(optimizer, "overlap_comm", False)
    return stream is not torch.cuda.default_stream()


HASHED = {"temperature": 0.7, "noise": "device"}  # by numbers of the device's own


def generate_all(pretend: bool) -> list[list[int]]:
    """On a rank: responses of an untrained model, by several ways of decoding."""
    if pretend:
        from tests.cuda.pretended import install

        install()
    from megatron_mdm.config.schema import ParallelConfig
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.generation.generate import generate
    from megatron_mdm.generation.sampler import denoise
    from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    engine = InferenceEngine(build_model(small_model(init_std=0.3), ParallelConfig(), context, 3), "fp32")
    answers = []
    for changes in ({}, {"cache": "dual", "temperature": 0.7}, {"cfg_scale": 1.5, "remasking": "entropy"}, HASHED):
        settings = GenerationConfig(**{"gen_length": 8, "block_length": 4, "steps": 8, "batch_size": 2, **changes})
        prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
        responses = generate(engine, prompts, settings, SpecialIds(MASK, PAD, EOS), context, denoise)
        answers += [response.tokens for response in responses]
    return answers
