"""What a template takes and gives: messages; pieces of text, prompts and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

ASSISTANT = "assistant"
USER = "user"
TODAY = "today"


class Message(NamedTuple):
    role: str  # system, user, assistant
    content: str
    fields: Mapping[str, Any] = {}  # further ones of the record, which chat templates may read

    def mapped(self, change: Callable[[str], str]) -> Message:
        """The message with every text in it changed."""
        return Message(self.role, change(self.content), _mapped(self.fields, change))


class Piece(NamedTuple):
    """A stretch of text that is tokenised by itself."""

    text: str
    is_target: bool
    ends: bool = False  # an eos token follows, of the same kind
    behind: str = ""  # the text before it, where both are parts of one text


class Template(Protocol):
    """How a conversation becomes text."""

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """Special tokens that it puts behind an answer, besides the tokenizer's eos."""

    @property
    def date(self) -> str:
        """The day (YYYY-MM-DD) that its texts name; empty where they name none."""

    @property
    def fingerprint(self) -> str:
        """sha256 of what files say of it; empty where it is built in."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know about it, a line each."""

    def samples(self, messages: Sequence[Message], last_only: bool) -> list[list[Piece]]:
        """A conversation up to its last answer: nothing stands behind an answer when it is generated. Of its answers,
        all are targets or the last only. Several lists where a text that holds all answers would show one of them in
        another context than that in which it is generated.

        Raises ValueError, in one line, where the template refuses the conversation.
        """

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """What stands before the answer to a conversation. Raises as samples does."""


class TemplateSource(NamedTuple):
    """What a template is made from."""

    tokenizer_path: str
    special_tokens: Sequence[str] = ()  # texts of the tokenizer's
    date: str = TODAY  # data.template_date


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with every text in it changed; keys are kept."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def of_one_text(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces as parts of one text, each behind those before it."""
    joined = list[Piece]()
    text = ""
    for piece in pieces:
        joined.append(piece._replace(behind=text))
        text += piece.text
    return joined


def last_answer(messages: Sequence[Message]) -> int:
    """The place of the assistant's last message. Raises ValueError where there is none."""
    places = [place for place, message in enumerate(messages) if message.role == ASSISTANT]
    if not places:
        raise ValueError(f"no message of the role '{ASSISTANT}'")
    return places[-1]
