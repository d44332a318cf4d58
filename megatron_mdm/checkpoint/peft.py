"""A folder of the peft library's with an adapter: opened lazily, and checked against the model that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, Part, Rows, Transposed, blocks, with_rows
from megatron_mdm.checkpoint.merged import AdapterWeights
from megatron_mdm.checkpoint.peft_config import ADAPTER_CONFIG, PeftSettings, read_settings
from megatron_mdm.checkpoint.safetensors_file import SafetensorsFile, StoredTensor
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.adapter_rows import TABLES, TARGETS, Adapter, adapters_of, matrix_shape
from megatron_mdm.models.families import FAMILIES
from megatron_mdm.models.families.family import Family
from megatron_mdm.models.families.keymap import matrices
from megatron_mdm.models.parameters import EMBEDDING, OUTPUT

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = 0, 1
# Ends of their names, behind the module's; by whether that is the embedding.
_ENDS = {False: (".lora_A.weight", ".lora_B.weight"), True: (".lora_embedding_A", ".lora_embedding_B")}
_BY_TOKENS = {("embedding", A): 1, ("head", B): 0}  # (target, side) → the dimension of tokens
# Of a table itself, which PEFT writes beside the adapter where it is a target, or has been resized.
_OF_A_TABLE = (".base_layer.weight", ".weight")


class _Place(NamedTuple):
    target: str
    layer: int
    side: int  # A or B


@dataclass(frozen=True)
class PeftAdapter:
    folder: Path
    weights: AdapterWeights
    base: str  # the model that it was trained on, by its name or folder; empty: not told
    tables: Mapping[str, StoredTensor]  # the base's, by our names, where PEFT wrote them beside the adapter
    notes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, model: ModelConfig, family: Family | None = None) -> PeftAdapter:
        """Read configuration and headers. model: the section of the model that the adapter is for. family: whose names
        its tensors have; None: any.

        Raises UserError naming what is missing, damaged, of another shape, or not W + scaling · B·A in all layers.
        """
        settings = read_settings(folder, model.num_layers)
        path = folder / ADAPTER_FILE
        stored = stored_tensors(folder)
        family = family_of_names(path, stored, model, family)
        places, tables = _by_place(path, stored, model, family)
        _check(path, places, settings, model, family)
        targets = {place.target for place in places}
        lora = settings.lora.model_copy(update={"targets": tuple(name for name in TARGETS if name in targets)})
        tensors: dict[str, LazyTensor] = {}
        for adapter in adapters_of(model.model_copy(update={"lora": lora})):
            a, b = (places[_Place(adapter.target, adapter.layer, side)] for side in (A, B))
            tensors |= _ours(adapter, a, b, model)
        return cls(folder, AdapterWeights(lora, tensors), settings.base, tables, settings.notes)

    def check_base(self, tensors: Mapping[str, LazyTensor]) -> None:
        """Raise UserError where a table that PEFT wrote beside the adapter is not that of the base with these tensors:
        it was resized, or trained."""
        for name, table in self.tables.items():
            base = tensors[name]
            if base.shape[0] > table.shape[0]:
                base = Rows([Part(base, 0, table.shape[0])])  # it has grown since, as by a mask token
            pairs = zip(blocks(base, torch.float32), blocks(table, torch.float32))
            if tuple(base.shape) != table.shape or not all(torch.equal(ours, theirs) for ours, theirs in pairs):
                raise UserError(
                    f"{table.path}: '{table.name}' is not the base's: the adapter was trained on another model, or "
                    "with a table that was resized; give that model as the base"
                )


def is_adapter(folder: Path) -> bool:
    """Whether a folder is PEFT's, good or bad."""
    return (folder / ADAPTER_CONFIG).is_file()


def tensor_names(family: Family, model: ModelConfig) -> dict[str, _Place]:
    """Name in PEFT's file → what it is, for all matrices that an adapter can stand beside."""
    names = {}
    for weight, (target, layer) in matrices(family, model).items():
        for side, end in enumerate(_ENDS[target == "embedding"]):
            names[f"{PREFIX}{weight.removesuffix('.weight')}{end}"] = _Place(target, layer, side)
    return names


def target_modules(family: Family, model: ModelConfig) -> list[str]:
    """PEFT's list of the modules that the model's adapters stand beside: for each the shortest end of its name that no
    other matrix's has (a LLaDA's head and down projections are both called ff_out)."""
    adapted = {(adapter.target, adapter.layer) for adapter in adapters_of(model)}
    places = {weight.removesuffix(".weight"): place for weight, place in matrices(family, model).items()}
    others = {end for module, place in places.items() if place not in adapted for end in _name_ends(module)}
    found = dict[str, None]()
    for module in (module for module, place in places.items() if place in adapted):
        found[next(end for end in _name_ends(module) if end not in others)] = None
    return list(found)


def _name_ends(module: str) -> list[str]:
    """The last part of a name, the last two …, the name."""
    parts = module.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What the file holds, by PEFT's names. Raises UserError where there is no file that can be read."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        pickle = path.with_suffix(".bin")
        if pickle.is_file():
            raise UserError(
                f"{pickle}: pickled weights are not read, since that can run code; save the adapter again with PEFT's "
                "save_pretrained, which writes safetensors"
            )
        raise UserError(f"{folder}: holds no {ADAPTER_FILE}")
    tensors = SafetensorsFile(path).tensors
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def family_of_names(
    path: Path, stored: Mapping[str, StoredTensor], model: ModelConfig, family: Family | None = None
) -> Family:
    """The family whose names the tensors have, of all, or this one. Raises UserError where it is none."""
    for candidate in [family] if family else FAMILIES.values():
        if not stored.keys().isdisjoint(tensor_names(candidate, model)):
            return candidate
    named = f"a {family.architecture}" if family else f"any of {', '.join(FAMILIES)}"
    raise UserError(f"{path}: holds no adapter of {named}, but '{next(iter(stored))}'")


def _by_place(
    path: Path, stored: Mapping[str, StoredTensor], model: ModelConfig, family: Family
) -> tuple[dict[_Place, StoredTensor], dict[str, StoredTensor]]:
    """(what is A or B of an adapter, our names of the tables that lie beside them)"""
    names = tensor_names(family, model)
    keys = {EMBEDDING: family.keys.embedding, OUTPUT: family.keys.head}
    tables = {PREFIX + key.removesuffix(".weight") + end: name for name, key in keys.items() for end in _OF_A_TABLE}
    for name in stored:
        if name not in names and name not in tables:
            raise UserError(
                f"{path}: '{name}' is neither A nor B of an adapter of a {family.architecture} of {model.num_layers} "
                "layers"
            )
    places = {names[name]: tensor for name, tensor in stored.items() if name in names}
    return places, {tables[name]: tensor for name, tensor in stored.items() if name in tables}


def _check(
    path: Path, places: Mapping[_Place, StoredTensor], settings: PeftSettings, model: ModelConfig, family: Family
) -> None:
    """Raise UserError where the tensors are not A and B of whole targets, or 'target_modules' names others."""
    targets = {place.target for place in places}
    if model.tie_embeddings and not targets.isdisjoint(TABLES):
        raise UserError(f"{path}: has an adapter of the embedding or the head, which are one table in this model")
    for name, place in tensor_names(family, model).items():
        module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        named = place.target in targets if settings.matches is None else settings.matches(module)
        if named and place.target in targets and place not in places:
            raise UserError(f"{path}: lacks '{name}'; only adapters of all layers, with A and B, are supported")
        if named != (place in places):
            says = "names" if named else "does not name"
            holds = "holds" if place in places else "does not hold"
            raise UserError(
                f"{path}: {holds} '{name}', but 'target_modules' in {ADAPTER_CONFIG} {says} the module '{module}'"
            )
        if place in places:
            _check_shape(path, place, places[place], settings.lora.rank, model)


def _check_shape(path: Path, place: _Place, tensor: StoredTensor, rank: int, model: ModelConfig) -> None:
    outputs, inputs = matrix_shape(model, place.target)
    if place.target == "embedding":
        outputs, inputs = inputs, outputs  # PEFT takes the table for a map of one-hot tokens
    expected = (rank, inputs) if place.side == A else (outputs, rank)
    fits = tensor.shape == expected
    if (place.target, place.side) in _BY_TOKENS and len(tensor.shape) == 2:
        dim = _BY_TOKENS[place.target, place.side]
        # Tokens that the table has been given since, as a mask token, have no adapter: theirs is zero.
        fits = tensor.shape[dim] <= expected[dim] and tensor.shape[1 - dim] == rank
    if not fits:
        raise UserError(
            f"{path}: '{tensor.name}' has shape {list(tensor.shape)}; by {ADAPTER_CONFIG} and the model it would be "
            f"{list(expected)}"
        )


def _ours(adapter: Adapter, a: StoredTensor, b: StoredTensor, model: ModelConfig) -> dict[str, LazyTensor]:
    """A and B as the rows of our table are."""
    rows = matrix_shape(model, adapter.target)[0]
    if adapter.target == "embedding":
        return {adapter.a: with_rows(Transposed(a), rows), adapter.b: b}
    return {adapter.a: a, adapter.b: with_rows(b, rows)}
