"""Which adapter is meant by a folder, the peft library's or a run's, and whether it fits a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_mdm.checkpoint.base import noted_base
from megatron_mdm.checkpoint.choice import located
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, with_rows
from megatron_mdm.checkpoint.manifest import MANIFEST
from megatron_mdm.checkpoint.merged import AdapterWeights, without_adapters
from megatron_mdm.checkpoint.native import RUN_CONFIG, NativeCheckpoint
from megatron_mdm.checkpoint.peft import ADAPTER_FILE, PeftAdapter, is_adapter
from megatron_mdm.checkpoint.peft_config import ADAPTER_CONFIG
from megatron_mdm.checkpoint.weights import adapters_in, check_same_architecture
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.adapter_rows import targets_of
from megatron_mdm.models.families.family import Family
from megatron_mdm.models.parameters import parameter_table


class FoundAdapter(NamedTuple):
    weights: AdapterWeights
    sha256: str  # of all that it depends on besides the base
    base: str  # fingerprint of the weights that it was trained beside (base.py); empty: not known
    notes: tuple[str, ...]


def read_adapter(
    folder: Path, model: ModelConfig, family: Family | None, base: Mapping[str, LazyTensor]
) -> FoundAdapter:
    """The adapter in a folder, for a model. model: without adapters. family: whose names a PEFT folder has; None: any.
    base: the model's own weights. Raises UserError naming what is damaged, or by what it does not fit."""
    if is_adapter(folder):
        found = PeftAdapter.open(folder, model, family)
        found.check_base(base)
        digest = hashlib.sha256()
        for name in (ADAPTER_CONFIG, ADAPTER_FILE):
            digest.update(sha256(folder / name).encode())
        return FoundAdapter(found.weights, digest.hexdigest(), "", found.notes)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of an adapter")
    if not (located(folder)[0] / RUN_CONFIG).is_file():
        raise UserError(
            f"{folder}: neither an adapter of PEFT's ({ADAPTER_CONFIG}) nor a run with adapters ({RUN_CONFIG})"
        )
    run = NativeCheckpoint.open(folder)
    if not run.config.model.lora.rank:
        raise UserError(f"{folder}: the run there has no adapters; its 'model.lora.rank' is 0")
    check_same_architecture(model, without_adapters(run.config.model), run.folder / RUN_CONFIG)
    weights = adapters_in(run)
    table = parameter_table(model.model_copy(update={"lora": weights.lora}))
    # Tokens that the model has been given since have no adapter: theirs is zero.
    tensors = {
        name: with_rows(tensor, table[name].shape[0]) if table[name].is_vocabulary else tensor
        for name, tensor in weights.tensors.items()
    }
    return FoundAdapter(AdapterWeights(weights.lora, tensors), sha256(run.path / MANIFEST), noted_base(run.folder), ())


def first_adapters(model: ModelConfig, family: Family | None, base: Mapping[str, LazyTensor]) -> FoundAdapter:
    """What model.lora.init_from names. Raises UserError naming the key of model.lora by which it differs."""
    folder = Path(model.lora.init_from)
    found = read_adapter(folder, without_adapters(model), family, base)
    theirs = found.weights.lora
    for name in ("rank", "alpha", "rslora"):
        mine, other = getattr(model.lora, name), getattr(theirs, name)
        if mine != other:
            raise UserError(f"'model.lora.{name}' is {mine}, but {other} by {folder}; set it to {other}")
    wanted, there = targets_of(model), targets_of(model.model_copy(update={"lora": theirs}))
    if wanted != there:
        raise UserError(
            f"'model.lora.targets' are {', '.join(sorted(wanted))}, but {', '.join(sorted(there))} by {folder}; set "
            "them to these"
        )
    return found
