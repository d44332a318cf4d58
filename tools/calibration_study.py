"""How many forwards does a calibration of P-POTS need? Efficiency against forwards, for a run's newest checkpoint.

python tools/calibration_study.py --run-dir runs/quickstart --output runs/calibration_study

Measures losses of many groups (a sample at one t) once, 10 times the paper's 15·70·15 by default. Every seed calibrates
on groups of its own; its density is judged on all the other groups, twice: by the second moment E[l² | t] that they
give (efficiency), and without any curve, by the importance-weighted losses themselves (variance over uniform t's).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from matplotlib.figure import Figure  # noqa: E402

from megatron_mdm.checkpoint.load import load_for_inference, run_config  # noqa: E402
from megatron_mdm.config.errors import UserError  # noqa: E402
from megatron_mdm.config.files import write_json  # noqa: E402
from megatron_mdm.config.load import load_config  # noqa: E402
from megatron_mdm.config.schema import RunConfig  # noqa: E402
from megatron_mdm.diffusion.calibrator import Calibrator, Efficiency, efficiency  # noqa: E402
from megatron_mdm.diffusion.densities import DENSITIES, FitInputs, kl_divergence  # noqa: E402
from megatron_mdm.diffusion.mask_schedule import Floats  # noqa: E402
from megatron_mdm.diffusion.moments import Moments, MomentSums, token_moments  # noqa: E402
from megatron_mdm.diffusion.t_samplers import CENTRES, TSampler, UniformSampler  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402
from megatron_mdm.parallel.program import run_program  # noqa: E402
from megatron_mdm.reports.plots import save_figure  # noqa: E402
from megatron_mdm.training.calibrate import Prepass, calibrator_of, halves_of, spread_groups  # noqa: E402
from megatron_mdm.training.inputs import resolve  # noqa: E402

NUM_SEEDS, LARGEST = 8, 15 * 70 * 15
SIZES = (250, 500, 1000, 2000, 4000, LARGEST)  # forwards
VARIANTS: dict[str, dict[str, Any]] = {
    "token moments": {},
    "token moments, EPR": {"density": "epr", "num_restarts": 5},
    "naive, EPR": {"estimator": "naive", "density": "epr", "num_restarts": 5},
    "naive, EPR, floor 0.02": {"estimator": "naive", "density": "epr", "num_restarts": 5, "uniform_floor": 0.02},
}


def measure(config: RunConfig, run_dir: Path, num_forwards: int, cache: Path) -> Floats:
    """Moments of groups, kept beside the results, so that a study can be repeated on them."""
    if cache.is_file():
        return np.load(cache)
    config, data = resolve(config)
    context = initialize(1)
    prepass = Prepass(load_for_inference(run_dir, config, context), config, data, context)
    prepass.add(*spread_groups(len(data.train), range(num_forwards // prepass.views), config.seed))
    np.save(cache, prepass.moments[0])
    return prepass.moments[0]


def judge(reference: MomentSums, calibrator: Calibrator, sampler: TSampler) -> Efficiency:
    """By the reference's own token moments, for every variant alike."""
    curves = token_moments(reference, calibrator.exposures)
    return efficiency(curves.second_moment, float(curves.mean_loss(CENTRES).mean()), sampler)


def study(moments: Floats, maker: Calibrator, views: int) -> dict[str, Any]:
    """Efficiencies of every variant, size and seed."""
    num_cells, per_seed = maker.settings.num_times, LARGEST // views
    everything = MomentSums.of(moments, num_cells)
    seeds = min(NUM_SEEDS, len(moments) // per_seed - 1)
    result: dict[str, Any] = {"forwards": list(SIZES), "floors": {}}
    result |= {key: {name: [] for name in VARIANTS} for key in ("variants", "variance_over_uniform")}
    result["uniform"] = judge(everything, maker, UniformSampler()).of_uniform
    for name, changes in VARIANTS.items():
        settings = type(maker.settings).model_validate({**maker.settings.model_dump(), **changes})
        variant = Calibrator(settings, maker.exposures, maker.seed)
        for size in SIZES:
            values, ratios = [], []
            for seed in range(seeds):
                first = seed * per_seed
                mine = moments[first : first + size // views]
                others = everything.plus(MomentSums(-MomentSums.of(mine, num_cells).sums))
                fit = variant.fit(halves_of(mine, num_cells))
                values.append(judge(others, maker, fit.sampler).of_sampler)
                rest = np.delete(moments, np.s_[first : first + size // views], axis=0)
                ratios.append(_variance_over_uniform(rest, fit.sampler))
                result["floors"].setdefault(name, []).append(fit.floor)
            result["variants"][name].append(values)
            result["variance_over_uniform"][name].append(ratios)
            print(
                f"{name}, {size:,} forwards: efficiency {np.mean(values):.4f}, worst {np.min(values):.4f}; variance "
                f"over uniform's {np.mean(ratios):.4f}, worst {np.max(ratios):.4f}",
                flush=True,
            )
    return result


def _variance_over_uniform(moments: Floats, sampler: TSampler) -> float:
    """Var(w·l) under a sampler over Var(l) under uniform t, from losses at uniform t."""
    t, loss = (moments[:, Moments._fields.index(name)] for name in ("t", "loss"))
    square, mean = loss**2, loss.mean()
    return float(((square / sampler.density(t)).mean() - mean**2) / (square.mean() - mean**2))


def held_out_divergence(moments: Floats, maker: Calibrator) -> dict[str, float]:
    """KL(points ‖ fit), nats: densities fitted to odd cells' empirical optimum, judged on the even cells'."""
    sums = MomentSums.of(moments, maker.settings.num_times)
    t, square = sums.mean("loss_square")
    optimum, divergences = np.sqrt(square), {}
    for name in ("epr", "polynomial"):
        fitted = DENSITIES[name](FitInputs(lambda x: np.interp(x, t[::2], optimum[::2]), t[::2], 20, 0))
        divergences[name] = kl_divergence(optimum[1::2], np.maximum(fitted.unnormalized(t[1::2]), 1e-300))
    return divergences


def figure(result: dict[str, Any], title: str) -> Figure:
    picture = Figure(figsize=(7.5, 5))
    axes = picture.add_subplot()
    for name, sizes in result["variants"].items():
        values = np.array(sizes)
        (line,) = axes.plot(result["forwards"], values.mean(1), "o-", markersize=3, label=name)
        axes.fill_between(result["forwards"], values.min(1), values.max(1), alpha=0.12, color=line.get_color())
    axes.axhline(result["uniform"], color="grey", linestyle="--", label="uniform t")
    axes.axhline(0.98, color="black", linewidth=0.6, linestyle=":")
    axes.set(xscale="log", xlabel="forwards", ylabel="efficiency (mean and range over seeds)", title=title)
    axes.legend()
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="folder for study.json, study.png and the losses")
    parser.add_argument("--forwards", type=int, default=10 * LARGEST, help="rows in all")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.forwards < 2 * LARGEST:
        raise UserError(
            f"--forwards {options.forwards}: at least {2 * LARGEST} are needed for one seed and a reference"
        )
    base = ["diffusion.sampler=ppots", "parallel.pipeline=1", "parallel.tensor=1", "parallel.sequence=false"]
    run_config(options.run_dir)  # says what is wrong with the folder, if anything is
    config = load_config(options.run_dir / "config.yaml", [*base, *options.overrides])
    options.output.mkdir(parents=True, exist_ok=True)
    moments = measure(config, options.run_dir, options.forwards, options.output / "moments.npy")
    config, data = resolve(config)
    maker, views = calibrator_of(config, data.train), config.diffusion.rows_per_sample
    result = study(moments, maker, views)
    result["kl_held_out"] = held_out_divergence(moments, maker)
    result["run"] = str(options.run_dir)
    write_json(options.output / "study.json", result)
    save_figure(figure(result, f"P-POTS calibration of {options.run_dir.name}"), options.output / "study.png")
    print(f"uniform {result['uniform']:.4f}; KL on held-out points: {result['kl_held_out']}")
    print(f"{options.output / 'study.json'}, {options.output / 'study.png'}", flush=True)


if __name__ == "__main__":
    run_program(main)
