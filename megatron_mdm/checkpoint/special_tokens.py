"""What the files of a checkpoint, or a run, say about special tokens, one compared with another: which ids are taken.

Import, `model.init_from`, training and generation all ask here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.checkpoint.huggingface import CONFIG, GENERATION_CONFIG, read_json
from megatron_mdm.config.errors import UserError
from megatron_mdm.data.tokenizer_files import Backend, open_tokenizer
from megatron_mdm.data.tokenizer_folder import SETTINGS, TOKENIZER_FILES, special_names, tokenizer_file
from megatron_mdm.models.families.family import Family, Json, json_text

NAMES = ("mask", "pad", "eos", "bos")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_USUAL_MASKS = ("<mask>", "<|mask|>", "[MASK]", "<|mdm_mask|>", "<MASK>", "<|mask_token|>")
_TAKEN = {  # where files disagree
    "pad": "the first is taken",
    "eos": "a response ends at any of them",
    "bos": "a chat template writes that of tokenizer_config.json",
}
_MASK_NAME = re.compile(r"\W*(?:mdm_)?mask(?:_token)?\W*", re.IGNORECASE)


class Statement(NamedTuple):
    where: str  # "config.json (mask_token_id)"
    ids: tuple[int, ...]

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.ids))} by {self.where}"


class Choice(NamedTuple):
    ids: tuple[int, ...]  # the first counts; others end responses, too; none: no file says anything
    notes: tuple[str, ...]  # a line each where files disagree


@dataclass(frozen=True)
class Stated:
    """Statements about each special token, in the order in which they count."""

    by: Mapping[str, Sequence[Statement]]
    notes: tuple[str, ...] = ()  # what was stated in vain, a line each

    def choice(self, name: str, key: str) -> Choice:
        """The choice among the ids that are stated. Files may disagree about all but the mask token, and that is told.

        key: how a user chooses. Raises UserError naming two files that state different mask tokens.
        """
        statements = self.by.get(name, ())
        if not statements:
            return Choice((), ())
        first, *others = statements
        ids = list(first.ids)
        if name == "mask" and len(ids) > 1:
            raise UserError(f"the mask token is {first}: choose one with {key}")
        notes = []
        for other in others:
            if other.ids[0] == ids[0] or (name == "eos" and set(other.ids) <= set(ids)):
                ids += [token for token in other.ids if name == "eos" and token not in ids]
                continue
            if name == "mask":
                raise UserError(f"the mask token is {first}, but {other}; choose one with {key}")
            notes.append(f"{name} token: {first}, but {other}; {_TAKEN[name]}")
            ids += [token for token in other.ids if name == "eos" and token not in ids]
        return Choice(tuple(ids if name == "eos" else ids[:1]), tuple(notes))

    def contradicts(self, name: str, token_id: int) -> Statement | None:
        """A statement that names another token; for eos, the first one if none of all names this."""
        statements = self.by.get(name, ())
        if name == "eos":
            return statements[0] if statements and all(token_id not in other.ids for other in statements) else None
        return next((other for other in statements if token_id not in other.ids), None)


def folder_tokenizer(folder: Path) -> tuple[Backend, Path | None, str]:
    """The tokenizer of a checkpoint's folder and its file, and a line where there is one that cannot be read.

    Raises UserError where tokenizer.json or tokenizer.model is damaged.
    """
    file = tokenizer_file(folder)
    if not file.is_file():
        return open_tokenizer(""), None, ""
    try:
        return open_tokenizer(file), file, ""
    except UserError as error:
        if file.name != TOKENIZER_FILES[-1]:
            raise
        return open_tokenizer(""), None, f"no tokenizer: {error}"


def stated_by_folder(folder: Path, config: Json, backend: Backend, lenient: Sequence[str] = ()) -> Stated:
    """What config.json, generation_config.json, tokenizer_config.json and special_tokens_map.json state, in this order.

    Raises UserError where an id is neither an integer nor a list of them, unless lenient names its token; −1, null and
    [] mean that there is none.
    """
    generation = read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else {}
    named = special_names(folder / TOKENIZER_FILES[0])
    by: dict[str, list[Statement]] = {}
    notes: list[str] = []
    for name in NAMES:
        by[name] = []
        for file, values in ((CONFIG, config), (GENERATION_CONFIG, generation)):
            key = f"{name}_token_id"
            ids = _ids(values.get(key), f"{folder / file}: '{key}'", name in lenient)
            by[name] += [Statement(f"{folder / file} ({key})", ids)] if ids else []
        for file, texts in reversed(named.items()):
            text = texts.get(f"{name}_token", "")
            token_id = backend.token_id(text) if text else None
            by[name] += [Statement(f"{folder / file} ({text})", (token_id,))] if token_id is not None else []
            if text and token_id is None and backend.num_ids:
                notes.append(f"{name} token: {folder / file} names '{text}', which the tokenizer lacks")
    return Stated(by, tuple(notes))


def mask_of_family(family: Family, rows: int) -> list[Statement]:
    """The mask token of a family whose files state none."""
    return [Statement(f"{family.architecture}'s own", (family.mask_id,))] if 0 <= family.mask_id < rows else []


def _masks_by_name(backend: Backend) -> dict[str, int]:
    found = {text: special.id for text, special in backend.special.items() if _MASK_NAME.fullmatch(text)}
    usual = {text: backend.token_id(text) for text in _USUAL_MASKS}  # which need not be marked as special
    return found | {text: token_id for text, token_id in usual.items() if token_id is not None}


def other_masks(mask_id: int, backend: Backend, file: Path | None) -> list[str]:
    """A line where the tokenizer has mask tokens by their names, but not the one that is used."""
    named = _masks_by_name(backend)
    if not named or mask_id in named.values():
        return []
    return [f"mask token {mask_id}, though {file} has {', '.join(f'{text} {i}' for text, i in named.items())}"]


def mask_by_name(backend: Backend, file: Path | None, rows: int, key: str) -> list[Statement]:
    """A special token of the tokenizer whose text says that it is the mask. Raises UserError where several do."""
    found = {text: token_id for text, token_id in _masks_by_name(backend).items() if token_id < rows}
    if len(set(found.values())) > 1:
        choices = ", ".join(f"{text} {token_id}" for text, token_id in found.items())
        raise UserError(
            f"{file}: several tokens could be the mask token ({choices}), and no file names one; choose with {key}"
        )
    return [Statement(f"{file} ({text}, by its name)", (token_id,)) for text, token_id in found.items()]


def has_chat_template(folder: Path) -> bool:
    """Whether a folder's files hold a template of conversations, good or bad."""
    if any((folder / name).exists() for name in _TEMPLATE_FILES):
        return True
    settings = folder / SETTINGS
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def _ids(value: Any, where: str, lenient: bool) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if value is None:
        values = []
    integers = [token for token in values if type(token) is int]
    if len(integers) < len(values) and not lenient:
        raise UserError(f"{where} must be an id or a list of ids, got {json_text(value)}")
    return tuple(dict.fromkeys(token for token in integers if token >= 0))
