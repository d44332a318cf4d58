"""Pictures of a run. Matplotlib figures; save_figure writes them as PNG.

Matplotlib is imported where something is drawn: half a second of a program's start, and most ranks draw nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mdm.config.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VARIANCES = {  # keys of metrics.jsonl → what is drawn of them
    "variance_of_loss": "loss under uniform t",
    "variance_of_term": "a sample's term in the batch's loss",
    "variance_of_estimator": "n · batch's loss",
}


def empty_figure(width: float, height: float) -> Figure:
    """In inches."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    return Figure(figsize=(width, height))


def save_figure(figure: Figure, path: Path, *, cut: bool = True) -> None:
    """cut: to what is drawn, for which it is drawn twice; a figure that sets its own margins needs no cutting."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight" if cut else None)
    write_atomically(path, buffer.getvalue())


def calibration_figure(artifact: dict[str, Any]) -> Figure:
    """The optimum as calibrated and the density that is sampled, with its efficiency on held-out losses."""
    figure = empty_figure(7, 4.5)
    axes = figure.add_subplot()
    points = artifact["points"]
    density = np.array(artifact["cell_density"])
    centres = (np.arange(len(density)) + 0.5) / len(density)
    axes.plot(points["t"], points["optimal_density"], "o", markersize=3, label="calibrated optimum")
    axes.plot(
        centres, density, label=f"sampled p(t) ({artifact['density']}, uniform floor {artifact['uniform_floor']:g})"
    )
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--", label="uniform")
    axes.set(xlabel="mask rate t", ylabel="density p(t)", xlim=(0, 1), ylim=(0, None))
    axes.set_title(
        f"P-POTS calibration: efficiency {artifact['efficiency']:.3f} on held-out losses, 5 % bound "
        f"{artifact['efficiency_interval'][0]:.3f}, uniform t {artifact['efficiency_of_uniform']:.3f}",
        fontsize="medium",
    )
    axes.legend()
    return figure


def training_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Loss, validation loss, variances and losses by t over the steps of metrics.jsonl."""
    figure = empty_figure(12, 8)
    train = [record for record in records if "loss" in record]
    validated = [record for record in records if "validation_loss" in record]
    step = [record["step"] for record in train]

    axes = figure.add_subplot(2, 2, 1)
    axes.plot(step, [record["loss"] for record in train], linewidth=0.8, label="training (importance-weighted)")
    axes.plot(
        [record["step"] for record in validated],
        [record["validation_loss"] for record in validated],
        "o-",
        markersize=3,
        label="validation (fixed grid of t)",
    )
    axes.set(xlabel="step", ylabel="loss per token, nats")
    _logarithmic(axes)
    axes.legend()

    axes = figure.add_subplot(2, 2, 2)
    for key, label in VARIANCES.items():
        axes.plot(step, np.array([record.get(key) for record in train], dtype=float), label=label)
    axes.set(xlabel="step", ylabel="variance in the window")
    _logarithmic(axes)
    axes.legend()

    axes = figure.add_subplot(2, 2, 3)
    bins = np.array([record["loss_by_t"] for record in train], dtype=float).T  # null → nan
    if bins.size:
        image = axes.imshow(bins, origin="lower", aspect="auto", extent=(step[0], step[-1] + 1, 0, 1), cmap="viridis")
        figure.colorbar(image, ax=axes, label="loss")
    axes.set(xlabel="step", ylabel="mask rate t")

    axes = figure.add_subplot(2, 2, 4)
    axes.plot(step, [record["grad_norm"] for record in train], linewidth=0.8, label="gradient norm")
    axes.set(xlabel="step", ylabel="gradient norm")
    _logarithmic(axes)
    rate = axes.twinx()
    rate.plot(step, [record["lr"] for record in train], color="tab:orange")
    rate.set_ylabel("learning rate", color="tab:orange")
    figure.subplots_adjust(left=0.06, right=0.94, bottom=0.06, top=0.98, hspace=0.18, wspace=0.22)
    return figure


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    plain_ticks(axes.yaxis, top / bottom, True)


def plain_ticks(axis: Any, ratio: float, logarithmic: bool) -> None:
    """Plain numbers at an axis's ticks: typesetting powers of ten is most of the drawing. ratio: of the greatest value
    on it to the least; of a logarithmic axis, it says how many ticks there are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if logarithmic:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 300 else (1.0,)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def variance_figure(record: dict[str, Any]) -> Figure:
    """The picture of tools/report.py variance: the decomposition, and each method's variances over the standard's."""
    methods = sorted(record["methods"], key=lambda method: -method["gradient"][0])
    figure = empty_figure(13, 1.5 + 0.3 * len(methods))
    axes = figure.add_subplot(1, 3, 1)
    names = {"masks": "A: masks", "rate": "B: rate t", "data": "C: data"}
    values = np.array([record["decomposition"][key] for key in names])
    error = np.abs(values[:, 1:] - values[:, :1]).T
    axes.bar(list(names.values()), values[:, 0], yerr=error, capsize=4, color=["tab:blue", "tab:orange", "tab:green"])
    axes.set(ylabel="variance of the loss", title="Var(l) = A + B + C")
    places = np.arange(len(methods))
    for column, kind in ((2, "loss"), (3, "gradient")):
        axes = figure.add_subplot(1, 3, column)
        for offset, label, factor in ((0.2, "equal samples", False), (-0.2, "equal compute", True)):
            bars = np.array([method[kind] for method in methods])
            bars = bars * np.array([[method["passes"] if factor else 1] for method in methods])
            error = np.abs(bars[:, 1:] - bars[:, :1]).T
            axes.barh(places + offset, bars[:, 0], 0.38, xerr=error, label=label)
        axes.axvline(1.0, color="grey", linestyle="--", linewidth=0.8)
        axes.set_yticks(places, [method["name"] for method in methods] if column == 2 else [], fontsize=8)
        axes.set(title=f"variance of the {kind} / standard")
        axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def rl_variance_figure(record: dict[str, Any]) -> Figure:
    """The picture of mdm report rl-variance: each design's noise, over the first one's, and its cosine and alignment
    with the exact gradient."""
    designs = record["designs"][::-1]
    figure = empty_figure(13, 1.5 + 0.3 * len(designs))
    places = np.arange(len(designs))
    first_rows = record["designs"][0]["rows"]
    axes = figure.add_subplot(1, 2, 1)
    for offset, label, by_rows in ((0.2, "an update", False), (-0.2, "an update, times its rows", True)):
        factor = np.array([[design["rows"] / first_rows if by_rows else 1.0] for design in designs])
        bars = np.array([design["relative_noise"] for design in designs]) * factor
        axes.barh(places + offset, bars[:, 0], 0.38, xerr=np.abs(bars[:, 1:] - bars[:, :1]).T, label=label)
    axes.axvline(1.0, color="grey", linestyle="--", linewidth=0.8)
    axes.set_yticks(places, [design["name"] for design in designs], fontsize=8)
    axes.set_xscale("log")
    axes.set(title=f"noise of the gradient / that of {record['designs'][0]['name']}")
    axes.legend(fontsize=8)
    axes = figure.add_subplot(1, 2, 2)
    for offset, key in ((0.2, "cosine"), (-0.2, "alignment")):
        bars = np.array([design[key] for design in designs])
        axes.barh(places + offset, bars[:, 0], 0.38, xerr=np.abs(bars[:, 1:] - bars[:, :1]).T, label=key)
    axes.set_yticks(places, [])
    axes.set(title="with the exact gradient")
    axes.legend(fontsize=8)
    figure.tight_layout()
    return figure
