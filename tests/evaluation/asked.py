"""Questions of a file as evaluation reads them."""

from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.records import BadRecords
from megatron_mdm.evaluation.exact_match import read_questions
from megatron_mdm.evaluation.tasks import TASKS
from tests.small import word_tokenizer


def questions(path: str, task: str) -> list[tuple[str, str]]:
    """(prompt, final answer) of each record."""
    data = DataConfig(train="", max_length=64)
    found = read_questions(path, TASKS[task], 0, word_tokenizer(), data, BadRecords())
    return [(question.prompt.turns[0].content, question.answer) for question in found]
