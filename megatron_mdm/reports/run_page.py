"""One picture of a run: losses with what befell it, optimisation, variance, speed, ranks, and its key facts."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from megatron_mdm.reports import rl_panels
from megatron_mdm.reports.run_facts import fact_lines
from megatron_mdm.reports.run_panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SPEED_PANELS,
    TRAINING_PANELS,
    Page,
    array,
    has_values,
    line,
    not_logged,
    scale,
    step_axis,
)

_STATUS_COLOURS = {"finished": GREEN, "stopped early": RED, "unfinished": ORANGE}
_STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "legend.fontsize": 8.5,
}
RL_PANELS = (TRAINING_PANELS[0], rl_panels.lengths, rl_panels.policy)
_MOST_LINES = 40  # of one kind of event that are drawn through the loss; the rows below it show all
_WIDTH = 52  # characters of a fact


def page_figure(page: Page) -> Figure:
    """The picture of a page, which is what run_summary.run_page returns and run.json holds."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(16, 11.5), layout="constrained")
        name = Path(page["facts"]["folder"]).resolve().name
        figure.suptitle(name, x=0.008, ha="left", fontsize=15, fontweight="bold")
        subfigures: Any = figure.subfigures(3, 1, height_ratios=(1.25, 1, 1))
        top, *below = subfigures
        left, right = top.subfigures(1, 2, width_ratios=(2.05, 1))
        _losses(left, page)
        _facts(right, page["facts"])
        training = RL_PANELS if is_of_rollouts(page) else TRAINING_PANELS
        for row, panels in zip(below, (training, SPEED_PANELS)):
            for axes, draw in zip(row.subplots(1, len(panels)), panels):
                draw(axes, page)
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.1, h_pad=0.08, wspace=0.02)
    return figure


def _losses(figure: SubFigure, page: Page) -> None:
    """The curves, and below them a row of marks for each kind of event that there is."""
    marks = page["marks"]
    rows = [
        (f"{name}: {len(steps)}", steps, style)
        for name, steps, style in (
            ("kept checkpoints", marks["checkpoints"], {"marker": "D", "color": GREEN}),
            ("skipped", marks["skipped"], {"marker": "x", "color": RED}),
            ("spikes", marks["spikes"], {"marker": "^", "color": ORANGE}),
            ("rewinds", [mark["step"] for mark in marks["rewinds"]], {"marker": "<", "color": PURPLE}),
        )
        if steps
    ]
    parts = figure.add_gridspec(1 + bool(rows), 1, height_ratios=(1, 0.05 + 0.05 * len(rows))[: 1 + bool(rows)])
    axes = figure.add_subplot(parts[0])
    (rl_panels.rewards if is_of_rollouts(page) else _loss_curves)(axes, page)
    for kind, colour in (("skipped", RED), ("spikes", ORANGE)):
        for step in marks[kind] if len(marks[kind]) <= _MOST_LINES else []:
            axes.axvline(step, color=colour, linewidth=0.8, alpha=0.4, zorder=0)
    for mark in marks["rewinds"]:
        axes.axvspan(mark["to_step"], mark["step"], color=PURPLE, alpha=0.15, linewidth=0, zorder=0)
    if rows:
        _event_rows(figure.add_subplot(parts[1], sharex=axes), rows, marks["rewinds"])
        axes.tick_params(labelbottom=False)
        axes.set_xlabel("")


def is_of_rollouts(page: Page) -> bool:
    """Whether the run is of reinforcement learning."""
    return "reward" in page["curves"]


def _loss_curves(axes: Axes, page: Page) -> None:
    loss = page["curves"]["loss"]
    validation = page["curves"]["validation"]
    if not has_values(loss["loss"]) and not validation["step"]:
        not_logged(axes, "loss per token")
    else:
        line(axes, loss["step"], loss["loss"], color=BLUE, linewidth=0.7, alpha=0.35, label="training")
        line(axes, loss["step"], loss["loss_smoothed"], color=BLUE, linewidth=1.8, label="training, smoothed")
        if validation["step"]:
            values = array(validation["validation_loss"])
            axes.plot(validation["step"], values, "o-", color=ORANGE, markersize=4, label="validation")
        best = page["facts"]["best_validation"]
        if best and best["step"] is not None:
            label = f"best validation: {best['loss']:.4f} at step {best['step']:,}"
            axes.plot(best["step"], best["loss"], "*", color=RED, markersize=14, label=label, zorder=5, clip_on=False)
        scale(axes, [*loss["loss"], *validation["validation_loss"]])
        axes.set_title("loss per token, nats")
        axes.legend(loc="upper right", ncols=2)
        step_axis(axes, page)


def _event_rows(axes: Axes, rows: list[tuple[str, list[int], dict[str, Any]]], rewinds: list[Page]) -> None:
    for place, (_, steps, style) in enumerate(rows):
        axes.plot(steps, [place] * len(steps), linestyle="", markersize=5, clip_on=False, **style)
        for mark in rewinds if style["marker"] == "<" else []:
            axes.plot([mark["to_step"], mark["step"]], [place, place], color=style["color"], linewidth=1.5)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="step")
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _facts(figure: SubFigure, facts: Page) -> None:
    lines: list[tuple[str, str, str]] = []  # label, text, colour
    for label, text in fact_lines(facts):
        colour = _STATUS_COLOURS[facts["status"]] if label == "state" else "black"
        wrapped = textwrap.wrap(text, _WIDTH) or ["–"]
        lines.extend((label if index == 0 else "", part, colour) for index, part in enumerate(wrapped))
    height = min(0.06, 0.92 / len(lines))
    for index, (label, text, colour) in enumerate(lines):
        y = 0.94 - (index + 0.5) * height
        figure.text(0.03, y, label, color=GREY, va="center")
        figure.text(0.28, y, text, color=colour, va="center")
