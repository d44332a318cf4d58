"""The panels of a run's page. Each draws one axes from the page's values, or says that they were not logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_mdm.engine.clock import PHASES
from megatron_mdm.reports.plots import VARIANCES, plain_ticks

Page = dict[str, Any]

BLUE = "#3566a8"
ORANGE = "#d9822b"
GREEN = "#3a8f5c"
RED = "#c0392b"
PURPLE = "#7a5ea8"
GREY = "#7f8790"
_PALE_BLUE = "#8fb4de"
_PALE_GREY = "#c9ced4"
_TIME_COLOURS = dict(zip(PHASES, (PURPLE, BLUE, _PALE_BLUE, ORANGE, GREEN, _PALE_GREY)))
_OTHER_COLOURS = ("#2b7a78", "#c9a227", "#8c564b", "#bc80bd", "#b3de69")  # of phases that few runs have
_VARIANCE_COLOURS = dict(zip(VARIANCES, (ORANGE, _PALE_BLUE, BLUE)))
_LOG_FROM = 3.0  # greatest / least value from which an axis is logarithmic
_PEAK = 1.5  # times the median: step times above it (the first steps') may leave the picture
_FEW_POINTS = 8
_MANY_POINTS = 200  # from which a noisy curve is drawn thin, with its smoothed one
_MANY_RANKS = 40  # from which bars touch and carry no line of their spread


def _optimisation(axes: Axes, page: Page) -> None:
    curve = page["curves"]["loss"]
    title = "gradient norm, learning rate"
    if not has_values(curve["grad_norm"]) and not has_values(curve["lr"]):
        return not_logged(axes, title)
    _noisy(axes, curve, "grad_norm", BLUE)
    scale(axes, curve["grad_norm"])
    axes.set_title(title)
    step_axis(axes, page)
    axes.set_ylabel("gradient norm", color=BLUE)
    rate = _twin(axes, "learning rate")
    line(rate, curve["step"], curve["lr"], color=ORANGE, linewidth=1.5)
    rate.set_ylim(0, None)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return None


def _variance(axes: Axes, page: Page) -> None:
    curve = page["curves"]["variance"]
    title = "variance between log lines"
    if not curve["step"]:
        return not_logged(axes, title)
    shown = [key for key in VARIANCES if has_values(curve[key])]
    for key in shown:
        _noisy(axes, curve, key, _VARIANCE_COLOURS[key], VARIANCES[key])
    scale(axes, [value for key in shown for value in curve[key]])
    axes.set_title(title)
    step_axis(axes, page)
    axes.legend(loc="upper right")
    return None


def _loss_by_t(axes: Axes, page: Page) -> None:
    curve = page["curves"]["loss_by_t"]
    title = "loss by mask rate t"
    method = page["facts"]["method"]
    if not method["has_rates"]:
        return not_logged(axes, title, f"t has no meaning:\n{method['text']}")
    if not curve["step"]:
        return not_logged(axes, title)
    values = np.ma.masked_invalid(np.array(curve["loss_by_t"], dtype=float).T)
    steps = np.array(curve["step"])
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else steps[0])
    low, high = (float(values.min()), float(values.max())) if values.count() else (0.0, 1.0)
    norm = LogNorm(low, high) if 0 < low * _LOG_FROM <= high else Normalize(low, high)
    edges = np.linspace(0, 1, len(values) + 1)
    image = axes.pcolormesh([max(0, first), *steps], edges, values, cmap="viridis", norm=norm, rasterized=True)
    axes.set(title=title, ylabel="mask rate t", facecolor="#d8dbdf")
    step_axis(axes, page)
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, label="mean loss, nats")
    plain_ticks(bar.ax.yaxis, high / low if low > 0 else 1.0, isinstance(norm, LogNorm))
    bar.outline.set_visible(False)
    return None


def _throughput(axes: Axes, page: Page) -> None:
    curve = page["curves"]["throughput"]
    title = "tokens/s, MFU"
    if not curve["step"]:
        return not_logged(axes, title)
    line(axes, curve["step"], curve["tokens_per_second"], color=BLUE, linewidth=1.1)
    axes.set(title=title, ylim=(0, None))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    step_axis(axes, page)
    axes.set_ylabel("tokens/s", color=BLUE)
    if has_values(curve["mfu"]):
        share = _twin(axes, "MFU, %")
        line(share, curve["step"], 100 * array(curve["mfu"]), color=ORANGE, linewidth=1.1)
        share.set_ylim(0, None)
    else:
        _remark(axes, "MFU not logged")
    return None


def _step_time(axes: Axes, page: Page) -> None:
    curve = page["curves"]["step_time"]
    title = "time of a step, rank 0"
    if not curve["step"]:
        return not_logged(axes, title)
    names = [key.removeprefix("time_") for key in curve if key.startswith("time_") and key != "time_step"]
    parts = {part: np.nan_to_num(array(curve[f"time_{part}"])) for part in names}
    always = set(PHASES) - {"pipeline"}
    parts = {part: values for part, values in parts.items() if part in always or values.any()}
    factor, unit = _seconds_unit(np.median(sum(parts.values())))
    others = iter(_OTHER_COLOURS)
    colours = [_TIME_COLOURS.get(part) or next(others) for part in parts]
    layers = [factor * values for values in parts.values()]
    steps = curve["step"]
    if len(steps) == 1:  # no area without a second
        steps = [0, *steps]
        layers = [np.repeat(layer, 2) for layer in layers]
    axes.stackplot(steps, layers, labels=list(parts), colors=colours, linewidth=0)
    highest = float(np.max(sum(layers)))
    most = _PEAK * float(np.median(sum(layers)))
    axes.set(title=title, ylabel=unit, ylim=(0, 1.3 * max(1e-9, min(highest, most))))
    if highest > 1.3 * most:
        _remark(axes, f"highest: {highest:,.4g}")
    step_axis(axes, page)
    axes.legend(loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.2)
    return None


def _busy(axes: Axes, page: Page) -> None:
    """Stacked bars of the last profiled step; over them, a line of the spread over all profiled steps."""
    ranks = page["ranks"]
    title = "busy and communication, by rank"
    if ranks["busy"] is None and ranks["communication"] is None:
        return not_logged(axes, title)
    busy = array(ranks["busy"] or [0.0] * len(ranks["communication"]))
    communication = array(ranks["communication"] or [0.0] * len(busy))
    factor, unit = _seconds_unit(busy + np.nan_to_num(communication))
    named = sorted({mark["rank"] for mark in page["marks"]["stragglers"] if mark["rank"] < len(busy)})
    _bars(axes, factor * busy, BLUE, "busy")
    if ranks["communication"] is not None:
        _bars(axes, factor * communication, _PALE_GREY, "communication", factor * busy)
    if named:
        axes.bar(named, factor * busy[named], 0.8, color=RED)
        tops = factor * (busy + communication)[named] + 0.03 * axes.dataLim.y1
        axes.plot(named, tops, "v", color=RED, markersize=7, label="named a straggler")
    median = factor * float(np.nanmedian(busy))
    axes.axhline(median, color="black", linewidth=0.9, linestyle=":", label="median busy")
    spread = ranks["busy_spread"]
    if spread and ranks["num_samples"] > 1 and len(busy) < _MANY_RANKS:
        low, high = factor * np.array(spread).T
        axes.vlines(
            np.arange(len(busy)), low, high, color="black", linewidth=1.2, label=f"10–90 %, n = {ranks['num_samples']}"
        )
    slowest = ranks["slowest_rank"]
    axes.set(title=title, xlabel=f"rank{'' if slowest is None else f' (slowest: {slowest})'}", ylabel=unit)
    axes.set_ylim(0, 1.42 * axes.dataLim.y1)
    _rank_ticks(axes)
    axes.legend(loc="upper center", ncols=2, columnspacing=1.0, handlelength=1.2)
    return None


def _memory(axes: Axes, page: Page) -> None:
    memory = page["ranks"]["memory_gib"]
    title = "peak memory, by rank"
    if memory is None:
        return not_logged(axes, title)
    _bars(axes, array(memory), GREEN)
    axes.set(title=title, xlabel=f"rank (greatest: {np.nanmax(array(memory)):.3g} GiB)", ylabel="GiB", ylim=(0, None))
    _rank_ticks(axes)
    return None


def _noisy(axes: Axes, curve: Page, key: str, colour: str, label: str = "") -> None:
    """A curve as it is while its points are few; else pale, with the smoothed one over it."""
    many = len(curve["step"]) >= _MANY_POINTS
    if many:
        line(axes, curve["step"], curve[key], color=colour, linewidth=0.6, alpha=0.25)
    values, width = (curve[f"{key}_smoothed"], 1.5) if many else (curve[key], 1.1)
    line(axes, curve["step"], values, color=colour, linewidth=width, label=label)


def line(axes: Axes, steps: list[int], values: list[float | None], **style: Any) -> None:
    """A line; its points are marked where they are few, since a single one makes no line."""
    marks: dict[str, Any] = {"marker": "o", "markersize": 4, "clip_on": False} if len(steps) <= _FEW_POINTS else {}
    axes.plot(steps, array(values), **style, **marks)


def _bars(axes: Axes, heights: Any, colour: str, label: str = "", bottom: Any = 0.0) -> None:
    """A bar for each rank; of many ranks, the outline that their bars would have."""
    places = np.arange(len(heights))
    if len(heights) < _MANY_RANKS:
        axes.bar(places, heights, 0.8, bottom=bottom, color=colour, label=label)
    else:
        axes.fill_between(places, bottom, bottom + heights, step="mid", color=colour, linewidth=0, label=label)


def not_logged(axes: Axes, title: str, why: str = "not logged") -> None:
    axes.set(title=title, xticks=[], yticks=[], facecolor="#f4f5f6")
    axes.spines[:].set_visible(False)
    axes.text(0.5, 0.5, why, color=GREY, ha="center", va="center", fontsize=12, transform=axes.transAxes)


def _remark(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="right", fontsize=8.5, fontweight="normal", color=GREY)


def _twin(axes: Axes, label: str) -> Axes:
    twin = axes.twinx()
    twin.grid(visible=False)
    twin.set_ylabel(label, color=ORANGE)
    return twin


def scale(axes: Axes, values: list[float | None]) -> None:
    """Make the axis logarithmic where the values span much and allow it; ticks as plain numbers."""
    finite = array(values)[np.isfinite(array(values))]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() >= _LOG_FROM:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, finite.max() / finite.min(), True)


def _rank_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)


def _seconds_unit(values: Any) -> tuple[float, str]:
    return (1.0, "seconds") if np.nanmax(values, initial=0.0) >= 1.0 else (1000.0, "milliseconds")


def step_axis(axes: Axes, page: Page) -> None:
    axes.set(xlabel="step", xlim=(0, max(1, page["facts"]["steps"])))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"


def has_values(values: list[float | None]) -> bool:
    return any(value is not None for value in values)


def array(values: Any) -> Any:
    """Values as floats [n]; None → nan."""
    return np.array(values, dtype=float)


TRAINING_PANELS: tuple[Callable[[Axes, Page], None], ...] = (_optimisation, _variance, _loss_by_t)
SPEED_PANELS: tuple[Callable[[Axes, Page], None], ...] = (_throughput, _step_time, _busy, _memory)
