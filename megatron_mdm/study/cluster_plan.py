"""What a study would take on a cluster: GPU hours by task and method, beside hours that others have published."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.study.runs import Point, Study
from megatron_mdm.study.tables import NONE, Table
from megatron_mdm.training.plan.cluster import Cluster
from megatron_mdm.training.plan.plan import Plan, Samples, make_plan
from megatron_mdm.training.plan.timing import ASSUMPTIONS


class Row(NamedTuple):
    """Hours of one run by the clock of the whole cluster."""

    task: str
    method: str
    hours: float
    gpu_hours: float
    ratio: float  # to the standard method's; NaN without it
    least_ratio: float  # the same, where the calibration stops as early as it may
    published: float  # hours; NaN where none are
    published_ratio: float


def planned_rows(study: Study, cluster: Cluster) -> list[Row]:
    """One of each task and method that the study has runs of at equal samples. Raises UserError where a run does not
    fit the cluster."""
    rows = []
    for task, settings in study.settings.tasks.items():
        plans = {method: _plan(study, cluster, task, method) for method in _methods(study, task)}
        hours = {method: plan.days * 24 for method, plan in plans.items()}
        published = settings.plan.hours
        standard = study.settings.claims.standard
        for method, own in hours.items():
            least, most = plans[method].calibration
            early = own - (most - least) / 3600
            rows.append(
                Row(
                    task,
                    method,
                    own,
                    own * cluster.world_size,
                    own / hours.get(standard, math.nan),
                    early / hours.get(standard, math.nan),
                    published.get(method, math.nan),
                    published.get(method, math.nan) / published.get(standard, math.nan),
                )
            )
    return rows


def plan_table(rows: list[Row]) -> Table:
    cells = []
    for row in rows:
        numbers = (row.hours, row.gpu_hours, row.ratio, row.least_ratio, row.published, row.published_ratio)
        cells.append((row.task, row.method, *(NONE if math.isnan(number) else f"{number:.2f}" for number in numbers)))
    header = (
        "task",
        "method",
        "hours",
        "GPU hours",
        "to Standard's",
        "at least",
        "published hours",
        "published to Standard's",
    )
    note = "Without the answers to the test sets. At least: where the calibration stops as early as it may."
    return Table("plan", "Hours of one run on the cluster", header, cells, note)


def total_lines(study: Study, rows: list[Row], cluster: Cluster) -> list[str]:
    """What the whole study takes, and what is assumed."""
    of = {(row.task, row.method): row.gpu_hours for row in rows}
    runs = [run.point for run in study.runs()]
    total = 0.0
    for point in runs:
        method = point.pace or point.method
        total += of.get((point.task, method), math.nan) * (1.0 if point.pace else point.batch_factor)
    days = total / cluster.world_size / 24
    size = f"{len(runs)} runs, {total:,.0f} GPU hours, {days:.1f} days of {cluster.world_size} GPUs"
    price = f", {total * cluster.price_per_gpu_hour:,.0f} in money" if cluster.price_per_gpu_hour else ""
    return [
        f"the whole study: {size}{price}",
        "assumed:",
        *(f"  - {line}" for line in ASSUMPTIONS),
    ]


def _methods(study: Study, task: str) -> Iterator[str]:
    asked = {run.point.method for run in study.runs() if run.point.task == task}
    asked |= {run.point.pace for run in study.runs() if run.point.task == task and run.point.pace}
    return (method for method in study.settings.methods if method in asked)


def _plan(study: Study, cluster: Cluster, task: str, method: str) -> Plan:
    given = study.settings.tasks[task].plan
    samples = Samples(given.samples, given.mean_length, given.eligible)
    try:
        plan = make_plan(study.recipe(Point(task, method, study.settings.seeds[0])).load(), cluster, samples)
    except UserError as error:
        raise UserError(f"{task} by {method}: {error}") from None
    if not plan.is_feasible:
        raise UserError(f"{task} by {method} does not fit: {plan.obstacle}")
    if math.isnan(plan.days):
        raise UserError(f"'tasks.{task}.plan.samples': how many samples a run trains on is not said")
    return plan
