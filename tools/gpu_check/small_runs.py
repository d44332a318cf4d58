"""Runs of the quickstart's model within a check's process, on drawn token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_mdm.checkpoint.load import restored_engine
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS
from megatron_mdm.parallel.groups import ParallelContext, initialize
from megatron_mdm.training.build import build_trainer
from megatron_mdm.training.calibrate import calibrate, load_artifact, save_artifact
from megatron_mdm.training.inputs import resolve
from megatron_mdm.training.loop import Trainer

CONFIGS = Path(__file__).parents[2] / "configs"
VOCABULARY = 400
MASK = VOCABULARY - 1
NUM_SAMPLES = 256
# DeepSpeed's bucket, which would be a GB for each of a check's engines
_SMALL_BUCKET = "deepspeed={zero_optimization: {reduce_bucket_size: 1000000}}"
_QUICK = ("model.num_layers=2", "batch={global_size: 8, micro_size: 4}")


class Run(NamedTuple):
    trainer: Trainer
    context: ParallelContext

    def steps(self, first: int, last: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of some steps, the last not among them."""
        results = [self.trainer.train_step(step) for step in range(first, last)]
        return [(result.loss, result.grad_norm) for result in results]

    def digest(self) -> str:
        """Of all weights and moments."""
        digest = hashlib.sha256()
        for fragment in self.trainer.engine.optimizer_state.fragments():
            digest.update(f"{fragment.name} {fragment.kind} ".encode())
            digest.update(fragment.values.float().cpu().numpy().tobytes())
        return digest.hexdigest()


def quickstart(folder: Path, quick: bool, overrides: Sequence[str] = ()) -> RunConfig:
    """The quickstart's model, method, batches and schedule, on samples that are drawn into the folder."""
    path = folder / "train.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_samples(path)
    own = [
        f"data={{train: {json.dumps(str(path))}, mask_token: {MASK}, pad_token: 0, eos_token: 1, max_length: 64}}",
        f"model.vocab_size={VOCABULARY}",
        "evaluation.every=0",
        "logging={every: 1, tensorboard: false, profile_every: 0}",
        f"checkpoint.directory={folder / 'run'}",
        _SMALL_BUCKET,
    ]
    return load_config(CONFIGS / "quickstart.yaml", [*own, *(_QUICK if quick else ()), *overrides])


def write_samples(path: Path) -> None:
    """Token ids with something to learn: a response repeats its prompt."""
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(NUM_SAMPLES):
        size = int(generator.integers(24, 64))
        ids = generator.integers(2, MASK, size)
        prompt = int(generator.integers(8, size - 8))
        ids[prompt:] = ids[np.arange(size - prompt) % prompt]
        lines.append(json.dumps({"input_ids": ids.tolist(), "prompt_length": prompt}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def begin(config: RunConfig, checkpoint: Path | None = None, steps: int = 0) -> Run:
    """A run, from scratch or from a checkpoint after so many steps. A calibration is kept as calibration.json in its
    folder, unless the configuration names one."""
    config, data = resolve(config)
    context = initialize(config.parallel)
    engine = restored_engine(checkpoint, config, context, steps)
    artifact = None
    if config.diffusion.t_sampler in CALIBRATED_SAMPLERS:
        named = config.diffusion.calibration.artifact
        artifact = load_artifact(Path(named)) if named else calibrate(engine, config, data, context)
        if not named:
            save_artifact(artifact, Path(config.checkpoint.directory) / "calibration.json")
    return Run(build_trainer(config, data, engine, artifact, context), context)
