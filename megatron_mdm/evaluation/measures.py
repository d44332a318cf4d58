"""What can be measured of a run, by name: each with its settings, its data and the lines that sum it up."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mdm.config.files import write_atomically, write_json
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.lengths import Room
from megatron_mdm.data.records import BadRecords
from megatron_mdm.data.splits import read_held_out
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.evaluation.exact_match import evaluate_exact_match, read_questions
from megatron_mdm.evaluation.image_measures import IMAGE_MEASURES
from megatron_mdm.evaluation.likelihood import LikelihoodConfig
from megatron_mdm.evaluation.measure import Evaluate, Measure, Result, Source, left_out
from megatron_mdm.evaluation.perplexity import evaluate_choices, evaluate_perplexity, read_choices, scored_samples
from megatron_mdm.evaluation.tasks import TASKS
from megatron_mdm.evaluation.trained import TrainedFor
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
from megatron_mdm.parallel.groups import ParallelContext


def _exact_match(
    name: str,
    source: Source,
    settings: GenerationConfig,
    config: RunConfig,
    tokenizer: Tokenizer,
    objective: TrainedFor,
) -> Evaluate:
    task = TASKS[name]
    bad = BadRecords(source.on_error)
    room = settings.room(config.model)
    questions = read_questions(source.path, task, source.limit, tokenizer, config.data, bad, room)

    def run(engine: Any, context: ParallelContext) -> Result:
        result = evaluate_exact_match(engine, questions, task, tokenizer, settings, context, objective.decoder)
        return {**result, **left_out(bad)}

    return run


def _exact_match_summary(result: Result) -> list[str]:
    low, high = result["interval"]
    return [
        f"exact match: {result['exact_match']:.2f}",
        f"{result['num_right']} of {result['num_questions']} right, 95 % interval {low:.3f} to {high:.3f}; "
        f"{result['mean_steps']:.1f} forward passes an answer",
    ]


def _perplexity(
    source: Source, settings: LikelihoodConfig, config: RunConfig, tokenizer: Tokenizer, objective: TrainedFor
) -> Evaluate:
    assert isinstance(config.model.vocab_size, int)
    section = config.data.model_copy(
        update={"on_error": source.on_error, "max_length": _longest(source, settings, config)}
    )
    data = read_held_out(source.path, config.model_copy(update={"data": section}), tokenizer)
    samples = scored_samples(data.samples[: source.limit or None], objective.scoring)
    special = SpecialIds.of(tokenizer)

    def run(engine: Any, context: ParallelContext) -> Result:
        result = evaluate_perplexity(engine, samples, settings, special, context, objective.scoring)
        return {**result, "num_too_long": data.num_too_long, "num_bad": data.num_bad, "first_bad": data.first_bad}

    return run


def _longest(source: Source, settings: LikelihoodConfig, config: RunConfig) -> int:
    """The most tokens that a sample may have; a corpus is cut into sequences as the run cuts its own."""
    if not settings.extrapolate:
        return min(config.data.max_length, config.model.max_sequence_length)
    return sys.maxsize if Path(source.path).is_file() else config.data.max_length


def _perplexity_summary(result: Result) -> list[str]:
    error = result["standard_error"]
    bound = f"at most {result['perplexity']:.4f}" if result["is_bound"] else f"{result['perplexity']:.4f}"
    return [
        f"perplexity: {bound}",
        f"{result['nats_per_token']:.5f} nats per token, standard error {error if error is None else f'{error:.5f}'}; "
        f"{result['num_samples']} samples, {result['num_tokens']} tokens, {result['num_too_long']} samples too long",
    ]


def _choices(
    source: Source, settings: LikelihoodConfig, config: RunConfig, tokenizer: Tokenizer, objective: TrainedFor
) -> Evaluate:
    bad = BadRecords(source.on_error)
    room = Room.of(config.model, settings.extrapolate)
    questions = read_choices(source.path, source.limit, tokenizer, config.data, bad, room)
    special = SpecialIds.of(tokenizer)

    def run(engine: Any, context: ParallelContext) -> Result:
        result = evaluate_choices(engine, questions, settings, special, context, objective.scoring)
        return {**result, **left_out(bad)}

    return run


def _choices_summary(result: Result) -> list[str]:
    (low, high), (low_each, high_each) = result["interval"], result["interval_per_token"]
    return [
        f"accuracy: {result['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}",
        f"by likelihood per token: {result['accuracy_per_token']:.3f}, {low_each:.3f} to {high_each:.3f}",
    ]


_ANSWERS = ("evaluation.json", "samples.jsonl")
_CHOICES = ("multiple_choice.json", "multiple_choice_samples.jsonl")
MEASURES: dict[str, Measure] = {
    **{name: Measure(GenerationConfig, partial(_exact_match, name), _exact_match_summary, *_ANSWERS) for name in TASKS},
    "perplexity": Measure(LikelihoodConfig, _perplexity, _perplexity_summary, "perplexity.json", "", needs_data=False),
    "multiple_choice": Measure(LikelihoodConfig, _choices, _choices_summary, *_CHOICES),
    **IMAGE_MEASURES,
}


def write_result(folder: Path, measure: Measure, result: Result, label: str = "") -> dict[str, Path]:
    """Write a result to the run's folder, and its samples, a line each, to a file of their own; its pictures (contents
    by name) to the folder images. Returns the files. label: in their names, where there are several results."""
    samples = result.pop("samples", [])
    pictures = result.pop("pictures", {})
    written = {"result": _labelled(folder / measure.file, label)}
    write_json(written["result"], result)
    if samples:
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        written["samples"] = _labelled(folder / measure.samples_file, label)
        write_atomically(written["samples"], "".join(lines))
    if pictures:
        written["images"] = _labelled(folder / "images", label)
        for name, content in pictures.items():
            write_atomically(written["images"] / name, content)
    return written


def _labelled(path: Path, label: str) -> Path:
    return path.with_name(f"{path.stem}.{label}{path.suffix}") if label else path
