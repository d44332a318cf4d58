"""A run's special tokens and template beside those of what it starts from: taken where the configuration leaves them
open, compared where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.checkpoint.choice import located
from megatron_mdm.checkpoint.huggingface import CONFIG, is_checkpoint, model_section, read_json
from megatron_mdm.checkpoint.native import HUGGINGFACE, RUN_CONFIG
from megatron_mdm.checkpoint.special_tokens import (
    Stated,
    Statement,
    folder_tokenizer,
    has_chat_template,
    mask_by_name,
    mask_of_family,
    stated_by_folder,
)
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import DataConfig, ModelConfig, RunConfig
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mdm.data.tokenizer_files import open_tokenizer
from megatron_mdm.models.families import family_of

_KEYS = ("mask_token", "pad_token", "eos_token", "end_tokens", "template")


def with_initial_tokens(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration in which the special tokens and the template that 'data' does not set are those of
    model.init_from, and a line for each that was taken or that contradicts what 'data' sets.

    Raises UserError where model.init_from names no folder, or its files name two mask tokens and 'data' none.
    """
    if not config.model.init_from:
        return config, []
    folder = Path(config.model.init_from)
    data = config.data
    if not folder.is_dir():
        if data.model_fields_set.issuperset(_KEYS):  # as they are when a run is resumed
            return config, []
        raise UserError(f"'model.init_from' {folder}: no such folder")
    start = _of_folder(folder, config) if is_checkpoint(folder) else _of_run(located(folder)[0])
    changes, told = _tokens(data, start.stated)
    data = data.model_copy(update=changes)
    template = start.template
    if template != data.template and "template" not in data.model_fields_set and data.format != "corpus":
        data, line = _with_template(data, template, folder)
        told.append(line)
    return config.model_copy(update={"model": _with_rows(config.model, data, start.rows), "data": data}), [
        *start.notes,
        *told,
    ]


def contradictions(run_folder: Path, tokenizer: Tokenizer) -> list[str]:
    """A line for each special token of a run that the Hugging Face files it keeps know by another id."""
    kept = run_folder / HUGGINGFACE
    if not is_checkpoint(kept):
        return []
    try:
        stated = stated_by_folder(kept, read_json(kept / CONFIG), tokenizer.backend)
    except UserError as error:
        return [str(error)]
    lines = []
    for name, token_id in (("mask", tokenizer.mask_id), ("eos", tokenizer.eos_id)):
        other = stated.contradicts(name, token_id)
        if other:
            lines.append(f"{name} token {token_id}, by the run's {RUN_CONFIG}, though it is {other}")
    return lines


class _Start(NamedTuple):
    """What a run begins with, by its files."""

    stated: Stated
    template: str
    rows: int  # of its table
    notes: Sequence[str]


def _of_folder(folder: Path, config: RunConfig) -> _Start:
    theirs = read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    family = family_of(theirs, where)
    rows = model_section(family, theirs, where, config.model.ignore_fields).vocab_size
    assert isinstance(rows, int)
    backend, file, fault = folder_tokenizer(folder)
    unread = [name for name in ("mask", "pad", "eos") if f"{name}_token" in config.data.model_fields_set]
    stated = stated_by_folder(folder, theirs, backend, lenient=unread)
    if not stated.by["mask"]:
        fallback = mask_of_family(family, rows)
        if not fallback and "mask" not in unread:
            fallback = mask_by_name(backend, file, rows, "'data.mask_token'")
        stated = replace(stated, by={**stated.by, "mask": fallback})
    template = "tokenizer" if has_chat_template(folder) else "plain"
    return _Start(stated, template, rows, [*([fault] if fault else []), *stated.notes])


def _of_run(folder: Path) -> _Start:
    if not (folder / RUN_CONFIG).is_file():
        return _Start(Stated({}), "plain", 0, [])  # what is wrong with it is said where its weights are read
    config = load_config(folder / RUN_CONFIG)
    data = config.data
    rows = config.model.vocab_size
    notes = list[str]()
    given: dict[str, Any] = {name: getattr(data, f"{name}_token") for name in ("mask", "pad", "eos")}
    try:
        tokenizer = load_tokenizer(data.model_copy(update={"template": "plain"}))
        given = {"mask": tokenizer.mask_id, "pad": tokenizer.pad_id, "eos": tokenizer.eos_id}
    except UserError as error:
        notes.append(f"special tokens of {folder} that are texts are not compared ({error})")
    by = {
        name: [Statement(f"{folder / RUN_CONFIG} (data.{name}_token)", (token,))]
        for name, token in given.items()
        if isinstance(token, int)
    }
    return _Start(Stated(by), data.template, rows if isinstance(rows, int) else 0, notes)


def _with_rows(model: ModelConfig, data: DataConfig, rows: int) -> ModelConfig:
    """The model section with the table's size, where it leaves that open and a tokenizer's ids, new ones too, fit."""
    if model.vocab_size != "tokenizer":
        return model
    backend = open_tokenizer(data.tokenizer)
    tokens = {data.mask_token, data.pad_token, data.eos_token}
    new = sum(isinstance(token, str) and backend.token_id(token) is None for token in tokens)
    return model.model_copy(update={"vocab_size": rows}) if backend.num_ids + new <= rows else model


def _tokens(data: DataConfig, stated: Stated) -> tuple[dict[str, Any], list[str]]:
    """(keys of data to change, what to tell)"""
    backend = open_tokenizer(data.tokenizer)
    changes: dict[str, Any] = {}
    notes: list[str] = []
    for name in ("eos", "pad", "mask"):
        key = f"{name}_token"
        value = getattr(data, key)
        mine = backend.token_id(value) if isinstance(value, str) else value
        if key in data.model_fields_set:
            other = stated.contradicts(name, -1 if mine is None else mine)
            if other:
                notes.append(f"{name} token {_token_text(value, mine)}, by 'data.{key}', though it is {other}")
            elif name == "eos":
                changes |= _ends([end for end in stated.choice(name, key).ids if end != mine], data)
            continue
        ids, told = stated.choice(name, f"'data.{key}'")
        notes += told
        where = stated.by[name][0].where if ids else ""
        if name == "pad" and not ids and "eos_token" in changes:
            ids = (changes["eos_token"],)
            where = "the end token, since no file names one"
        if ids and ids[0] != mine:
            changes[key] = ids[0]
            notes.append(f"{name} token {ids[0]}, by {where}, since 'data.{key}' is not set")
        if name == "eos":
            changes |= _ends(ids[1:], data)
    return changes, notes


def _ends(others: Sequence[int], data: DataConfig) -> dict[str, Any]:
    """The key data.end_tokens, by which responses end besides eos, unless 'data' sets it."""
    return {"end_tokens": tuple(others)} if others and "end_tokens" not in data.model_fields_set else {}


def _with_template(data: DataConfig, template: str, folder: Path) -> tuple[DataConfig, str]:
    taken = data.model_copy(update={"template": template})
    try:
        load_tokenizer(taken)
    except UserError as error:
        return (
            data,
            f"template {data.template}, though {folder} has {template}, since the latter cannot be used: {error}",
        )
    return taken, f"template {template}, that of {folder}, since 'data.template' is not set"


def _token_text(value: int | str, token_id: int | None) -> str:
    """A token as 'data' names it, with its id; None: the tokenizer lacks it."""
    if token_id is None:
        return f"{value} (a new id)"
    return f"{token_id}" if token_id == value else f"{token_id} ({value})"
