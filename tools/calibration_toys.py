"""What P-POTS calibrations reach on losses whose best density is known, and whether they admit it.

python tools/calibration_toys.py --output runs/calibration_toys

For each toy of megatron_mdm/diffusion/toys.py: the true efficiency of fitted densities at equal forwards, of the
defaults and of the paper's preset (nested grid, naive moments, EPR, floor 0.02), and how often the 5 % lower bound that
the calibration itself reports is at or below the truth. --adaptive lets the defaults stop by themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import CalibrationConfig
from megatron_mdm.diffusion.calibrator import Calibrator
from megatron_mdm.diffusion.prepass import DESIGNS
from megatron_mdm.diffusion.t_samplers import UniformSampler
from megatron_mdm.diffusion.toys import TOYS, Toy, ToyMeasurement
from megatron_mdm.parallel.program import run_program
from megatron_mdm.reports.plots import save_figure

NUM_SAMPLES = 7473  # of the toys' data set; GSM8K's
PAPER = {"estimator": "naive", "density": "epr", "target": "paper", "uniform_floor": 0.02}
PAPER_SIZES = {1024: (4, 64, 4), 15750: (15, 70, 15)}  # forwards → (samples, times, masks)


def calibrations(toy: Toy, seeds: range, settings: CalibrationConfig) -> dict[str, Any]:
    """Of one toy, one for each seed: truth, bound, forwards, in lists; and their summary."""
    truth = []
    bound = []
    forwards = []
    for seed in seeds:
        calibrator = Calibrator(settings, toy.exposures(), seed)
        measure = ToyMeasurement(toy, NUM_SAMPLES, seed)
        calibration = DESIGNS[settings.estimator](measure, calibrator, NUM_SAMPLES, toy.design.views)
        truth.append(toy.efficiency(calibration.fit.sampler))
        bound.append(calibration.rounds[-1]["lower"])
        forwards.append(calibration.rounds[-1]["forwards"])
    held = np.array(bound) <= np.array(truth)
    return {
        "mean": float(np.mean(truth)),
        "worst": float(np.min(truth)),
        "mean_bound": float(np.mean(bound)),
        "bound_held": float(held.mean()),
        "mean_forwards": float(np.mean(forwards)),
        "truth": truth,
        "bound": bound,
        "forwards": forwards,
    }


def study(toy: Toy, options: argparse.Namespace) -> dict[str, Any]:
    """One toy's row."""
    adaptive = {} if options.adaptive else {"initial_forwards": options.forwards, "target_efficiency": 0.0}
    result: dict[str, Any] = {
        "uniform": toy.efficiency(UniformSampler()),
        "default": calibrations(toy, range(options.calibrations), CalibrationConfig(**adaptive)),
    }
    for forwards, (num_samples, num_times, num_masks) in PAPER_SIZES.items():
        sizes = {"num_samples": num_samples, "num_times": num_times, "num_masks": num_masks}
        settings = CalibrationConfig.model_validate({**PAPER, **sizes})
        result[f"paper_{forwards}"] = calibrations(toy, range(options.paper), settings)
    return result


def figure(rows: dict[str, dict[str, Any]]) -> Figure:
    """True efficiencies and the bounds that calibrations reported, toy by toy."""
    picture = Figure(figsize=(9, 0.5 * len(rows) + 1.5))
    axes = picture.add_subplot()
    for place, row in enumerate(rows.values()):
        marks = {"defaults: truth": row["default"]["truth"], "defaults: reported bound": row["default"]["bound"]}
        marks["paper's, 1,024 forwards: truth"] = row["paper_1024"]["truth"]
        for offset, (label, values) in enumerate(marks.items()):
            heights = np.full(len(values), place + 0.2 * offset)
            axes.plot(values, heights, "|", color=f"C{offset}", alpha=0.4, label=None if place else label)
        axes.plot(row["uniform"], place + 0.2, "kx", label=None if place else "uniform t")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel="efficiency", xlim=(0.0, 1.0))
    axes.invert_yaxis()
    axes.legend(loc="lower left")
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for toys.json and toys.png")
    parser.add_argument("--forwards", type=int, default=1024, help="rows of each calibration with the defaults")
    parser.add_argument("--adaptive", action="store_true", help="let the defaults choose their forwards")
    parser.add_argument("--calibrations", type=int, default=200, help="for each toy, with the defaults")
    parser.add_argument("--paper", type=int, default=20, help="for each toy, with the paper's preset at each size")
    parser.add_argument("--mirror", action="store_true", help="calibrate the mean of complementary pairs")
    parser.add_argument("--toy", action="append", choices=list(TOYS), help="only this one; may be repeated")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in options.toy or TOYS:
        row = study(dataclasses.replace(TOYS[name], complementary=options.mirror), options)
        rows[name] = row
        ours = row["default"]
        paper = row["paper_1024"]
        whole = row["paper_15750"]
        print(
            f"{name:20s} uniform {row['uniform']:.3f}; {ours['mean_forwards']:.0f} forwards: {ours['mean']:.3f}, worst "
            f"{ours['worst']:.3f}, bound {ours['mean_bound']:.3f} held in {ours['bound_held']:.1%}; paper's "
            f"{paper['mean']:.3f}, worst {paper['worst']:.3f} (15,750: {whole['mean']:.3f}), held in "
            f"{paper['bound_held']:.0%} ({whole['bound_held']:.0%})",
            flush=True,
        )
    write_json(options.output / "toys.json", {"options": {**vars(options), "output": ""}, "toys": rows})
    save_figure(figure(rows), options.output / "toys.png")
    print(f"{options.output / 'toys.json'}, {options.output / 'toys.png'}", flush=True)


if __name__ == "__main__":
    run_program(main)
