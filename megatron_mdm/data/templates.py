"""The templates by name: formats that are built in, and the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mdm.data.chat_template import ChatTemplate
from megatron_mdm.data.chat_turns import ChatTurns
from megatron_mdm.data.conversation import (
    ASSISTANT,
    TODAY,
    Message,
    Piece,
    Template,
    TemplateSource,
    last_answer,
    of_one_text,
)

BEGIN = "<|startoftext|>"
HEADER = "<|start_header_id|>"
HEADER_END = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"


@dataclass(frozen=True)
class TurnTemplate:
    """Turn after turn; an answer and what ends it are targets."""

    turn: Callable[[Message], list[Piece]]  # the answer's pieces are targets
    join: Callable[[Sequence[Piece]], list[Piece]] = list  # of_one_text, unless turns are texts of their own
    begin: tuple[Piece, ...] = ()
    answer_header: tuple[Piece, ...] = ()
    end_tokens: tuple[str, ...] = ()
    date: str = ""
    fingerprint: str = ""
    warnings: tuple[str, ...] = ()

    def samples(self, messages: Sequence[Message], last_only: bool) -> list[list[Piece]]:
        last = last_answer(messages)
        pieces = list(self.begin)
        for place, message in enumerate(messages[: last + 1]):
            given = last_only and place < last
            pieces += _given(self.turn(message)) if given else self.turn(message)
        return [self.join(pieces)]

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        turns = [piece for message in messages for piece in _given(self.turn(message))]
        return self.join([*self.begin, *turns, *self.answer_header])


def plain_prompt(prompt: str) -> str:
    """The prompt, a line break; the response follows as it is."""
    return prompt + "\n"


def _given(pieces: Sequence[Piece]) -> list[Piece]:
    return [piece._replace(is_target=False) for piece in pieces]


def _plain(_: TemplateSource) -> Template:
    """Contents one after another; a line break behind what is given, eos behind what the assistant says."""

    def turn(message: Message) -> list[Piece]:
        if message.role == ASSISTANT:
            return [Piece(message.content, True, ends=True)]
        return [Piece(plain_prompt(message.content), False)]

    return TurnTemplate(turn)


def _headers(line_breaks: str) -> Callable[[TemplateSource], Template]:
    """The template of LLaDA and its descendants: bos, then for each turn a header, line breaks, the content without
    white space around it, and <|eot_id|>. Upstream writes the header of the next answer behind every conversation,
    which is left out here."""

    def header(role: str) -> Piece:
        return Piece(f"{HEADER}{role}{HEADER_END}{line_breaks}", False)

    def turn(message: Message) -> list[Piece]:
        is_answer = message.role == ASSISTANT
        return [header(message.role), Piece(f"{message.content.strip()}{END_OF_TURN}", is_answer)]

    def make(_: TemplateSource) -> Template:
        return TurnTemplate(turn, of_one_text, (Piece(BEGIN, False),), (header(ASSISTANT),), (END_OF_TURN,))

    return make


def _tokenizers_own(source: TemplateSource) -> Template:
    """The chat template beside the tokenizer, as transformers renders it."""
    return ChatTurns.of(_chat_template(source.tokenizer_path, source.date), source.special_tokens)


def _chat_template(tokenizer_path: str, date: str = TODAY) -> ChatTemplate:
    path = Path(tokenizer_path)
    return ChatTemplate.load(path if path.is_dir() else path.parent, date)


TEMPLATES: dict[str, Callable[[TemplateSource], Template]] = {
    "plain": _plain,
    "llada": _headers("\n\n"),  # LLaDA-8B-Instruct's
    "mmada": _headers("\n"),  # MMaDA-8B's
    "tokenizer": _tokenizers_own,
}
_HEADER_TOKENS = (BEGIN, HEADER, HEADER_END, END_OF_TURN)
NEEDED_TOKENS = {"llada": _HEADER_TOKENS, "mmada": _HEADER_TOKENS}
