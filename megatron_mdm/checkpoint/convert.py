"""Hugging Face checkpoint → a run's folder, and back; both streaming, atomic and resumable."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.checkpoint.base import fingerprint
from megatron_mdm.checkpoint.huggingface import (
    COMPANIONS,
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    SINGLE,
    HuggingFaceCheckpoint,
    is_checkpoint,
    mapped,
)
from megatron_mdm.checkpoint.imported_tokens import SpecialTokens, special_tokens
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, cut, with_grown_tables, with_padding
from megatron_mdm.checkpoint.manifest import MANIFEST, TENSORS, entry_of, write_manifest
from megatron_mdm.checkpoint.merged import without_adapters
from megatron_mdm.checkpoint.native import CHECKPOINTS, HUGGINGFACE, RUN_CONFIG, NativeCheckpoint, keep_companions
from megatron_mdm.checkpoint.safetensors_file import StoredTensor
from megatron_mdm.checkpoint.special_tokens import has_chat_template
from megatron_mdm.checkpoint.store import STATE
from megatron_mdm.checkpoint.stream import JOURNAL, Output, OutputFile, split, write_files
from megatron_mdm.checkpoint.tensors import WEIGHT, file_name
from megatron_mdm.checkpoint.weights import check_no_adapter, whole_tensors
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256, write_atomically, write_json
from megatron_mdm.config.load import dump_config
from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.data.tokenizer import load_tokenizer
from megatron_mdm.data.tokenizer_folder import TOKENIZER_FILES, tokenizer_file, tokenizer_fingerprint
from megatron_mdm.models.costs import layer_costs
from megatron_mdm.models.families import FAMILIES, family_of
from megatron_mdm.models.families.family import Family, Json
from megatron_mdm.models.families.keymap import family_tensors
from megatron_mdm.models.parameters import parameter_table
from megatron_mdm.parallel.layout import partition

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # config.json's → ours
_LENGTH = 4096  # of sequences in an imported run's configuration, where the model allows longer ones


@dataclass(frozen=True)
class ImportOptions:
    tensor: int
    pipeline: int
    dtype: str  # of TYPES, or auto: as stored
    shard_bytes: int
    tokens: dict[str, str]  # mask, pad, eos: a text or an id where asked for
    ignore_fields: tuple[str, ...] = ()  # of config.json


def import_checkpoint(source: Path, output: Path, options: ImportOptions) -> list[str]:
    """Write a run's folder with the weights of a Hugging Face checkpoint. Returns lines that say what was chosen where
    the folder leaves a choice. Raises UserError before it writes anything where the checkpoint is not whole, and naming
    the tensor where it meets a bad one."""
    check_no_adapter(source)
    checkpoint = HuggingFaceCheckpoint.open(source, options.ignore_fields)
    special = special_tokens(checkpoint, options.tokens)
    model = checkpoint.model.model_copy(update={"vocab_size": special.vocab_size})
    _check_layout(model, options)
    tensors = with_grown_tables(checkpoint.lazy_tensors(), model)
    outputs = {name: typed_output(tensor, options.dtype) for name, tensor in tensors.items()}
    step = f"{CHECKPOINTS}/step-{0:08d}"
    files = _native_files(outputs, model, options, f"{step}/{TENSORS}")
    temporary = temporary_folder(output)
    entries = write_files(files, temporary, _fingerprint(checkpoint.tensors))
    write_json(temporary / step / STATE, {"imported_from": str(source)})
    names = {path.removeprefix(f"{step}/"): entry for path, entry in entries.items()}
    write_manifest(temporary / step, {STATE: entry_of(temporary / step / STATE), **names})
    keep_companions(source, temporary)
    run = _run_config(model, special, output, next(iter(outputs.values())).dtype)
    run, template = _with_template(run, special, source)
    write_atomically(temporary / RUN_CONFIG, dump_config(run, output))
    publish(temporary, output)
    return [*special.notes, template, *checkpoint.notes]


def export_checkpoint(run: NativeCheckpoint, output: Path, family_name: str, dtype: str, shard_bytes: int) -> Json:
    """Write a run's checkpoint, of any layout, as a Hugging Face checkpoint, adapters merged. Returns its config.json.

    family_name: of FAMILIES, or auto: the one it was imported from. dtype auto: as stored where the weights were
    imported, what config.json says (else fp32) where they have been trained.
    """
    model = without_adapters(run.config.model)
    base = run.huggingface_config()
    family = family_to_write(run, family_name)
    if model.extensions:
        named = ", ".join(model.extensions)
        raise UserError(f"{run.folder}: what 'model.extensions' {named} adds has no place in a Hugging Face checkpoint")
    base = base if family.architecture in base.get("architectures", []) else {}
    config = _huggingface_config(family.write(model, base), base, run)
    tensors = mapped(whole_tensors(run), family_tensors(family, model))
    as_imported = dtype == "auto" and run.weights_only and bool(base)
    if dtype == "auto" and not run.weights_only:
        dtype = _TYPE_NAMES.get(str(config.get("dtype", config.get("torch_dtype"))), "fp32")
    outputs = {name: typed_output(tensor, dtype) for name, tensor in tensors.items()}
    if not as_imported:
        config = _with_dtype(config, {output.dtype for output in outputs.values()})
    groups = split(outputs.items(), shard_bytes)
    files = [OutputFile(shard_name(number, len(groups)), group) for number, group in enumerate(groups, 1)]
    temporary = temporary_folder(output)
    write_files(files, temporary, inputs_of(run))
    if len(files) > 1:
        total = sum(file.num_bytes for file in files)
        places = {name: file.path for file in files for name in file.tensors}
        write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    _write_companions(run, temporary, config)
    publish(temporary, output)
    return config


def family_to_write(run: NativeCheckpoint, family_name: str) -> Family:
    """The family in whose form a run is written. Raises UserError where auto leaves it open."""
    base = run.huggingface_config()
    if family_name != "auto":
        return FAMILIES[family_name]
    if not base:
        raise UserError(f"{run.folder}: was not imported; choose its form with --family ({', '.join(FAMILIES)})")
    return family_of(base, f"{run.folder}/{HUGGINGFACE}/{CONFIG}")


def inputs_of(run: NativeCheckpoint) -> dict[str, str]:
    """What tells an interrupted export from one of other weights."""
    found = {"checkpoint": str(run.path), "manifest": sha256(run.path / MANIFEST)}
    return {**found, "base": fingerprint(Path(run.config.model.init_from))} if run.config.model.lora.rank else found


def typed_output(tensor: LazyTensor, dtype: str) -> Output:
    return Output(tensor, tensor.dtype if dtype == "auto" else TYPES[dtype])


def _native_files(
    outputs: dict[str, Output], model: ModelConfig, options: ImportOptions, folder: str
) -> list[OutputFile]:
    """The files that a run of this layout would have written."""
    bounds = partition(layer_costs(model, min(_LENGTH, model.max_sequence_length)), options.pipeline)
    files = []
    table = parameter_table(model)
    for stage in range(options.pipeline):
        layers = range(bounds[stage], bounds[stage + 1])
        mine = [(name, output) for name, output in outputs.items() if table[name].layers[0] in layers]
        for rank in range(options.tensor):
            shards = [(f"{name}/{WEIGHT}", _shard(name, output, model, rank, options.tensor)) for name, output in mine]
            for part, group in enumerate(split(shards, options.shard_bytes)):
                files.append(OutputFile(f"{folder}/{file_name(stage, rank, options.tensor, part)}", group))
    return files


def _shard(name: str, output: Output, model: ModelConfig, rank: int, degree: int) -> Output:
    row = parameter_table(model)[name]
    whole = with_padding(output.tensor, row, degree)
    return Output(cut(whole, row.split.get("tensor"), rank, degree), output.dtype)


def _check_layout(model: ModelConfig, options: ImportOptions) -> None:
    for name in ("num_heads", "num_kv_heads", "ffn_hidden_size"):
        if getattr(model, name) % options.tensor:
            raise UserError(f"the model's {name} {getattr(model, name)} is not a multiple of --tensor {options.tensor}")
    if options.pipeline > model.num_layers:
        raise UserError(f"--pipeline {options.pipeline} exceeds the model's {model.num_layers} layers")


def _run_config(model: ModelConfig, special: SpecialTokens, output: Path, dtype: torch.dtype) -> RunConfig:
    """A configuration by which programs find model and tokenizer; its training sections are placeholders."""
    length = min(_LENGTH, model.max_sequence_length)
    tokens = {"mask_token": special.mask_id, "pad_token": special.pad_id, "eos_token": special.eos_id}
    return RunConfig.model_validate(
        {
            "model": model.model_dump(),
            "data": {
                "train": "",
                "tokenizer": str(output / HUGGINGFACE / special.tokenizer.name) if special.tokenizer else "",
                "max_length": length,
                "end_tokens": special.end_ids,
                **tokens,
            },
            "batch": {"global_size": 1, "micro_size": 1},
            "optimizer": {"lr": 1e-5},
            "schedule": {"steps": 1},
            "precision": {"dtype": "bf16" if dtype == torch.bfloat16 else "fp32"},
            "checkpoint": {"directory": str(output)},
        }
    )


def _with_template(run: RunConfig, special: SpecialTokens, source: Path) -> tuple[RunConfig, str]:
    """The configuration with the folder's chat template, if it has one that can be used; and a line that says which
    template it is."""
    if not has_chat_template(source):
        return run, f"template {run.data.template}: the folder has no chat template"
    template = run.data.model_copy(update={"template": "tokenizer", "tokenizer": str(special.tokenizer or "")})
    try:
        load_tokenizer(template)
    except UserError as error:
        return run, f"template {run.data.template}: the folder's chat template cannot be used ({error})"
    data = run.data.model_copy(update={"template": "tokenizer"})
    return run.model_copy(update={"data": data}), "template tokenizer: the folder's chat template"


def _huggingface_config(config: Json, base: Json, run: NativeCheckpoint) -> Json:
    """A config.json with the special tokens' ids, unless it comes unchanged from the checkpoint that was imported."""
    if config == base and run.weights_only:
        return config
    tokenizer = load_tokenizer(run.config.data)
    ids = {"mask_token_id": tokenizer.mask_id, "pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    return {**config, **{name: value for name, value in ids.items() if not _names(base.get(name), value)}}


def _names(stated: Any, token_id: int) -> bool:
    """Whether an entry of config.json, an id or a list of them, holds an id."""
    return token_id in stated if isinstance(stated, list) else token_id == stated


def _with_dtype(config: Json, dtypes: set[torch.dtype]) -> Json:
    """A config.json with the weights' type, if they all have the same."""
    if len(dtypes) > 1:
        return config
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: str(dtypes.pop()).removeprefix("torch.")}


def _write_companions(run: NativeCheckpoint, folder: Path, config: Json) -> None:
    """Write the files that the run keeps; but of tokenizers, that with which it was trained."""
    kept = run.folder / HUGGINGFACE
    tokenizer = run.config.data.tokenizer
    others = True
    if is_checkpoint(kept):
        for path in kept.iterdir():
            shutil.copyfile(path, folder / path.name)
        others = tokenizer_file(kept).is_file() and _differ(tokenizer_file(tokenizer), tokenizer_file(kept))
    else:
        used = load_tokenizer(run.config.data)
        ends = [config["eos_token_id"], *sorted(used.other_end_ids)]
        ids = {"eos_token_id": ends if ends[1:] else ends[0], "pad_token_id": config["pad_token_id"]}
        write_json(folder / GENERATION_CONFIG, ids)
    if tokenizer and others:
        _write_tokenizer(tokenizer_file(tokenizer), folder)
    write_json(folder / CONFIG, config)


def _differ(one: Path, other: Path) -> bool:
    """Whether two tokenizers' files do; one that is gone is taken for the other."""
    return one.is_file() and tokenizer_fingerprint(str(one)) != tokenizer_fingerprint(str(other))


def _write_tokenizer(file: Path, folder: Path) -> None:
    """Replace the tokenizer in a folder: the file and, if it has one of the usual names, what belongs to it."""
    for name in (name for name in COMPANIONS if name not in (CONFIG, GENERATION_CONFIG)):
        (folder / name).unlink(missing_ok=True)
        if file.name in TOKENIZER_FILES and (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)
    if file.name not in TOKENIZER_FILES:
        shutil.copyfile(file, folder / ("tokenizer" + file.suffix))


def shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _fingerprint(tensors: Mapping[str, StoredTensor]) -> dict[str, object]:
    """Values by which the input files of an interrupted conversion are recognised."""
    paths = sorted({tensor.path for tensor in tensors.values()})
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def temporary_folder(output: Path) -> Path:
    """The folder where the output grows; a later call with the same output resumes there."""
    if output.exists():
        raise UserError(f"{output}: exists already; remove it or choose another --output")
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    return temporary


def publish(temporary: Path, output: Path) -> None:
    (temporary / JOURNAL).unlink()
    temporary.rename(output)
