"""What one thing that can be measured of a run is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_mdm.config.schema import RunConfig, Section
from megatron_mdm.data.records import BadRecords
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation.image_scores import RealDigits
from megatron_mdm.evaluation.trained import TrainedFor
from megatron_mdm.parallel.groups import ParallelContext

Result = dict[str, Any]  # of the main rank; others' may be empty
Evaluate = Callable[[Any, ParallelContext], Result]  # of an engine


class Source(NamedTuple):
    """What is asked: the first `limit` records of a file; 0: all. And what images are judged by."""

    path: str
    limit: int
    on_error: str = "stop"  # or "skip": bad records are left out, and counted
    clip: str = ""  # folder of a CLIP model
    digits: RealDigits | None = None


class Measure(NamedTuple):
    settings: type[Section]
    # (source, settings, run's configuration, tokenizer, its objective) → what evaluates an engine. Reading comes first,
    # so that mistakes in the data show before a model is loaded.
    prepare: Callable[[Source, Any, RunConfig, Tokenizer, TrainedFor], Evaluate]
    summary: Callable[[Result], list[str]]
    file: str  # the result's, in the run's folder
    samples_file: str  # of its "samples", a line each
    needs_data: bool = True  # else an empty path stands for the run's own validation data


def left_out(bad: BadRecords) -> Result:
    return {"num_bad": bad.count, "first_bad": bad.first}
