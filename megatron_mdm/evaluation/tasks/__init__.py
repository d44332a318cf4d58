"""Tasks: what counts as a right answer. A new task is one file and one entry here."""

from collections.abc import Callable
from typing import NamedTuple

from megatron_mdm.evaluation.tasks import gsm8k


class Task(NamedTuple):
    extract: Callable[[str], str | None]  # a response → its final answer, None where there is none


TASKS: dict[str, Task] = {"gsm8k": Task(gsm8k.extract_answer)}
