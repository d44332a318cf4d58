"""What training, calibration and generation computed at a named commit: the set-ups, and how each is measured.

    python -m tests.unchanged tests/unchanged.json    record again, where results are meant to change

tests/test_unchanged.py compares with what is recorded. Random model and data, fp32, ten steps.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_mdm.config.schema import RunConfig
from tests.ranks import run_ranks
from tests.small import EOS, MASK, PAD, small_config, small_model, write_ids

RECORDED = Path(__file__).parent / "unchanged.json"
NUM_STEPS = 10
CALIBRATION = {"num_samples": 3, "num_times": 10, "num_masks": 4, "num_restarts": 3}
PAPER_AND_STRATA = {"t_sampler": "ppots", "views": 2, "strata": "full", "calibration": CALIBRATION}


class Setup(NamedTuple):
    num_ranks: int
    sections: dict[str, dict[str, Any]]  # that differ from small_config's
    decoding: tuple[dict[str, Any], ...] = ()  # settings of generation from the initial weights


SETUPS = {
    "standard": Setup(1, {}, ({}, {"cache": "dual", "temperature": 0.7}, {"cfg_scale": 1.5, "remasking": "entropy"})),
    "ppots_mirror_strata": Setup(1, {"diffusion": PAPER_AND_STRATA}),
    "exact_count": Setup(1, {"diffusion": {"masking": "exact_count", "strata": "full"}}),
    "gradient_target_refit": Setup(
        1,
        {
            "diffusion": {
                "t_sampler": "ppots",
                "calibration": {**CALIBRATION, "target": "gradient", "num_gradients": 16, "refit_every": 4},
            }
        },
    ),
    "autoregressive": Setup(1, {"objective": {"name": "autoregressive"}}, ({}, {"temperature": 0.7})),
    "packed": Setup(1, {"diffusion": PAPER_AND_STRATA, "batch": {"mode": "packed"}}),
    "variants": Setup(
        1,
        {
            "model": {"tie_embeddings": True, "qk_norm": True, "qkv_bias": True, "z_loss": 1e-2, "logit_shift": True},
            "diffusion": {"multisample": 2, "normalization": "token", "t_sampler": "clipped"},
            "batch": {"mode": "bucketed", "micro_tokens": 96},
        },
    ),
    "tp2_sequence": Setup(
        2, {"diffusion": PAPER_AND_STRATA, "parallel": {"tensor": 2, "sequence": True, "zero": 1}}, ({},)
    ),
    "pp2": Setup(2, {"diffusion": PAPER_AND_STRATA, "parallel": {"pipeline": 2, "zero": 1}}, ({}, {"cache": "prefix"})),
    "dp2_zero3": Setup(2, {"diffusion": PAPER_AND_STRATA, "parallel": {"zero": 3}}),
    "pp2_autoregressive": Setup(
        2, {"objective": {"name": "autoregressive"}, "parallel": {"pipeline": 2, "zero": 0}}, ({},)
    ),
}


def measured(name: str, folder: Path) -> list[dict[str, Any]]:
    """What a set-up computes, by rank. folder: for its data."""
    setup = SETUPS[name]
    write_ids(folder / "train.jsonl", 40)
    sections = {**setup.sections, "optimizer": {"lr": 1e-3}}
    model = small_model(num_layers=3, num_kv_heads=4, **sections.pop("model", {}))
    config = small_config(folder, model=model.model_dump(), **sections)
    return run_ranks(_trained_and_generated, setup.num_ranks, config, setup.decoding)


def on_all_ranks(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The one result of all ranks, with a list of each one's masks: every rank knows the whole global batch, but makes
    the masks of its own part."""
    first, *others = ({**result, "masks": [other["masks"] for other in results]} for result in results)
    assert all(other == first for other in others)
    return first


def kernel_fingerprint() -> str:
    """Hash of a few results of torch's own kernels: equal where the same processor's kernels run, as bits may differ
    elsewhere."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 96, generator=generator) for _ in range(2))
    products = left @ right.t()
    results = [
        products,
        products.softmax(-1),
        left.exp(),
        left.square().mean(-1).rsqrt(),
        torch.nn.functional.silu(left),
    ]
    digest = hashlib.sha256(torch.__version__.encode())
    for result in results:
        digest.update(result.numpy().tobytes())
    return digest.hexdigest()


def _trained_and_generated(config: RunConfig, decoding: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.diffusion.t_samplers import CALIBRATED_SAMPLERS
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs
    from megatron_mdm.training.calibrate import calibrate

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    engine = restored_engine(None, config, context, 0)
    artifact = calibrate(engine, config, data, context) if config.diffusion.t_sampler in CALIBRATED_SAMPLERS else None
    trainer = build.build_trainer(config, data, engine, artifact, context)
    masks = hashlib.sha256()
    steps = []
    for step in range(NUM_STEPS):
        for noised in trainer.source.noised_batch(step).noised:
            masks.update(noised.masked.numpy().tobytes() + noised.noisy.numpy().tobytes())
        steps.append(trainer.train_step(step))
    return {
        "t": [step.t.tolist() for step in steps],
        "masks": masks.hexdigest(),
        "losses": [step.loss for step in steps],
        "sample_losses": [step.sample_loss.tolist() for step in steps],
        "gradient_norms": [step.grad_norm for step in steps],
        "density": artifact["cell_density"][::16] if artifact else [],
        "efficiency": artifact["efficiency"] if artifact else 1.0,
        "generated": _generated(config, decoding, context),
        "kernels": kernel_fingerprint(),
    }


def _generated(config: RunConfig, decoding: tuple[dict[str, Any], ...], context: Any) -> list[list[list[int]]]:
    """The ids of every response, by setting."""
    from megatron_mdm.engine.inference import InferenceEngine, PipelinedInferenceEngine, build_stage
    from megatron_mdm.generation.generate import generate
    from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.objectives import objective_of

    model = config.model.model_copy(update={"init_std": 0.3})
    parallel = config.parallel.model_copy(update={"sequence": False})
    engine: Any
    if context.layout.pipeline > 1:
        stages = build_stage(model, parallel, context, 3, 16)
        engine = PipelinedInferenceEngine(stages, model, "fp32", context)
    else:
        engine = InferenceEngine(build_model(model, parallel, context, 3), "fp32")
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]
    special = SpecialIds(MASK, PAD, EOS)
    answers = []
    for changes in decoding:
        settings = GenerationConfig(**{"gen_length": 8, "block_length": 4, "steps": 8, "batch_size": 2, **changes})
        responses = generate(engine, prompts, settings, special, context, objective_of(config).decoder)
        answers.append([response.tokens for response in responses])
    return answers


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results: dict[str, Any] = {}
    for name in SETUPS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = on_all_ranks(measured(name, Path(folder)))
        print(name, results[name]["losses"][-1], np.shape(results[name]["density"]), flush=True)
    kernels = {result.pop("kernels") for result in results.values()}
    (fingerprint,) = kernels
    written = {"commit": commit, "kernels": fingerprint, "setups": results}
    Path(sys.argv[1]).write_text(json.dumps(written) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
