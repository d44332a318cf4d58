"""How many forwards does a calibration of P-POTS need? Efficiency against forwards, for a run's newest checkpoint.

python tools/calibration_study.py --run-dir runs/quickstart --output runs/calibration_study

Measures three kinds of groups (a sample at one t) once and keeps them: a reference at uniform t, and for every seed
those that the defaults take and the paper's nested grid. Every seed calibrates on its own; its density is judged by the
reference, which no fit has seen, in two ways without any curve: the efficiency by the judge of diffusion/judge.py, and
the importance-weighted losses themselves (variance over uniform t's), with an interval over resampled samples.
tools/calibration_toys.py does the like on losses whose best density is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from matplotlib.figure import Figure  # noqa: E402

from megatron_mdm.checkpoint.load import load_for_inference, run_config  # noqa: E402
from megatron_mdm.config.errors import UserError  # noqa: E402
from megatron_mdm.config.files import write_json  # noqa: E402
from megatron_mdm.config.load import load_config  # noqa: E402
from megatron_mdm.config.schema import RunConfig  # noqa: E402
from megatron_mdm.diffusion.calibrator import Calibrator  # noqa: E402
from megatron_mdm.diffusion.densities import DENSITIES, FitInputs, kl_divergence  # noqa: E402
from megatron_mdm.diffusion.judge import Judge  # noqa: E402
from megatron_mdm.diffusion.mask_schedule import Floats  # noqa: E402
from megatron_mdm.diffusion.moments import MomentSums, column_of, nested_masking_variance  # noqa: E402
from megatron_mdm.diffusion.prepass import Calibration, denser_near_zero, fitted, spread_groups  # noqa: E402
from megatron_mdm.diffusion.t_samplers import CENTRES, UniformSampler  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402
from megatron_mdm.parallel.program import run_program  # noqa: E402
from megatron_mdm.reports.plots import save_figure  # noqa: E402
from megatron_mdm.training.calibrate import Prepass, calibrator_of  # noqa: E402
from megatron_mdm.training.inputs import resolve  # noqa: E402

NESTED = (15, 70, 15)  # samples × times × masks, the paper's
NESTED_PARTS = ((4, 4), (8, 7), (15, 15))  # samples and masks of which calibrations are made
SIZES = (256, 1024, 4096, 15750)  # forwards
PAPER = {"estimator": "naive", "density": "epr", "target": "paper", "uniform_floor": 0.02, "num_times": NESTED[1]}
VARIANTS: dict[str, dict[str, Any]] = {  # settings changed from the defaults
    "token moments": {},
    "token moments, EPR": {"density": "epr"},
    "the paper's": PAPER,
}
NUM_RESAMPLES = 100


class Losses(NamedTuple):
    """Moments of groups [n, …] and the sample of each [n], numbered from 0."""

    moments: Floats
    sample: np.ndarray

    def part(self, chosen: np.ndarray | slice) -> Losses:
        return Losses(self.moments[chosen], np.unique(self.sample[chosen], return_inverse=True)[1])


class Measured(NamedTuple):
    reference: Losses  # uniform t
    spread: list[Losses]  # of each seed: the defaults' design, as many as the largest calibration
    nested: list[Losses]  # of each seed: NESTED, sample by sample, then t by t


def measure(config: RunConfig, run_dir: Path, options: argparse.Namespace) -> Measured:
    """Kept beside the results, so that a study can be repeated on them."""
    config, data = resolve(config)
    num_samples = len(data.train)
    views = config.diffusion.rows_per_sample
    if num_samples < NESTED[0] * options.seeds:
        raise UserError(f"--seeds {options.seeds}: the paper's grid takes {NESTED[0]} samples each of {num_samples}")
    sizes = [options.reference // views, *[options.largest // views] * options.seeds]
    ends = np.cumsum(sizes)
    spread = [spread_groups(num_samples, range(end - size, end), config.seed) for size, end in zip(sizes, ends)]
    samples = [sample for sample, _ in spread]
    times = [quantile if place == 0 else denser_near_zero(quantile) for place, (_, quantile) in enumerate(spread)]
    order = spread_groups(num_samples, range(num_samples), config.seed + 1)[0]
    for seed in range(options.seeds):
        chosen = order[seed * NESTED[0] : (seed + 1) * NESTED[0]]
        samples.append(np.repeat(chosen, NESTED[1] * NESTED[2]))
        times.append(np.tile(np.repeat((np.arange(NESTED[1]) + 1.0) / NESTED[1], NESTED[2]), NESTED[0]))
    cache = options.output / "moments.npy"
    boundaries = np.cumsum([len(part) for part in samples])[:-1]
    if not cache.is_file():
        context = initialize()
        prepass = Prepass(load_for_inference(run_dir, config, context), config, data, context)
        np.save(cache, prepass.add(np.concatenate(samples), np.concatenate(times)))
    moments = np.split(np.load(cache), boundaries)
    parts = [Losses(part, np.unique(sample, return_inverse=True)[1]) for part, sample in zip(moments, samples)]
    return Measured(parts[0], parts[1 : 1 + options.seeds], parts[1 + options.seeds :])


def calibrations(measured: Measured, calibrator: Calibrator, views: int) -> Iterator[tuple[int, Calibration]]:
    """(forwards, calibration) of every size and seed."""
    if calibrator.settings.estimator == "naive":
        for num_samples, num_masks in NESTED_PARTS:
            for losses in measured.nested:
                place = np.arange(len(losses.sample)).reshape(NESTED)[:num_samples, :, :num_masks].ravel()
                part = losses.part(place)
                moments = nested_masking_variance(part.moments, num_masks)
                yield len(place) * views, fitted(calibrator, moments, part.sample)
        return
    for size in SIZES:
        for losses in measured.spread:
            if size // views <= len(losses.sample):
                yield size, fitted(calibrator, *losses.part(slice(size // views)))


def study(measured: Measured, maker: Calibrator, views: int) -> dict[str, Any]:
    """Of every variant and size, over seeds: efficiency by the reference, the bound that the calibration reports, the
    variance over uniform t's."""
    reference = measured.reference
    judge = Judge(reference.moments, maker.exposures, "second_moment")
    generator = np.random.default_rng(0)

    def judged(density: Floats) -> list[float]:
        """Efficiency and its 90 % interval"""
        resamples = judge.bootstrap([density], density, reference.sample, NUM_RESAMPLES, generator)
        return [judge.efficiency([density]).of_sampler, *np.quantile(resamples, [0.05, 0.95]).tolist()]

    result: dict[str, Any] = {"uniform": judged(UniformSampler().density(CENTRES)), "variants": {}}
    for name, changes in VARIANTS.items():
        settings = type(maker.settings).model_validate({**maker.settings.model_dump(), **changes})
        rows: dict[int, list[dict[str, Any]]] = {}
        for forwards, calibration in calibrations(measured, Calibrator(settings, maker.exposures, maker.seed), views):
            density = calibration.fit.sampler.cell_density
            entry = {
                "efficiency": judged(density),
                "bound": calibration.rounds[-1]["lower"],
                "variance_over_uniform": variance_over_uniform(reference, density),
                "floor": calibration.fit.floor,
            }
            rows.setdefault(forwards, []).append(entry)
        result["variants"][name] = rows
        for forwards, entries in rows.items():
            values = [entry["efficiency"][0] for entry in entries]
            bounds = [entry["bound"] for entry in entries]
            ratios = [entry["variance_over_uniform"][0] for entry in entries]
            print(
                f"{name}, {forwards:,} forwards: efficiency {np.mean(values):.3f}, worst {np.min(values):.3f}; with "
                f"bounds of {np.min(bounds):.3f} to {np.max(bounds):.3f}; variance over uniform's "
                f"{np.mean(ratios):.3f}, worst {np.max(ratios):.3f}",
                flush=True,
            )
    return result


def variance_over_uniform(reference: Losses, density: Floats) -> list[float]:
    """Var(w·l) under a density [4096] over Var(l) under uniform t, from losses at uniform t alone, and its 90 %
    interval over resampled samples."""
    t, loss = (column_of(reference.moments, name) for name in ("t", "loss"))
    weighted = loss**2 / density[np.minimum((t * len(density)).astype(int), len(density) - 1)]
    columns = np.stack([np.bincount(reference.sample, values) for values in (weighted, loss**2, loss, loss * 0 + 1)])
    generator = np.random.default_rng(0)
    num_samples = columns.shape[1]

    def ratio(counts: Floats) -> float:
        weighted, square, total, number = columns @ counts
        mean = total / number
        return float((weighted / number - mean**2) / (square / number - mean**2))

    drawn = generator.integers(0, num_samples, (NUM_RESAMPLES, num_samples))
    resamples = [ratio(np.bincount(row, minlength=num_samples).astype(float)) for row in drawn]
    return [ratio(np.ones(num_samples)), *np.quantile(resamples, [0.05, 0.95]).tolist()]


def held_out_divergence(moments: Floats, maker: Calibrator) -> dict[str, float]:
    """KL(points ‖ fit), nats: densities fitted to odd cells' empirical optimum, judged on the even cells'."""
    sums = MomentSums.of(moments, maker.settings.num_times)
    t, square = sums.mean("loss_square")
    optimum = np.sqrt(square)
    divergences = {}
    for name in ("epr", "polynomial"):
        density = DENSITIES[name](FitInputs(lambda x: np.interp(x, t[::2], optimum[::2]), t[::2], 20, 0))
        divergences[name] = kl_divergence(optimum[1::2], np.maximum(density.unnormalized(t[1::2]), 1e-300))
    return divergences


def figure(result: dict[str, Any], title: str) -> Figure:
    picture = Figure(figsize=(7.5, 5))
    axes = picture.add_subplot()
    for name, sizes in result["variants"].items():
        values = np.array([[entry["efficiency"][0] for entry in entries] for entries in sizes.values()])
        (line,) = axes.plot(list(sizes), values.mean(1), "o-", markersize=3, label=name)
        axes.fill_between(list(sizes), values.min(1), values.max(1), alpha=0.12, color=line.get_color())
    axes.axhline(result["uniform"][0], color="grey", linestyle="--", label="uniform t")
    axes.set(xscale="log", xlabel="forwards", ylabel="efficiency (mean and range over seeds)", title=title)
    axes.legend()
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="folder for study.json, study.png and the losses")
    parser.add_argument("--seeds", type=int, default=8, help="calibrations of each kind and size")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="rows of the largest calibration")
    parser.add_argument("--reference", type=int, default=10 * SIZES[-1], help="rows that judge them")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.largest < SIZES[0]:
        raise UserError(f"--largest {options.largest}: the smallest calibration takes {SIZES[0]}")
    base = ["diffusion.t_sampler=ppots", "parallel.pipeline=1", "parallel.tensor=1", "parallel.sequence=false"]
    run_config(options.run_dir)  # says what is wrong with the folder, if anything is
    config = load_config(options.run_dir / "config.yaml", [*base, *options.overrides])
    options.output.mkdir(parents=True, exist_ok=True)
    measured = measure(config, options.run_dir, options)
    config, data = resolve(config)
    maker = calibrator_of(config, data.train)
    views = config.diffusion.rows_per_sample
    result = study(measured, maker, views)
    result["kl_held_out"] = held_out_divergence(measured.reference.moments, maker)
    result["run"] = str(options.run_dir)
    write_json(options.output / "study.json", result)
    save_figure(figure(result, f"P-POTS calibration of {options.run_dir.name}"), options.output / "study.png")
    print(f"uniform {result['uniform'][0]:.4f}; KL on held-out points: {result['kl_held_out']}")
    print(f"{options.output / 'study.json'}, {options.output / 'study.png'}", flush=True)


if __name__ == "__main__":
    run_program(main)
