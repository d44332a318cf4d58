"""Generate answers to a file of questions and count those that are exactly right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.records import read_records
from megatron_mdm.data.sft import encode_prompt, prompt_and_response
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation.tasks import Task
from megatron_mdm.generation.generate import generate
from megatron_mdm.generation.settings import GenerationConfig, LogitsEngine, SpecialIds
from megatron_mdm.parallel.groups import ParallelContext

WILSON_Z = 1.96  # 95 % interval


def read_questions(path: str, task: Task, limit: int) -> list[tuple[str, str]]:
    """(prompt, final answer) of the first `limit` records (0: all). Raises UserError where a reference has none."""
    questions = []
    for where, record in read_records(path):
        prompt, response = task.question(record, where, Path(path).parent) or prompt_and_response(record, where)
        try:
            questions.append((prompt, task.reference(response)))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        if len(questions) == limit:
            break
    if not questions:
        raise UserError(f"{path}: no questions")
    return questions


def evaluate_exact_match(
    engine: LogitsEngine,
    questions: Sequence[tuple[str, str]],
    task: Task,
    tokenizer: Tokenizer,
    config: GenerationConfig,
    context: ParallelContext,
    method: str = "masked",
) -> dict[str, Any]:
    """Score and samples, JSON-able, the same on every rank. Collective. method: the model's training method."""
    prompts = [encode_prompt(prompt, tokenizer) for prompt, _ in questions]
    special = SpecialIds.of(tokenizer)
    responses = generate(engine, prompts, config, special, context, method)
    samples = []
    for (prompt, answer), response in zip(questions, responses):
        text = tokenizer.decode(response.tokens)
        predicted = task.extract(text)
        samples.append(
            {
                "prompt": prompt,
                "response": text,
                "predicted": predicted,
                "answer": answer,
                "right": predicted is not None and task.same(predicted, answer),
                "steps": response.steps,
            }
        )
    right = sum(sample["right"] for sample in samples)
    return {
        "exact_match": right / len(samples),
        "interval": wilson_interval(right, len(samples)),
        "num_right": right,
        "num_questions": len(samples),
        "mean_steps": sum(sample["steps"] for sample in samples) / len(samples),
        "generation": config.model_dump(mode="json"),
        "samples": samples,
    }


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    share, z2 = right / total, WILSON_Z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = WILSON_Z / (1 + z2 / total) * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
