"""Perplexity: the mean over tokens, which tokens are counted, and the data that it is measured on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.batch import ModelInputs, RowStatistics
from megatron_mdm.config.errors import UserError
from megatron_mdm.data.prompts import EncodedPrompt
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.splits import read_held_out
from megatron_mdm.data.tokenizer import load_tokenizer
from megatron_mdm.evaluation.likelihood import MASK_BOUND, LikelihoodConfig, Scoring, negative_log_likelihoods
from megatron_mdm.evaluation.perplexity import Question, evaluate_choices, evaluate_perplexity, scored_samples
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.objectives.autoregressive import NEXT_TOKENS
from tests.data.test_corpus import some_documents, write_with_megatron
from tests.ranks import run_ranks
from tests.small import EOS, MASK, PAD, small_config, write_ids

SPECIAL = SpecialIds(MASK, PAD, EOS)


class KnownLosses:
    """A model that finds token i with i / 10 nats."""

    def evaluate(self, micro_batches: list[ModelInputs], row_gradients: bool = False) -> list[RowStatistics]:
        return [self._statistics(inputs) for inputs in micro_batches]

    def _statistics(self, inputs: ModelInputs) -> RowStatistics:
        loss = (inputs.labels / 10 * inputs.token_weight * inputs.selected).sum(1)
        return RowStatistics(*[loss] * len(RowStatistics._fields))


def sample(tokens: list[int], prompt_length: int = 0, segments: tuple[int, ...] = ()) -> Sample:
    made = Sample.of(np.array(tokens, dtype=np.int32), prompt_length)
    return made._replace(segments=np.array(segments, dtype=np.int64))


def measured(samples: list[Sample], scoring: Scoring) -> dict[str, Any]:
    from megatron_mdm.parallel.groups import initialize

    config = LikelihoodConfig(num_times=4, num_repeats=3)
    return evaluate_perplexity(KnownLosses(), scored_samples(samples, scoring), config, SPECIAL, initialize(), scoring)


def test_every_token_counts_alike() -> None:
    """In samples of any length: a prompt's tokens do not count; without a prompt, the first token does."""
    samples = [sample([20] * 6), sample([7, 7, 2, 2], prompt_length=2)]
    (masked,) = run_ranks(measured, 1, samples, MASK_BOUND)
    mean = (6 * 2.0 + 2 * 0.2) / 8
    assert masked["num_tokens"] == 8
    assert masked["nats_per_token"] == pytest.approx(mean, abs=1e-6)
    assert masked["perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    (first,) = run_ranks(measured, 1, [sample([50, 2, 2, 2])] * 50, MASK_BOUND)
    assert first["nats_per_token"] == pytest.approx((5.0 + 3 * 0.2) / 4, abs=4 * first["standard_error"])
    (causal,) = run_ranks(measured, 1, samples, NEXT_TOKENS)  # a first token follows none
    assert causal["num_tokens"] == 7
    assert causal["nats_per_token"] == pytest.approx((5 * 2.0 + 2 * 0.2) / 7, abs=1e-6)


def choices_and_repeats() -> tuple[dict[str, Any], Any]:
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    prompt = EncodedPrompt([], [5, 6])
    questions = [Question(prompt, [[30], [20, 20, 20]], 1), Question(prompt, [[30, 20], [40]], 1)]
    chosen = evaluate_choices(KnownLosses(), questions, LikelihoodConfig(), SPECIAL, context, MASK_BOUND)
    config = LikelihoodConfig(num_times=1, num_repeats=2)
    pairs = [sample([10, 30])] * 20
    return chosen, negative_log_likelihoods(KnownLosses(), pairs, config, SPECIAL, context, MASK_BOUND)


def test_choices_by_likelihood_in_all_and_per_token() -> None:
    """3 nats against 6, 3 against 2 a token; 5 against 4, 2.5 against 4."""
    chosen, _ = run_ranks(choices_and_repeats, 1)[0]
    assert [record["predicted"] for record in chosen["samples"]] == [0, 1]
    assert [record["predicted_per_token"] for record in chosen["samples"]] == [1, 0]
    assert (chosen["accuracy"], chosen["accuracy_per_token"]) == (0.5, 0.5)


def test_standard_error_of_two_repeats_is_half_their_difference() -> None:
    """A repeat is 2 · 1, 2 · 3, or, where both tokens are masked, 2 · 2 nats."""
    _, found = run_ranks(choices_and_repeats, 1)[0]
    for repeat in (found.nats + found.standard_error, found.nats - found.standard_error):
        assert np.isclose(repeat[:, None], [2.0, 4.0, 6.0], atol=1e-5).any(1).all()
    assert found.standard_error.max() > 0.5


def test_documents_that_do_not_see_each_other_are_scored_apart() -> None:
    samples = [sample([9, 9, 5, 6, 6, 6], segments=(2, 1, 3)), sample([4, 4])]
    apart = scored_samples(samples, MASK_BOUND)
    assert [part.tokens.tolist() for part in apart] == [[9, 9], [5], [6, 6, 6], [4, 4]]
    assert all(part.eligible.all() and not len(part.segments) for part in apart)
    causal = scored_samples(samples, NEXT_TOKENS)  # a document of one token has none to score
    assert [part.tokens.tolist() for part in causal] == [[9, 9], [6, 6, 6], [4, 4]]
    with pytest.raises(UserError, match="no sample has a token that could be scored"):
        scored_samples([sample([4])], NEXT_TOKENS)


def test_the_data_of_a_run(tmp_path: Path) -> None:
    """Its own validation split, another corpus by its prefix, or samples."""
    docs = write_with_megatron(tmp_path / "a", some_documents(60, vocab_size=MASK))
    others = write_with_megatron(tmp_path / "b-00000", some_documents(9, seed=1, vocab_size=MASK))
    data = {"format": "corpus", "train": str(tmp_path / "a"), "validation_fraction": 0.2, "across_documents": False}
    config = small_config(tmp_path, data=data)
    tokenizer = load_tokenizer(config.data)
    own = read_held_out("", config, tokenizer)
    assert 0 < sum(own.lengths()) < sum(map(len, docs)) / 3
    corpus = read_held_out(str(tmp_path / "b"), config, tokenizer)
    assert sum(corpus.lengths()) == sum(map(len, others))
    ends = np.cumsum([len(part.tokens) for part in scored_samples(corpus.samples, MASK_BOUND)])
    assert set(np.cumsum([len(others[number]) for number in corpus.corpora[0].documents])) <= set(ends)
    write_ids(tmp_path / "c.jsonl", 5)
    assert len(read_held_out(str(tmp_path / "c.jsonl"), config, tokenizer)) == 5
    (tmp_path / "d.txt").write_text("a text")
    for path, message in (("d.txt", "is a text; make a corpus of it"), ("none", "no corpus here")):
        with pytest.raises(UserError, match=message):
            read_held_out(str(tmp_path / path), config, tokenizer)
    without = small_config(tmp_path, data={**data, "validation_fraction": 0.0})
    with pytest.raises(UserError, match="holds no validation data out; name some with --data"):
        read_held_out("", without, tokenizer)
