"""The report behind `mdm report rl-variance`: noise and bias of an update's gradient, for every design of its noise."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.checkpoint.choice import choose
from megatron_mdm.checkpoint.load import checkpoint_identity, load_for_gradients, run_config, run_tokenizer
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256, write_json
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.t_samplers import TabulatedSampler, TSampler, UniformSampler
from megatron_mdm.engine.inference import InferenceEngine
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.parallel.groups import initialize
from megatron_mdm.reports.plots import rl_variance_figure, save_figure
from megatron_mdm.rl.designs import DENSITY_FROM, DESIGNS, FIRST, Design, config_of, target
from megatron_mdm.rl.gradient_draws import Weights, draw, with_signal
from megatron_mdm.rl.rollouts import ROLLOUTS, Rollout, recorded
from megatron_mdm.rl.settings import Counts
from megatron_mdm.rl.variance import Measured, Sums, fitted_density, measured

TARGET = "target"  # the name of g*'s file, and of its mean's


def report_rl_variance(options: argparse.Namespace) -> None:
    """Measure, print, and write rl_variance.json and rl_variance.png. Each design's sums are kept in a file, so that an
    interrupted report goes on where it was."""
    folder: Path = options.folder
    run_config(folder)  # says what is wrong with the folder, if anything is
    base = ["parallel.pipeline=1", "parallel.tensor=1", "parallel.sequence=false", *options.overrides]
    config = load_config(folder / "config.yaml", base)
    if not config.rl.is_used:
        raise UserError(
            f"{folder}: the run has no section 'rl' with rewards; there are no rollouts to take gradients of"
        )
    names = _chosen(options.designs)
    path = options.rollout or _rollout_of(folder, options.checkpoint, config)
    rollout = with_signal(recorded(path.parent, int(path.stem)), options.groups, str(path))
    context = initialize()
    engine = load_for_gradients(folder, config, context, options.checkpoint)
    old = load_for_gradients(folder, config, context, options.old) if options.old else None
    weights = Weights(engine, old, SpecialIds.of(run_tokenizer(folder, config)), context)
    output: Path = options.output or folder / "rl_variance"
    output.mkdir(parents=True, exist_ok=True)
    identity = {
        **checkpoint_identity(folder, engine.source),
        "old": checkpoint_identity(folder, old.source) if isinstance(old, InferenceEngine) else {},
        "rollout (sha256)": sha256(path),
        "groups": options.groups,
        "settings": config.rl.model_dump(mode="json", include={"scope", "tail", "epsilon", "epsilon_high", "delta"}),
    }
    study = Study(weights, config, rollout, output, identity)
    wanted = study.target(options.target_rows, options.target_draws)
    found = {name: study.sums(name, DESIGNS[name], options.draws) for name in names}
    kinds = {name: DESIGNS[name].kind for name in found}
    if old is not None:  # clipped ratios of tokens and of completions have means of their own
        kinds = {name: kind._replace(exact=False) for name, kind in kinds.items()}
    rows = {name: measured(sums, kinds[name], found[FIRST], kinds[FIRST], wanted) for name, sums in found.items()}
    record = {
        "run": str(folder),
        **identity,
        "draws": options.draws,
        "ratio": "1" if old is None else "of the two checkpoints",
        "target_rows": options.target_rows * options.target_draws,
        "designs": [
            {"name": name, "rows": found[name].rows, **{key: values.tolist() for key, values in row._asdict().items()}}
            for name, row in rows.items()
        ],
    }
    _print_table(rows, found)
    write_json(output / "rl_variance.json", record)
    save_figure(rl_variance_figure(record), output / "rl_variance.png")
    print(f"{output / 'rl_variance.json'}, {output / 'rl_variance.png'}", flush=True)


class Study:
    """Draws that are kept, by what they are of."""

    def __init__(
        self, weights: Weights, config: RunConfig, rollout: Rollout, folder: Path, identity: dict[str, Any]
    ) -> None:
        self.weights = weights
        self.config = config
        self.rollout = rollout
        self.folder = folder
        self.identity = identity
        self._target: tuple[Sums, np.ndarray] | None = None

    def target(self, rows: int, num_draws: int) -> Sums:
        """g*'s draws, with other random numbers than the designs'."""
        self._target = self._kept(TARGET, target(rows), num_draws, self.config.seed + 1)
        return self._target[0]

    def sums(self, name: str, design: Design, num_draws: int) -> Sums:
        return self._kept(name, design, num_draws, self.config.seed)[0]

    def _kept(self, name: str, design: Design, num_draws: int, seed: int) -> tuple[Sums, np.ndarray]:
        """From its file if that is of the same weights, completions and design, else drawn and kept."""
        sampler, density = self._sampler(design, num_draws)
        path = self.folder / f"{''.join(letter if letter.isalnum() else '_' for letter in name)}.npz"
        drawn = {key: value for key, value in design._asdict().items() if key != "exact"}
        stamp = json.dumps([self.identity, drawn, num_draws, seed, density, self._target_stamp(name)], sort_keys=True)
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                if str(file["stamp"]) == stamp and set(Sums.names()) <= set(file.files):
                    return Sums.of(file), file["mean_gradient"]
        config = config_of(self.config, design, self.rollout.num_groups)
        wanted = None if self._target is None else self._target[1]
        sums, mean = draw(self.weights, config, self.rollout, sampler, num_draws, seed, wanted, name)
        kept = mean if name == TARGET else np.empty(0)
        temporary = path.with_suffix(".tmp.npz")
        arrays: dict[str, Any] = {**sums.arrays(), "mean_gradient": kept, "stamp": np.array(stamp)}
        np.savez(temporary, **arrays)
        temporary.rename(path)
        return sums, kept

    def _sampler(self, design: Design, num_draws: int) -> tuple[TSampler, list[float]]:
        """The density of rates, and as numbers."""
        if not design.ppots:
            return UniformSampler(), []
        density = fitted_density(self.sums(DENSITY_FROM, DESIGNS[DENSITY_FROM], num_draws))
        return TabulatedSampler(density), density.tolist()

    def _target_stamp(self, name: str) -> float:
        """Tells which g* inner products are with."""
        return 0.0 if name == TARGET or self._target is None else self._target[0].mean_square


def _chosen(designs: str) -> list[str]:
    """Names of designs, the first one always among them."""
    names = [name.strip() for name in designs.split(";") if name.strip()] or list(DESIGNS)
    unknown = [name for name in names if name not in DESIGNS]
    if unknown:
        raise UserError(f"--designs: no '{unknown[0]}'; there are: {'; '.join(DESIGNS)}")
    return [FIRST, *(name for name in names if name != FIRST)]


def _rollout_of(folder: Path, checkpoint: str, config: RunConfig) -> Path:
    """The recorded rollout that a checkpoint's next step trains on, else the last recorded one."""
    step = int(choose(folder, checkpoint).path.name.removeprefix("step-"))
    files = sorted((folder / ROLLOUTS).glob("[0-9]*.npz"))
    if not files:
        raise UserError(
            f"{folder / ROLLOUTS}: no recorded rollouts; train with rl.record=true, or name one by --rollout"
        )
    wanted = [path for path in files if int(path.stem) == step // Counts.of(config).steps]
    return wanted[0] if wanted else files[-1]


def _print_table(rows: dict[str, Measured], sums: dict[str, Sums]) -> None:
    print(
        f"{'design':44s} rows    noise  relative (90 %)           at equal rows   cosine (90 %)            alignment",
        flush=True,
    )
    first_rows = sums[FIRST].rows
    for name, row in rows.items():
        relative, cosine = row.relative_noise, row.cosine
        equal = relative[0] * sums[name].rows / first_rows
        print(
            f"{name:44s} {sums[name].rows:4d} {row.noise[0]:8.3f}  {relative[0]:.3f} ({relative[1]:.3f} to "
            f"{relative[2]:.3f})   {equal:10.3f}   {cosine[0]:9.3f} ({cosine[1]:.3f} to {cosine[2]:.3f})   "
            f"{row.alignment[0]:.3f}"
        )
