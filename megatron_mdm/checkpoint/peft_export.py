"""The adapters of a run's checkpoint → a folder that the peft library loads."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.checkpoint.base import check_base
from megatron_mdm.checkpoint.convert import family_to_write, inputs_of, publish, temporary_folder, typed_output
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, Transposed
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.checkpoint.peft import ADAPTER_FILE, A, target_modules, tensor_names
from megatron_mdm.checkpoint.peft_config import ADAPTER_CONFIG, settings_to_write
from megatron_mdm.checkpoint.stream import OutputFile, write_files
from megatron_mdm.checkpoint.tensors import WEIGHT
from megatron_mdm.checkpoint.weights import adapters_in, model_of, opened
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.models.adapter_rows import adapters_of
from megatron_mdm.models.families.family import Family


def export_adapter(run: NativeCheckpoint, output: Path, family_name: str, dtype: str) -> list[str]:
    """Write a run's adapters. family_name: of FAMILIES, or auto: the one that the base was imported from. dtype auto:
    as stored. Returns lines on what the folder needs beside it."""
    model = run.config.model
    if not model.lora.rank:
        raise UserError(f"{run.folder}: the run has no adapters ('model.lora.rank' is 0); leave --adapter out")
    family = family_to_write(run, family_name)
    check_base(run.folder, run.config)
    outputs = {name: typed_output(tensor, dtype) for name, tensor in tensors_to_write(run, family).items()}
    settings = settings_to_write(model.lora, model.init_from, target_modules(family, model), family.peft_task)
    temporary = temporary_folder(output)
    write_files([OutputFile(ADAPTER_FILE, outputs)], temporary, inputs_of(run))
    write_json(temporary / ADAPTER_CONFIG, settings)
    publish(temporary, output)
    return _notes(run)


def tensors_to_write(run: NativeCheckpoint, family: Family, kind: str = WEIGHT) -> dict[str, LazyTensor]:
    """A run's adapters, or their moments, by PEFT's names."""
    model = run.config.model
    weights = adapters_in(run, kind)
    rows = {(adapter.target, adapter.layer): adapter for adapter in adapters_of(model)}
    tensors: dict[str, LazyTensor] = {}
    for name, (target, layer, side) in tensor_names(family, model).items():
        adapter = rows.get((target, layer))
        if adapter is not None:
            ours = weights.tensors[adapter.a if side == A else adapter.b]
            tensors[name] = Transposed(ours) if target == "embedding" and side == A else ours
    return tensors


def _notes(run: NativeCheckpoint) -> list[str]:
    model = run.config.model
    base = opened(Path(model.init_from), model.ignore_fields)
    rows = model_of(base).vocab_size
    notes = [f"base: {model.init_from}"]
    if isinstance(base, NativeCheckpoint):
        notes.append("the base is a run: export it, too, and give that folder as 'base_model_name_or_path'")
    if rows != model.vocab_size:
        notes.append(
            f"the base's table has {rows} rows, the run's {model.vocab_size}: resize it (resize_token_embeddings), the "
            "new rows being the mean of the others"
        )
    return notes
