"""Tasks: what is asked, and what counts as a right answer. A new task is one file and one entry here."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_mdm.evaluation.tasks import gsm8k, hitab, openscience


def _nothing(_: dict[str, Any]) -> None:
    return None


class Task(NamedTuple):
    extract: Callable[[str], str | None]  # a response → its final answer, None where there is none
    same: Callable[[str, str], bool] = operator.eq  # (predicted, reference) final answers
    # (prompt, reference response) of a record in the data set's own form; None: question/answer or prompt/response
    question: Callable[[dict[str, Any]], tuple[str, str] | None] = _nothing


TASKS: dict[str, Task] = {
    "gsm8k": Task(gsm8k.extract_answer),
    "hitab": Task(hitab.extract_answer, hitab.same, hitab.question),
    "openscience": Task(openscience.extract_answer),
}
