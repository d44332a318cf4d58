"""A Hugging Face checkpoint's folder: opened lazily, and checked before any of its tensors is used."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, Part, Rows, blocks
from megatron_mdm.checkpoint.safetensors_file import SafetensorsFile, StoredTensor
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.families import family_of
from megatron_mdm.models.families.family import Family, Json
from megatron_mdm.models.families.keymap import RowRange, family_shapes, our_parameters

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files beside the weights that are handed on as they are. Code is not: it is never run, and so never needed.
COMPANIONS = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_ADAPTER = "adapter_model"  # peft's, beside a model or without one
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# Buffers that old versions of transformers saved; they follow from the configuration.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    folder: Path
    config: Json
    family: Family
    model: ModelConfig  # what config.json describes
    tensors: dict[str, StoredTensor]
    notes: tuple[str, ...]  # what was left out or accepted unread, a line each

    @classmethod
    def open(cls, folder: Path, ignore_fields: Sequence[str] = ()) -> HuggingFaceCheckpoint:
        """Read configuration and headers. Raises UserError naming what is missing, damaged, unknown or unsupported.

        ignore_fields: of config.json, to be read as if they were absent.
        """
        config = read_json(folder / CONFIG)
        where = str(folder / CONFIG)
        family = family_of(config, where)
        model = model_section(family, config, where, ignore_fields)
        tensors = open_tensors(folder)
        notes = (*family.notes(config, where, ignore_fields), *_unread_files(folder, tensors))
        checkpoint = cls(folder, config, family, model, tensors, notes)
        checkpoint._check()
        return checkpoint

    def lazy_tensors(self) -> dict[str, LazyTensor]:
        """Our parameters by name, as whole tensors that lie in the files."""
        return mapped(self.tensors, our_parameters(self.family, self.model))

    def _check(self) -> None:
        shapes = family_shapes(self.family, self.model)
        for name, shape in shapes.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                raise UserError(f"{self.folder}: no file holds the tensor '{name}' of a {self.family.architecture}")
            if tensor.shape != shape:
                raise UserError(
                    f"{tensor.path}: '{name}' has shape {list(tensor.shape)}; by {CONFIG} it would be {list(shape)}"
                )
        for name, tensor in self.tensors.items():
            if name in shapes or _DERIVED.search(name):
                continue
            if name == self.family.keys.head and self.model.tie_embeddings:
                self._check_tied(tensor)
                continue
            raise UserError(f"{tensor.path}: '{name}' has no place in a {self.family.architecture} with this {CONFIG}")

    def _check_tied(self, head: StoredTensor) -> None:
        embedding = self.tensors[self.family.keys.embedding]
        if not same_values(embedding, head):
            raise UserError(
                f"{head.path}: '{head.name}' differs from '{embedding.name}', but {CONFIG} says that they are tied"
            )


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the files that transformers would read: model.safetensors, else those of the index. Without
    either, those of all numbered files, or of all."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        files = [folder / SINGLE] if (folder / SINGLE).is_file() else _without_index(folder)
        _check_files(folder, files)
        return {name: tensor for path in files for name, tensor in SafetensorsFile(path).tensors.items()}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index}: has no 'weight_map'")
    opened: dict[str, SafetensorsFile] = {}
    tensors = {}
    for name, file in places.items():
        file = str(file)
        if file not in opened:
            path = folder / file
            if not path.is_file() or path.parent != folder:
                raise UserError(f"{index}: names the file '{file}' (for '{name}'), which is absent")
            opened[file] = SafetensorsFile(path)
        if name not in opened[file].tensors:
            raise UserError(f"{folder / file}: does not hold '{name}', which {INDEX} places there")
        tensors[name] = opened[file].tensors[name]
    return tensors


def model_section(family: Family, config: Json, where: str, ignore_fields: Sequence[str] = ()) -> ModelConfig:
    """Our model section for a config.json."""
    try:
        values = family.read(config, where, ignore_fields)
        return ModelConfig.model_validate({**values, "ignore_fields": tuple(ignore_fields)})
    except ValidationError as error:
        detail = error.errors()[0]
        field = str(detail["loc"][0]) if detail["loc"] else ""
        theirs = family.fields.get(field, field)
        raise UserError(f"{where}: '{theirs}': {detail['msg']}, got {detail['input']!r}") from None


def mapped(tensors: dict[str, Any], ranges: dict[str, list[RowRange]]) -> dict[str, LazyTensor]:
    """Tensors put together from rows of others."""
    return {
        name: Rows([Part(tensors[source], start, stop - start) for source, start, stop in rows])
        for name, rows in ranges.items()
    }


def same_values(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors have the same shape, type and bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pairs = zip(blocks(one, one.dtype), blocks(other, other.dtype))
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a Hugging Face checkpoint, good or bad, rather than a run's."""
    return (folder / CONFIG).is_file()


def read_json(path: Path) -> Json:
    """A JSON object. Raises UserError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _without_index(folder: Path) -> list[Path]:
    """Safetensors files that may be a model's: the numbered ones, else all but adapters'."""
    files = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(_ADAPTER)]
    return [path for path in files if _NUMBERED.fullmatch(path.name)] or files


def _unread_files(folder: Path, tensors: dict[str, StoredTensor]) -> list[str]:
    read = {tensor.path for tensor in tensors.values()}
    left = [path.name for path in sorted(folder.glob("*.safetensors")) if path not in read]
    return [f"{folder}: not read, as transformers would not: {', '.join(left)}"] if left else []


def _check_files(folder: Path, files: list[Path]) -> None:
    if not files:
        pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{pickles[0]}: pickled weights are not read, since that can run code; convert them to safetensors"
            )
        adapter = next(folder.glob(f"{_ADAPTER}*.safetensors"), None)
        if adapter:
            raise UserError(f"{adapter}: an adapter without its model; merge the two and save the result")
        raise UserError(f"{folder}: holds no safetensors files")
    for path in files:
        match = _NUMBERED.fullmatch(path.name)
        if not match:
            continue
        for number in range(1, int(match[3]) + 1):
            other = folder / f"{match[1]}-{number:05d}-of-{match[3]}.safetensors"
            if not other.is_file():
                raise UserError(f"{folder}: the file '{other.name}' is missing")
