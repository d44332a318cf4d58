"""A file of prompts to be answered."""

from __future__ import annotations

from typing import NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DataConfig
from megatron_mdm.data.columns import Prompt, prompt_of
from megatron_mdm.data.conversation import USER, Message
from megatron_mdm.data.json_files import Record
from megatron_mdm.data.lengths import UNLIMITED, Room
from megatron_mdm.data.records import BadRecords, read_records
from megatron_mdm.data.sft import encode_prompt
from megatron_mdm.data.tokenizer import Tokenizer


class EncodedPrompt(NamedTuple):
    turns: Prompt
    ids: list[int]

    @classmethod
    def of(cls, prompt: str | Prompt, tokenizer: Tokenizer) -> EncodedPrompt:
        turns = [Message(USER, prompt)] if isinstance(prompt, str) else prompt
        return cls(turns, encode_prompt(turns, tokenizer))

    def as_record(self) -> Record:
        """{"prompt": text}, or {"messages": […]} where there are several turns."""
        if [turn.role for turn in self.turns] == [USER]:
            return {"prompt": self.turns[0].content}
        return {"messages": [{"role": turn.role, "content": turn.content, **turn.fields} for turn in self.turns]}


def read_prompts(
    path: str, tokenizer: Tokenizer, data: DataConfig, bad: BadRecords, room: Room = UNLIMITED
) -> list[EncodedPrompt]:
    """The prompt of every record that has one: a text, an instruction with its input, or a conversation. A prompt
    that leaves its response no room is a bad record."""
    prompts = []
    for where, record in read_records(path, bad):
        with bad.of(where):
            prompt = EncodedPrompt.of(prompt_of(record, data), tokenizer)
            room.check(len(prompt.ids))
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path}: no prompts{bad.summary()}")
    return prompts
