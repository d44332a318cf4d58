"""Tasks: how their data is prepared, what is asked, and what counts as a right answer. A new task is one file and one
entry here."""

import argparse
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_mdm.data import text_to_image
from megatron_mdm.data.public_sets import Sets
from megatron_mdm.data.records import Record
from megatron_mdm.evaluation.tasks import countdown, gsm8k, hitab, openscience, sudoku

Preparer = Callable[[Sequence[str], argparse.Namespace], Sets]  # (paths as given, options) → what is written, by name


class Task(NamedTuple):
    prepare: Preparer | None  # None: its data is generated (mdm prepare NAME)
    # (record in the data set's own form, where it is, folder of its file) → (prompt, reference response), as
    # prepare has them; None for a record that was prepared already
    question: Callable[[Record, str, Path], tuple[str, str] | None]
    extract: Callable[[str], str | None]  # a response → its final answer, None where there is none
    reference: Callable[[str], str]  # a reference response → its final answer; ValueError, which says why, without one
    same: Callable[[str, str], bool] = operator.eq  # (predicted, reference) final answers


def _as_prepared(record: Record, where: str, folder: Path) -> None:
    """A Task.question: official or generated records are as they are prepared."""


TASKS: dict[str, Task] = {
    "gsm8k": Task(gsm8k.prepare, _as_prepared, gsm8k.extract_answer, gsm8k.reference_answer),
    "gsm8k_tags": Task(gsm8k.prepare_tagged, gsm8k.tagged_question, gsm8k.extract_tagged, gsm8k.reference_answer),
    "hitab": Task(hitab.prepare, hitab.question, hitab.extract_answer, hitab.reference_answer, hitab.same),
    "openscience": Task(
        openscience.prepare, openscience.question, openscience.extract_answer, openscience.reference_answer
    ),
    "countdown": Task(None, _as_prepared, countdown.extract_answer, countdown.reference_answer, countdown.same),
    "sudoku": Task(None, _as_prepared, sudoku.extract_answer, sudoku.reference_answer),
}
PREPARERS: dict[str, Preparer] = {
    **{name: task.prepare for name, task in TASKS.items() if task.prepare},
    "text-to-image": text_to_image.prepare,
}
