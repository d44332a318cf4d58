"""Which columns of a record are its prompt, response or conversation, by the names that people give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.conversation import ASSISTANT, USER, Message
from megatron_mdm.data.json_files import Record

Prompt = Sequence[Message]  # what is said before a response

CONVERSATIONS = ("messages", "conversations", "conversation")
# (prompt, response). A record with several of these pairs is refused: `data.columns` has to say which is meant.
PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("problem", "solution"),
)
PROMPTS = tuple(dict.fromkeys(prompt for prompt, _ in PAIRS))
INPUTS = ("input", "context")  # what an instruction is about; it follows it on a new line
SYSTEMS = ("system", "system_prompt")
# What is added to the columns of a prompt that is to be answered and rewarded, unless its record has such columns
REFERENCE = "reference"  # the record's own response, as text
WHERE = "where"  # its place, "file, line n"
# of a turn
ROLE_NAMES = ("role", "from")
CONTENT_NAMES = ("content", "value")
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bard": ASSISTANT,
    "bing": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "function_call": ASSISTANT,
    "system": "system",
    "observation": "tool",
}
REMEDY = "name yours in 'data.columns', such as {prompt: query, response: reply} or {messages: dialog}"


def conversation(record: Record, data: DataConfig) -> list[Message]:
    """All turns, the assistant's included. Raises ValueError that names the columns where they are not known."""
    record = renamed(record, data)
    if name := _conversation_column(record, data):
        turns = _turns(record[name], name, data)
        if all(turn.role != ASSISTANT for turn in turns):
            roles = ", ".join(sorted({turn.role for turn in turns}))
            raise ValueError(
                f"'{name}' holds no turn of the role '{ASSISTANT}' (found {roles}); say in 'data.roles' whose it is"
            )
        return [*_system(record, turns), *turns]
    prompt, response = _pair(record, data) or _unknown(record)
    return [*_before(record, prompt, data), *_said(record, response, ASSISTANT, data)]


def prompt_and_response(record: Record, data: DataConfig) -> tuple[Prompt, str]:
    """What is said before the assistant's last turn, and that turn."""
    turns = conversation(record, data)
    last = max(index for index, turn in enumerate(turns) if turn.role == ASSISTANT)
    return turns[:last], turns[last].content


def prompt_of(record: Record, data: DataConfig) -> Prompt:
    """What is to be answered. An answer that the record holds already is left out."""
    record = renamed(record, data)
    name = _conversation_column(record, data)
    if not name:
        pair = _pair(record, data)
        return _before(record, pair[0] if pair else _prompt_column(record), data)
    turns = _turns(record[name], name, data)
    while turns and turns[-1].role == ASSISTANT:
        turns.pop()
    if not turns:
        raise ValueError(f"'{name}' holds nothing to be answered")
    return [*_system(record, turns), *turns]


def renamed(record: Record, data: DataConfig) -> Record:
    """The record with the columns of `data.columns` under the names that are known here."""
    mapping = {name: column for name, column in data.columns.items() if name not in ("role", "content")}
    if not mapping:
        return record
    for name, column in mapping.items():
        if column not in record:
            raise ValueError(f"no column '{column}', which 'data.columns' names as {name}; found {_found(record)}")
    others = {name: value for name, value in record.items() if name not in {*mapping, *mapping.values()}}
    return {**others, **{name: record[column] for name, column in mapping.items()}}


def _conversation_column(record: Record, data: DataConfig) -> str:
    """Empty where there is none, or `data.columns` names a prompt or a response instead."""
    if {"prompt", "response"} & data.columns.keys():
        return ""
    return next((name for name in CONVERSATIONS if record.get(name) is not None), "")


def _pair(record: Record, data: DataConfig) -> tuple[str, str] | None:
    pairs = [pair for pair in PAIRS if all(record.get(name) is not None for name in pair)]
    for place, name in enumerate(("prompt", "response")):
        if name in data.columns:
            pairs = [pair for pair in pairs if pair[place] == name]
    if record.get("instruction") is not None and pairs != [("input", "output")]:
        pairs = [pair for pair in pairs if pair != ("input", "output")]  # the input is part of the prompt
    if len(pairs) > 1:
        several = "; ".join(" and ".join(pair) for pair in pairs)
        raise ValueError(f"several columns may be prompt and response ({several}); say which in 'data.columns'")
    return pairs[0] if pairs else None


def _prompt_column(record: Record) -> str:
    found = [name for name in PROMPTS if record.get(name) is not None]
    if "instruction" in found:
        found = [name for name in found if name != "input"]
    if len(found) > 1:
        raise ValueError(f"several columns may be the prompt ({', '.join(found)}); say which in 'data.columns'")
    return found[0] if found else _unknown(record)


def _before(record: Record, prompt: str, data: DataConfig) -> list[Message]:
    """System text, earlier turns (`history`: pairs of prompt and response), and the prompt."""
    turns = list[Message]()
    for earlier in record.get("history") or []:
        if not isinstance(earlier, list) or len(earlier) != 2:
            raise ValueError("'history' must be a list of pairs of prompt and response")
        turns += [Message(USER, _text(earlier[0], "history")), Message(ASSISTANT, _text(earlier[1], "history"))]
    said = _said(record, prompt, USER, data)
    about = next((record[name] for name in INPUTS if prompt == "instruction" and record.get(name)), None)
    if about is not None:
        said = [*said[:-1], Message(USER, f"{said[-1].content}\n{_text(about, 'input')}")]
    return [*_system(record, said), *turns, *said]


def _said(record: Record, name: str, role: str, data: DataConfig) -> list[Message]:
    """A column's text as a turn; or turns, where it holds messages."""
    value = record[name]
    if isinstance(value, list) and value and isinstance(value[0], dict) and not _is_part(value[0]):
        return _turns(value, name, data)
    return [Message(role, _text(value, name))]


def _system(record: Record, turns: Sequence[Message]) -> list[Message]:
    name = next((name for name in SYSTEMS if record.get(name)), "")
    if not name or (turns and turns[0].role == "system"):
        return []
    return [Message("system", _text(record[name], name))]


def _turns(value: Any, name: str, data: DataConfig) -> list[Message]:
    roles = (data.columns["role"],) if "role" in data.columns else ROLE_NAMES
    contents = (data.columns["content"],) if "content" in data.columns else CONTENT_NAMES
    form = f"'{name}' must be a list of objects with '{roles[0]}' and '{contents[0]}'"
    if not isinstance(value, list) or not value:
        raise ValueError(f"{form}, found {'an empty list' if value == [] else type(value).__name__}")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"{form}; turn {number} is {type(turn).__name__}")
        role = next((turn[key] for key in roles if turn.get(key) is not None), None)
        given = [key for key in contents if key in turn]
        if not isinstance(role, str) or not given:
            raise ValueError(f"{form}; turn {number} has {_found(turn)}")
        content = next((turn[key] for key in given if turn[key] is not None), None)
        role = data.roles.get(role) or ROLES.get(role.lower(), role)
        others = {key: value for key, value in turn.items() if key not in (*roles, *contents) and value is not None}
        turns.append(Message(role, "" if content is None else _text(content, f"{name}, turn {number}"), others))
    return turns


def _text(value: Any, name: str) -> str:
    """A string, or the text of content parts, such as [{"type": "text", "text": "…"}]."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(_is_part(part) for part in value):
        raise ValueError(f"'{name}' must be a string, found {type(value).__name__}")
    for part in value:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"'{name}' has a part of the type '{part['type']}'; only text can be read")
    return "".join(part["text"] for part in value)


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str)


def _found(record: Record) -> str:
    """Names of columns, in the record's order."""
    return ", ".join(f"{name} (null)" if value is None else name for name, value in record.items()) or "none"


def _unknown(record: Record) -> NoReturn:
    raise ValueError(
        "expected the columns question and answer, prompt and response (or completion), instruction and output, "
        f"messages, conversations, or input_ids; found {_found(record)}; {REMEDY}"
    )
