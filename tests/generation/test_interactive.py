"""The conversation in a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import torch

from megatron_mdm.batch import ModelInputs
from megatron_mdm.data.lengths import Room
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.generation.interactive import converse, partly_masked_text
from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import GenerationConfig
from tests.ranks import run_ranks
from tests.small import EOS, MASK, VOCAB, word_tokenizer

END_OF_TURN = 40


def words() -> Tokenizer:
    return replace(word_tokenizer(), other_end_ids=frozenset({END_OF_TURN}))


class FixedLogits:
    """Every position's token is its place."""

    def logits(self, inputs: ModelInputs) -> torch.Tensor:
        positions = inputs.selected.nonzero()[:, 1]
        return torch.nn.functional.one_hot(positions + 2, VOCAB).float()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def conversation() -> tuple[str, str]:
    """What is written to a terminal and to a file."""
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    tokenizer = words()
    config = GenerationConfig(gen_length=4, block_length=2, steps=4)
    terminal = Terminal()
    file = io.StringIO()
    for output in (terminal, file):
        lines = ["two words\n", "\n", "too many of them now\n", "one\n"]
        converse(FixedLogits(), tokenizer, config, Room(8, 4), denoise, context, lines, output)
    return terminal.getvalue(), file.getvalue()


def test_each_line_is_answered_and_the_denoising_shown() -> None:
    terminal, file = run_ranks(conversation, 1)[0]
    answer, refusal, again = file.splitlines()
    assert (answer, again) == ("w4 w5 w6 w7", "w3 w4 w5 w6")
    assert refusal.startswith("error: 5 tokens of prompt and 4 of gen_length are 9, more than")
    first, second = terminal.split("(4 forward passes)")[:2]
    for shown in (first, second):
        assert shown.count("▒") == 3 + 2 + 1  # one token a step
        assert shown.count("\x1b[1A") == 4  # each drawing erases the one before
    assert first.endswith("w4 w5 w6 w7\n")


def test_masks_between_words() -> None:
    assert partly_masked_text([5, MASK, MASK, 6, 7], words()) == "w5 ▒▒ w6 w7"
    assert partly_masked_text([MASK, MASK], words()) == "▒▒"


def test_nothing_is_shown_behind_an_end_token() -> None:
    for end in (EOS, END_OF_TURN):
        assert partly_masked_text([5, MASK, end, MASK, 6], words()) == "w5 ▒"
