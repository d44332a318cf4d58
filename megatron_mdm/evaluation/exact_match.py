"""Generate answers to a file of questions and count those that are exactly right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.columns import prompt_and_response
from megatron_mdm.data.lengths import UNLIMITED, Room
from megatron_mdm.data.prompts import EncodedPrompt
from megatron_mdm.data.records import BadRecords, read_records
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation.intervals import wilson_interval
from megatron_mdm.evaluation.tasks import Task
from megatron_mdm.generation.generate import Decoder, generate
from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import GenerationConfig, LogitsEngine, SpecialIds
from megatron_mdm.parallel.groups import ParallelContext


class Question(NamedTuple):
    prompt: EncodedPrompt
    answer: str  # the reference's final answer


def read_questions(
    path: str,
    task: Task,
    limit: int,
    tokenizer: Tokenizer,
    data: DataConfig,
    bad: BadRecords,
    room: Room = UNLIMITED,
) -> list[Question]:
    """The questions of the first `limit` records (0: all). A record whose reference has no final answer is a bad one,
    as is one whose prompt leaves the response no room."""
    questions = list[Question]()
    for where, record in read_records(path, bad):
        with bad.of(where):
            asked = task.question(record, where, Path(path).parent) or prompt_and_response(record, data)
            prompt, response = asked
            question = Question(EncodedPrompt.of(prompt, tokenizer), task.reference(response))
            room.check(len(question.prompt.ids))
            questions.append(question)
        if limit and len(questions) == limit:
            break
    if not questions:
        raise UserError(f"{path}: no questions{bad.summary()}")
    return questions


def evaluate_exact_match(
    engine: LogitsEngine,
    questions: Sequence[Question],
    task: Task,
    tokenizer: Tokenizer,
    config: GenerationConfig,
    context: ParallelContext,
    decode: Decoder = denoise,
) -> dict[str, Any]:
    """Score and samples, JSON-able, the same on every rank. Collective. decode: what the model was trained for."""
    prompts = [question.prompt.ids for question in questions]
    special = SpecialIds.of(tokenizer)
    responses = generate(engine, prompts, config, special, context, decode)
    samples = []
    for (prompt, answer), response in zip(questions, responses):
        text = tokenizer.decode(response.tokens)
        predicted = task.extract(text)
        samples.append(
            {
                **prompt.as_record(),
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
