"""HiTab: questions about hierarchical tables, answered in `\\boxed{…}`."""

from typing import Any

from megatron_mdm.evaluation.tasks.boxed import boxed_content, cleaned

INSTRUCTION = "Answer the question about the table. Put the final answer in \\boxed{}."


def question(record: dict[str, Any]) -> tuple[str, str] | None:
    """(prompt, reference response) of a record of the data set: title, table, question and one answer."""
    fields = [record.get(name) for name in ("title", "table", "question")]
    answers = record.get("answer")
    if not all(isinstance(field, str) for field in fields) or not isinstance(answers, list) or len(answers) != 1:
        return None
    title, table, text = fields
    return f"{INSTRUCTION}\nTable: {title}\n{table}\nQuestion: {text}", f"\\boxed{{{_as_text(answers[0])}}}"


def extract_answer(response: str) -> str | None:
    """The cleaned content of the last \\boxed{…}, in lower case, as HiTab's tables are."""
    content = boxed_content(response)
    return cleaned(content).lower() or None if content is not None else None


def same(predicted: str, answer: str) -> bool:
    """As strings, or as numbers: 1,234 and 1234.0 are the same."""
    if predicted == answer:
        return True
    numbers = [_number(text) for text in (predicted, answer)]
    return numbers[0] is not None and numbers[0] == numbers[1]


def _as_text(answer: Any) -> str:
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
