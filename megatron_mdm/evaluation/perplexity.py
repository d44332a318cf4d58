"""The perplexity of a data set's responses (for masked models, an upper bound), and multiple choice by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.columns import prompt_of
from megatron_mdm.data.json_files import Record
from megatron_mdm.data.lengths import UNLIMITED, Room
from megatron_mdm.data.prompts import EncodedPrompt
from megatron_mdm.data.records import BadRecords, read_records
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation.intervals import wilson_interval
from megatron_mdm.evaluation.likelihood import LikelihoodConfig, Scorer, Scoring, negative_log_likelihoods
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.parallel.groups import ParallelContext


def scored_samples(samples: Sequence[Sample], scoring: Scoring) -> list[Sample]:
    """The samples with a token to score; documents that do not see each other as samples of their own."""
    parts = [part for sample in samples for part in _documents(sample)]
    kept = [part for part in parts if scoring.targets(part).any()]
    if not kept:
        raise UserError("no sample has a token that could be scored")
    return kept


def _documents(sample: Sample) -> list[Sample]:
    if not len(sample.segments):
        return [sample]
    ends = np.cumsum(sample.segments)
    places = [slice(end - length, end) for end, length in zip(ends, sample.segments)]
    return [Sample(sample.tokens[place], sample.eligible[place]) for place in places]


def evaluate_perplexity(
    engine: Scorer,
    samples: Sequence[Sample],
    config: LikelihoodConfig,
    special: SpecialIds,
    context: ParallelContext,
    scoring: Scoring,
) -> dict[str, Any]:
    """exp of the mean nats per eligible token. Collective; JSON-able.

    standard_error: of nats_per_token on these samples, from the masks' noise; standard_error_over_samples: from the
    choice of samples, too (of a ratio of means, by the delta method).
    """
    found = negative_log_likelihoods(engine, samples, config, special, context, scoring)
    total = int(found.num_eligible.sum())
    mean = float(found.nats.sum() / total)
    residual = found.nats - mean * found.num_eligible
    spread = float(residual.std(ddof=1) * len(samples) ** 0.5 / total) if len(samples) > 1 else float("nan")
    noise = float(np.sqrt(np.square(found.standard_error).sum()) / total)
    return {
        "perplexity": float(np.exp(mean)),
        "is_bound": scoring.is_bound,
        "nats_per_token": mean,
        "standard_error": noise if np.isfinite(noise) else None,
        "standard_error_over_samples": spread if np.isfinite(spread) else None,
        "num_samples": len(samples),
        "num_tokens": total,
        "settings": config.model_dump(mode="json"),
    }


class Question(NamedTuple):
    prompt: EncodedPrompt
    choices: list[list[int]]  # token ids
    answer: int


def read_choices(
    path: str, limit: int, tokenizer: Tokenizer, data: DataConfig, bad: BadRecords, room: Room = UNLIMITED
) -> list[Question]:
    """The first `limit` (0: all) records of a prompt (or messages), "choices": […] and "answer": index."""
    questions = list[Question]()
    for where, record in read_records(path, bad):
        with bad.of(where):
            question = _question(record, tokenizer, data)
            room.check(len(question.prompt.ids), max(map(len, question.choices)), "a choice")
            questions.append(question)
        if limit and len(questions) == limit:
            break
    if not questions:
        raise UserError(f"{path}: no questions{bad.summary()}")
    return questions


def _question(record: Record, tokenizer: Tokenizer, data: DataConfig) -> Question:
    choices = record.get("choices")
    answer = record.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("expected a list of strings in the column 'choices', beside a prompt and an 'answer'")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' must be the index of one of the {len(choices)} choices")
    asked = {name: value for name, value in record.items() if name not in ("choices", "answer")}
    ids = [tokenizer.encode(choice) for choice in choices]
    if not all(ids):
        raise ValueError("a choice is empty")
    return Question(EncodedPrompt.of(prompt_of(asked, data), tokenizer), ids, answer)


def evaluate_choices(
    engine: Scorer,
    questions: Sequence[Question],
    config: LikelihoodConfig,
    special: SpecialIds,
    context: ParallelContext,
    scoring: Scoring,
) -> dict[str, Any]:
    """The most likely choice, in all and per token. Collective; JSON-able."""
    samples = [continuation(question.prompt.ids, choice) for question in questions for choice in question.choices]
    found = negative_log_likelihoods(engine, samples, config, special, context, scoring)
    records = []
    first = 0
    for question in questions:
        mine = slice(first, first + len(question.choices))
        nats = found.nats[mine]
        per_token = found.nats[mine] / found.num_eligible[mine]
        records.append(
            {
                **question.prompt.as_record(),
                "nats": nats.tolist(),
                "predicted": int(nats.argmin()),
                "predicted_per_token": int(per_token.argmin()),
                "answer": question.answer,
            }
        )
        first = mine.stop
    right, per_token_right = (
        sum(record[key] == record["answer"] for record in records) for key in ("predicted", "predicted_per_token")
    )
    return {
        "accuracy": right / len(records),
        "interval": wilson_interval(right, len(records)),
        "accuracy_per_token": per_token_right / len(records),
        "interval_per_token": wilson_interval(per_token_right, len(records)),
        "num_questions": len(records),
        "settings": config.model_dump(mode="json"),
        "samples": records,
    }


def continuation(prompt_ids: list[int], response_ids: list[int]) -> Sample:
    """A sample of which the response is scored."""
    return Sample.of(np.array(prompt_ids + response_ids, dtype=np.int32), len(prompt_ids))
