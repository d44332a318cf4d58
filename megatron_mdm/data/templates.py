"""How a conversation becomes text: pieces that are given and pieces that are learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.config.errors import UserError

ASSISTANT = "assistant"


class Message(NamedTuple):
    role: str  # system, user, assistant
    content: str


class Piece(NamedTuple):
    """A stretch of text that is tokenised by itself."""

    text: str
    learnt: bool
    ends: bool = False  # an eos token follows, of the same kind


Template = Callable[[Sequence[Message]], list[Piece]]


def plain_prompt(prompt: str) -> str:
    """The prompt, a line break; the response follows as it is."""
    return prompt + "\n"


def _plain(_: str) -> Template:
    """Contents one after another; a line break behind what is given, eos behind what the assistant says."""

    def pieces(messages: Sequence[Message]) -> list[Piece]:
        return [
            Piece(content, True, ends=True) if role == ASSISTANT else Piece(plain_prompt(content), False)
            for role, content in messages
        ]

    return pieces


def _llada(_: str) -> Template:
    """LLaDA's: bos, then for each turn a header, the content, and <|eot_id|>, which the assistant's turns learn."""

    def pieces(messages: Sequence[Message]) -> list[Piece]:
        result = [Piece("<|startoftext|>", False)]
        for role, content in messages:
            result.append(Piece(f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
            result.append(Piece(f"{content}<|eot_id|>", role == ASSISTANT))
        return result

    return pieces


def _tokenizers_own(tokenizer_path: str) -> Template:
    """The chat template beside the tokenizer. What an assistant's turn adds to the conversation before it, generation
    prompt included, is learnt."""
    render = _chat_template(tokenizer_path)

    def pieces(messages: Sequence[Message]) -> list[Piece]:
        result: list[Piece] = []
        said = ""
        for index, message in enumerate(messages):
            if message.role != ASSISTANT:
                continue
            for text, learnt in (
                (render(messages[:index], True), False),
                (render(messages[: index + 1], False), True),
            ):
                if not text.startswith(said):
                    raise ValueError("the tokenizer's chat template rewrites earlier turns; use another template")
                result.append(Piece(text[len(said) :], learnt))
                said = text
        if messages and messages[-1].role != ASSISTANT:
            result.append(Piece(render(messages, True)[len(said) :], False))
        return result

    return pieces


TEMPLATES: dict[str, Callable[[str], Template]] = {  # made with the path of the tokenizer
    "plain": _plain,
    "llada": _llada,
    "tokenizer": _tokenizers_own,
}
NEEDED_TOKENS = {"llada": ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}


def prompt_pieces(prompt: str, template: Template) -> list[str]:
    """What stands before the response to a single prompt."""
    marker = Message(ASSISTANT, "")
    pieces = template([Message("user", prompt), marker])
    return [piece.text for piece in pieces if not piece.learnt]


def _chat_template(tokenizer_path: str) -> Callable[[Sequence[Message], bool], str]:
    """Rendered in jinja2's sandbox, as transformers does."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    folder = Path(tokenizer_path) if Path(tokenizer_path).is_dir() else Path(tokenizer_path).parent
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    source = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(source, str):
        raise UserError(
            f"{folder}: 'data.template' tokenizer needs a chat template in tokenizer_config.json or chat_template.jinja"
        )
    tokens = {name: _text_of(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    try:
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    except TemplateError as error:
        raise UserError(f"{folder}: the chat template is not valid ({error})") from None

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [message._asdict() for message in messages]
        try:
            return template.render(messages=turns, add_generation_prompt=add_generation_prompt, **tokens)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it ({error})") from None

    return render


def _text_of(token: Any) -> str:
    return token if isinstance(token, str) else (token or {}).get("content", "")
