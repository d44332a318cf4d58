"""The report behind `mdm report variance`: A, B, C of a checkpoint, and every method's variance on it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.figure import Figure

from megatron_mdm.checkpoint.load import load_for_gradients, run_config
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import DiffusionConfig, RunConfig
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.diffusion.control_variate import CONTROL_VARIATES, WeightedLosses
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.objective import NORMALIZATIONS
from megatron_mdm.diffusion.prepass import spread_groups
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.diffusion.t_samplers import ClippedSampler, TSampler, UniformSampler
from megatron_mdm.engine.inference import InferenceEngine
from megatron_mdm.evaluation.losses import LossMeasurement
from megatron_mdm.parallel.groups import ParallelContext, initialize
from megatron_mdm.reports.plots import save_figure, variance_figure
from megatron_mdm.reports.variance import (
    Comparison,
    Decomposition,
    Draws,
    Method,
    bootstrap_decomposition,
    compare,
    decompose,
    draw_gradients,
)
from megatron_mdm.training.calibrate import as_trained, calibration_of, calibrator_of
from megatron_mdm.training.inputs import RunData, resolve

DESIGNS: dict[str, dict[str, Any]] = {  # fields of the section diffusion
    "standard": {},
    "MIRROR": {"views": 2},
    "MultiSample-2": {"multisample": 2},
    "exact count": {"masking": "exact_count"},
    "exact count + MIRROR": {"masking": "exact_count", "views": 2},
}
ROUNDED: dict[str, dict[str, Any]] = {"rounded count": {}, "rounded count + MIRROR": {"views": 2}}  # of runs with it
CLIPPED = (0.3, 0.8)


def report_variance(options: argparse.Namespace) -> None:
    """Measure, print, and write variance.json and variance.png into the run's folder or --output."""
    run_config(options.folder)  # says what is wrong with the folder, if anything is
    base = ["parallel.pipeline=1", "parallel.tensor=1", "parallel.sequence=false", *options.overrides]
    config, data = resolve(load_config(options.folder / "config.yaml", base))
    data = replace(data, train=as_trained(config, data))
    context = initialize()
    engine = load_for_gradients(options.folder, config, context)
    output: Path = options.output or options.folder
    output.mkdir(parents=True, exist_ok=True)
    parts = decomposition(engine, config, data, context, options.groups)
    _print_decomposition(parts)
    comparison = comparison_table(engine, config, data, context, options.draws)
    ema = {name: _ema_loss_ratio(comparison["draws"]["standard"], name) for name in CONTROL_VARIATES}
    rows: list[Comparison] = comparison["rows"]
    _print_table(rows, ema)
    record = {
        "run": str(options.folder),
        "decomposition": parts,
        "draws": options.draws,
        "methods": [row._asdict() for row in rows],
        "ema_loss_ratio": ema,
    }
    write_json(output / "variance.json", record)
    figure: Figure = variance_figure(record)
    save_figure(figure, output / "variance.png")
    print(f"{output / 'variance.json'}, {output / 'variance.png'}", flush=True)


def decomposition(
    engine: InferenceEngine, config: RunConfig, data: RunData, context: ParallelContext, num_samples: int
) -> dict[str, list[float]]:
    """A, B, C and their sum, each [estimate, lower, upper] (90 %), from num_samples × 8 rates × 3 masks."""
    num_samples = min(num_samples, len(data.train))
    num_times = 8
    num_masks = 3
    if num_samples < 2:
        raise UserError("--groups: at least 2 samples are needed")
    generator = stream(config.seed, Purpose.VARIANCE)
    chosen = generator.permutation(len(data.train))[:num_samples]
    t = np.repeat(generator.random((num_samples, num_times)).ravel(), num_masks)
    measure = LossMeasurement(
        data.train,
        MaskDesign.of(DiffusionConfig(**_common(config.diffusion))),
        NORMALIZATIONS[config.diffusion.normalization],
        data.special_ids,
        config.batch.micro_size,
        context,
    )
    rows = measure(
        engine,
        np.repeat(chosen, num_times * num_masks),
        t,
        lambda place: stream(config.seed, Purpose.VARIANCE, 1, place),
        progress="A, B, C",
    )
    loss = rows.loss[:, 0].reshape(num_samples, num_times, num_masks)
    estimates = decompose(loss)
    resamples = bootstrap_decomposition(loss)
    low, high = np.quantile(resamples, [0.05, 0.95], axis=0)
    values = [*estimates, estimates.total]
    names = [*Decomposition._fields, "total"]
    return {name: [values[i], float(low[i]), float(high[i])] for i, name in enumerate(names)}


def comparison_table(
    engine: InferenceEngine, config: RunConfig, data: RunData, context: ParallelContext, num_draws: int
) -> dict[str, Any]:
    """Draws of every way of masking, and every method's variances on them."""
    samples, t = spread_groups(len(data.train), range(num_draws), config.seed + 1)
    draws = {}
    samplers = {}
    for name, diffusion in designs_of(config.diffusion).items():
        changed = config.model_copy(update={"diffusion": diffusion})
        samplers[name] = _samplers(engine, changed, data, context)
        draws[name] = draw_gradients(
            engine.model,
            cast(SftDataset, data.train),
            samples,
            t,
            lambda place: stream(config.seed, Purpose.VARIANCE, 2, place),
            MaskDesign.of(diffusion),
            NORMALIZATIONS[diffusion.normalization],
            data.tokenizer.mask_id,
            name,
        )
    return {"draws": draws, "rows": compare(_methods(samplers, config.batch.global_size), draws)}


def designs_of(diffusion: DiffusionConfig) -> dict[str, DiffusionConfig]:
    """The ways of masking that are compared on a run, each with P-POTS, by name."""
    designs = dict(DESIGNS)
    if diffusion.masking == "rounded_count":
        designs |= {name: {"masking": "rounded_count", **fields} for name, fields in ROUNDED.items()}
    if diffusion.isad.delimiters:
        designs["ISAD"] = {"isad": diffusion.isad}
    common = _common(diffusion)
    return {name: DiffusionConfig(t_sampler="ppots", **common, **fields) for name, fields in designs.items()}


def _common(diffusion: DiffusionConfig) -> dict[str, Any]:
    """The fields in which every row is the run's: what is estimated, by whatever method."""
    return diffusion.model_dump(include={"epsilon", "mask_schedule", "normalization"})


def _samplers(
    engine: InferenceEngine, config: RunConfig, data: RunData, context: ParallelContext
) -> dict[str, TSampler]:
    """P-POTS for the loss and for the gradient, calibrated as training would."""
    samplers: dict[str, TSampler] = {}
    for target in ("second_moment", "gradient"):
        calibration = config.diffusion.calibration.model_copy(update={"target": target})
        diffusion = config.diffusion.model_copy(update={"calibration": calibration})
        changed = config.model_copy(update={"diffusion": diffusion})
        calibrator = calibrator_of(changed, data.train)
        samplers[target] = calibration_of(engine, changed, data, context, calibrator).fit.sampler
    return samplers


def _methods(samplers: dict[str, dict[str, TSampler]], batch_size: int) -> list[Method]:
    """The table's rows, the standard method first."""
    uniform = UniformSampler()
    rows = []
    for name in samplers:
        fitted = samplers[name]
        kinds = {"": uniform, "P-POTS": fitted["second_moment"], "P-POTS (gradient)": fitted["gradient"]}
        for kind, sampler in kinds.items():
            for label, strata in (("", 1), ("strata √n", round(batch_size**0.5)), ("strata n", batch_size)):
                if kind and label == "strata √n":
                    continue
                words = [word for word in (kind, "" if name == "standard" else name, label) if word]
                rows.append(Method(" + ".join(words) or "standard", name, sampler, strata))
    rows.append(Method(f"clipped {CLIPPED[0]}–{CLIPPED[1]}", "standard", ClippedSampler(CLIPPED), 1, CLIPPED, True))
    return rows


def _ema_loss_ratio(draws: Draws, variate_name: str, batch_size: int = 32, passes: int = 10) -> float:
    """Variance of the adjusted loss over that of the loss, after one pass of warming up."""
    variate = CONTROL_VARIATES[variate_name].new(10, 0.01)
    generator = np.random.default_rng(0)
    mass = UniformSampler().weighted_mass(10)
    adjusted = []
    for number in range(passes):
        order = generator.permutation(len(draws.t))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = WeightedLosses(draws.t[part], np.ones(len(part)), draws.loss[part], mass)
            if number:
                adjusted.append(variate.adjusted(batch))
            variate.update(batch)
    return float(np.concatenate(adjusted).var() / draws.loss.var()) if adjusted else float("nan")


def _print_decomposition(parts: dict[str, list[float]]) -> None:
    names = {"masks": "A, masking pattern", "rate": "B, mask rate t", "data": "C, data", "total": "total"}
    for key, name in names.items():
        value, low, high = parts[key]
        print(
            f"{name:20s} {value:10.4f}   (90 %: {low:.4f} to {high:.4f}), {value / parts['total'][0]:6.1%} of the total"
        )


def _print_table(rows: list[Comparison], ema: dict[str, float]) -> None:
    heading = f"{'variance / standard':52s} {'loss':>8s} {'gradient':>10s} {'90 % interval':>16s}"
    print(f"\n{heading}   at equal compute: loss, gradient")
    for row in rows:
        loss, (gradient, low, high) = row.loss[0], row.gradient
        mark = "  (biased)" if row.biased else ""
        print(
            f"{row.name:52s} {loss:8.3f} {gradient:10.3f}    {low:.3f} to {high:.3f}   "
            f"{loss * row.passes:10.3f} {gradient * row.passes:9.3f}{mark}"
        )
    for name, ratio in ema.items():
        label = f"EMA ({name})"
        print(f"{label:52s} {ratio:8.3f} {1.0:10.3f}    (gradients are the standard method's, bit for bit)")
