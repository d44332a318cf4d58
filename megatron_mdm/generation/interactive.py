"""A conversation in the terminal that shows a response as it is denoised."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TextIO

from torch import Tensor

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.lengths import Room
from megatron_mdm.data.sft import encode_prompt
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.generation.generate import Decoder
from megatron_mdm.generation.settings import GenerationConfig, LogitsEngine, SpecialIds
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext

MASK_SIGN = "▒"


def converse(
    engine: LogitsEngine,
    tokenizer: Tokenizer,
    config: GenerationConfig,
    room: Room,
    decode: Decoder,
    context: ParallelContext,
    lines: Iterable[str],
    output: TextIO,
) -> None:
    """Answer each line that the main rank reads until they end. Collective: the other ranks follow it.

    On a terminal the response is redrawn after every step; elsewhere only its end is written. A line that cannot be
    answered costs itself only.
    """
    special = SpecialIds.of(tokenizer)
    for turn, prompt in typed_lines(context, lines, output):
        try:
            ids = encode_prompt(prompt, tokenizer)
            room.check(len(ids))
        except (UserError, ValueError) as error:
            output.write(f"error: {error}\n" if context.is_main else "")
            output.flush()
            continue
        screen = Screen(output) if context.is_main else None
        watch = partial(_draw, screen, tokenizer) if screen and output.isatty() else None
        (response,) = decode(engine, [ids], [turn], config, special, watch)
        if screen:
            screen.clear()
            output.write(f"{tokenizer.decode(response.tokens)}\n")
            output.write(f"({response.steps} forward passes)\n" if output.isatty() else "")
            output.flush()


def typed_lines(context: ParallelContext, lines: Iterable[str], output: TextIO) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that the main rank reads, on every rank. A terminal shows a prompt. Collective."""
    source = iter(lines)
    for turn in range(2**31):
        if context.is_main and output.isatty():
            output.write("> ")
            output.flush()
        line = gather_objects(next(source, None) if context.is_main else None, context)[0]
        if line is None:
            return
        assert isinstance(line, str)
        if line.strip():
            yield turn, line.strip()


class Screen:
    """The lines below what was typed."""

    def __init__(self, output: TextIO) -> None:
        self.output = output
        self.num_lines = 0

    def show(self, lines: Sequence[str]) -> None:
        """Redraw them; none is wider than the terminal."""
        self.clear()
        self.output.write("\n".join(lines) + "\n")
        self.output.flush()
        self.num_lines = len(lines)

    def clear(self) -> None:
        if self.num_lines:
            self.output.write(f"\x1b[{self.num_lines}A\r\x1b[J")  # up, to the left, and erase to the end
            self.num_lines = 0


def _draw(screen: Screen, tokenizer: Tokenizer, responses: Tensor) -> None:
    """responses [1, gen_length]."""
    width = max(1, shutil.get_terminal_size().columns)
    lines = partly_masked_text(responses[0].tolist(), tokenizer).split("\n")
    screen.show([line[start : start + width] for line in lines for start in range(0, max(1, len(line)), width)])


def partly_masked_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text of what is unmasked up to the first end token, runs apart by spaces, with a sign for each mask."""
    parts: list[str] = []
    run: list[int] = []
    for token in [*tokenizer.up_to_end(ids), tokenizer.mask_id]:
        if token != tokenizer.mask_id:
            run.append(token)
            continue
        if run:
            parts.append(f" {tokenizer.decode(run)} ")
            run = []
        parts.append(MASK_SIGN)
    return "".join(parts[:-1]).strip()
