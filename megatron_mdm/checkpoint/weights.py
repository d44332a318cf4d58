"""A folder as a source of whole weights: a Hugging Face checkpoint, a run, a run with adapters merged into its base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_mdm.checkpoint.base import check_base
from megatron_mdm.checkpoint.huggingface import CONFIG, HuggingFaceCheckpoint, is_checkpoint
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor, with_grown_tables
from megatron_mdm.checkpoint.merged import AdapterWeights, merged, without_adapters
from megatron_mdm.checkpoint.native import HUGGINGFACE, RUN_CONFIG, NativeCheckpoint
from megatron_mdm.checkpoint.peft import is_adapter
from megatron_mdm.checkpoint.tensors import WEIGHT
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.adapter_rows import adapters_of
from megatron_mdm.models.families import family_of
from megatron_mdm.models.families.family import ARCHITECTURE, Family
from megatron_mdm.models.parameters import parameter_table

Source = HuggingFaceCheckpoint | NativeCheckpoint
Tensors = dict[str, LazyTensor]


def opened(folder: Path, ignore_fields: Sequence[str] = ()) -> Source:
    """A folder of whole weights. Raises UserError naming what is damaged, missing, or not supported."""
    check_no_adapter(folder)
    if is_checkpoint(folder):
        return HuggingFaceCheckpoint.open(folder, ignore_fields)
    return NativeCheckpoint.open(folder)


def check_no_adapter(folder: Path) -> None:
    """Raise UserError where a folder holds an adapter alone."""
    if is_adapter(folder) and not is_checkpoint(folder):
        raise UserError(
            f"{folder}: an adapter, without the model beside it; train it further by 'model.lora.init_from', or read "
            "it with a run (--run-dir RUN --adapter FOLDER)"
        )


def model_of(source: Source) -> ModelConfig:
    """The section of the model whose whole weights a source has."""
    return source.model if isinstance(source, HuggingFaceCheckpoint) else without_adapters(source.config.model)


def place_of(source: Source) -> Path:
    """The file that describes a source's model."""
    return source.folder / (CONFIG if isinstance(source, HuggingFaceCheckpoint) else RUN_CONFIG)


def family_in(source: Source) -> Family | None:
    """The family whose names the weights have, or had when they were imported; None: they are from scratch."""
    if isinstance(source, HuggingFaceCheckpoint):
        return source.family
    config = source.huggingface_config()
    return family_of(config, str(source.folder / HUGGINGFACE / CONFIG)) if config else None


def whole_tensors(source: Source) -> Tensors:
    """Parameters by name, as whole tensors, adapters merged. Raises UserError where the weights beside adapters are
    gone or others than they were trained with."""
    if isinstance(source, HuggingFaceCheckpoint) or not source.config.model.lora.rank:
        return source.lazy_tensors()
    return merged(base_tensors(source), adapters_in(source), without_adapters(source.config.model))


def base_tensors(run: NativeCheckpoint) -> Tensors:
    """The parameters of a run with adapters as they are without them."""
    check_base(run.folder, run.config)
    model = run.config.model
    own = {name: tensor for name, tensor in run.lazy_tensors().items() if name not in adapter_rows(model)}
    return {**fitting_tensors(model, opened(Path(model.init_from), model.ignore_fields)), **own}


def adapters_in(run: NativeCheckpoint, kind: str = WEIGHT) -> AdapterWeights:
    """Those that a run has trained, or their moments."""
    model = run.config.model
    rows = adapter_rows(model)
    return AdapterWeights(model.lora, {name: tensor for name, tensor in run.lazy_tensors(kind).items() if name in rows})


def adapter_rows(model: ModelConfig) -> frozenset[str]:
    """Names of the rows that model.lora adds to the table."""
    if not model.lora.rank:
        return frozenset()
    return frozenset(name for adapter in adapters_of(model) for name in (adapter.a, adapter.b))


def fitting_tensors(model: ModelConfig, source: Source) -> Tensors:
    """A source's whole weights for a model that starts with them: the vocabulary's tables may have grown. Raises
    UserError naming the key by which their architectures differ."""
    check_same_architecture(model, model_of(source), place_of(source))
    tensors = whole_tensors(source)
    check_places(model, tensors, source.folder)
    return with_grown_tables(tensors, model)


def check_same_architecture(model: ModelConfig, theirs: ModelConfig, where: Path) -> None:
    """Raise UserError where a run's model section does not describe the checkpoint. The table may grow."""
    for name in ARCHITECTURE:
        field = "kv_channels" if name == "head_dim" else name  # head_dim 0 may stand for the same width
        mine = getattr(model, field)
        other = getattr(theirs, field)
        fits = mine >= other if name == "vocab_size" else mine == other
        if not fits and name != "max_sequence_length":
            raise UserError(f"'model.{name}' is {mine}, but {other} by {where}; set 'model.{name}' to {other}")


def check_places(model: ModelConfig, names: Iterable[str], path: Path) -> None:
    """Raise UserError naming a tensor that the model has no place for: what its run's 'model.extensions' added."""
    for name in names:
        if name not in parameter_table(model):
            raise UserError(f"'model.init_from' {path}: holds '{name}', which the model lacks; see 'model.extensions'")
