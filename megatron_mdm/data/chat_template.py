"""A tokenizer's chat template, rendered by transformers itself."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.conversation import TODAY, Message
from megatron_mdm.data.tokenizer_folder import TOKENIZER_FILES, special_names

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


@dataclass(frozen=True)
class ChatTemplate:
    """Called, it gives the text that transformers' apply_chat_template gives for the folder's tokenizer.

    One thing differs: the time that a template may ask for (strftime_now) is the beginning of a day that is kept, so
    that ranks and resumed runs read the same text.
    """

    settings: Any  # transformers' tokenizer of the folder, without its vocabulary: special tokens and templates
    source: str
    day: datetime.date

    @classmethod
    def load(cls, folder: Path, date: str = TODAY) -> ChatTemplate:
        """Raises UserError where the folder has no chat template, or one that is not valid."""
        settings = _settings_of(folder)
        if settings.chat_template is None:
            raise UserError(
                f"{folder}: 'data.template' tokenizer needs a chat template in tokenizer_config.json or "
                "chat_template.jinja"
            )
        try:
            source = settings.get_chat_template()
            _compiled(source)
        except Exception as error:  # jinja2's and transformers' own, of many kinds
            raise UserError(f"{folder}: the chat template is not valid ({one_line(error)})") from None
        return cls(settings, source, datetime.date.today() if date == TODAY else datetime.date.fromisoformat(date))

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Raises ValueError, in one line, where the template refuses the messages."""
        with self._told():
            return self.settings.apply_chat_template(
                _turns(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )

    def with_answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the places [first, end) of its {% generation %} blocks. Raises as a call does."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with self._told():
            rendered: Any = render_jinja_template(
                conversations=[_turns(messages)],
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.settings.special_tokens_map,
            )
        texts, spans = rendered
        return texts[0], spans[0]

    @cached_property
    def marks_answers(self) -> bool:
        """Whether {% generation %} blocks say which tokens are targets."""
        return _GENERATION.search(self.source) is not None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the template and of the special tokens that it is given."""
        read = json.dumps([self.source, self.settings.special_tokens_map], sort_keys=True)
        return hashlib.sha256(read.encode()).hexdigest()

    @cached_property
    def names_the_date(self) -> bool:
        return "strftime_now" in self.source

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Render with the kept day, and give errors in one line."""
        names = _compiled(self.source).environment.globals  # transformers' own, for all who render this text
        asked = names["strftime_now"]
        now = datetime.datetime.combine(self.day, datetime.time())
        names["strftime_now"] = now.strftime
        try:
            yield
        except Exception as error:  # whatever a template's expressions raise
            raise ValueError(f"the chat template refuses it ({one_line(error)})") from None
        finally:
            names["strftime_now"] = asked


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as transformers takes them: it leaves out fields that are null."""
    fields = ({"role": role, "content": content, **others} for role, content, others in messages)
    return [{name: value for name, value in turn.items() if value is not None} for turn in fields]


def _compiled(source: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source)


def _settings_of(folder: Path) -> Any:
    """The folder's tokenizer as transformers reads its configuration, templates and special tokens; no vocabulary."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special_names(folder / TOKENIZER_FILES[0])  # raises UserError where a file is no JSON object
    try:
        return PreTrainedTokenizerFast.from_pretrained(
            folder, tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{folder}: the tokenizer's settings cannot be read ({one_line(error)})") from None
