"""A run's inputs, read and checked on every rank before anything is trained."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import megatron_mdm
from megatron_mdm.checkpoint.initial_tokens import with_initial_tokens
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.config.load import flatten
from megatron_mdm.config.schema import CheckpointConfig, ObjectiveConfig, PrecisionConfig, RunConfig
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.data.splits import Dataset, read_splits
from megatron_mdm.data.tokenizer import Tokenizer, load_tokenizer, resolve_vocabulary
from megatron_mdm.data.tokenizer_folder import tokenizer_fingerprint
from megatron_mdm.engine.deepspeed_section import check_deepspeed_section
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.models.loss_kernels import resolve_loss_kernel
from megatron_mdm.models.spec import resolve_kernels
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel import platform
from megatron_mdm.training.image_codes import as_the_rows_say

_LIBRARIES = ("torch", "deepspeed", "megatron-core", "transformers", "numpy", "safetensors")


@dataclass(frozen=True)
class RunData:
    tokenizer: Tokenizer
    train: Dataset
    validation: Dataset | None
    notes: tuple[str, ...] = ()  # on special tokens and template, a line each

    @property
    def special_ids(self) -> SpecialIds:
        return SpecialIds.of(self.tokenizer)


def resolve(config: RunConfig) -> tuple[RunConfig, RunData]:
    """Read tokenizer and data; return them with the configuration in which every 'auto' has its value."""
    check_deepspeed_section(config)
    objective = objective_of(config)
    config, notes = with_initial_tokens(config)
    tokenizer = load_tokenizer(config.data)
    model = resolve_vocabulary(config.model, tokenizer)
    dated = config.data.model_copy(update={"template_date": tokenizer.template.date or config.data.template_date})
    config = config.model_copy(update={"data": dated})
    kernels = {"kernels": resolve_kernels(model), "loss_kernel": resolve_loss_kernel(model)}
    model = model.model_copy(update={**kernels, "attention": objective.attention})
    resolved = {
        "model": model,
        "objective": ObjectiveConfig(**objective.options.model_dump()),
        "precision": resolve_precision(config),
        "checkpoint": resolve_retention(config),
    }
    config = config.model_copy(update=resolved)
    train, validation = read_splits(config, tokenizer)
    objective.check_data(train)
    image, told = as_the_rows_say(config.image, [train, *([validation] if validation else [])])
    config = config.model_copy(update={"image": image})
    return config, RunData(tokenizer, train, validation, (*notes, *told))


def resolve_retention(config: RunConfig) -> CheckpointConfig:
    """'auto': the best checkpoint is kept where early stopping goes past it."""
    if config.checkpoint.keep_best != "auto":
        return config.checkpoint
    return config.checkpoint.model_copy(update={"keep_best": config.evaluation.patience > 0})


def resolve_precision(config: RunConfig) -> PrecisionConfig:
    """'auto' becomes bf16 where the hardware multiplies it natively, fp32 elsewhere."""
    if config.precision.dtype == "fp16" and not platform.is_cuda():
        raise UserError("'precision.dtype' fp16 needs a CUDA device (DeepSpeed has no fp16 on CPU); use bf16 or fp32")
    if config.precision.dtype != "auto":
        return config.precision
    dtype = "bf16" if platform.multiplies_bf16() else "fp32"
    return config.precision.model_copy(update={"dtype": dtype})


def agreement(config: RunConfig, data: RunData) -> dict[str, object]:
    """What every rank must have alike, by name: configuration, data, code, libraries and the model of its device."""
    values: dict[str, object] = dict(flatten(config.model_dump(mode="json")))
    values["training data (sha256)"] = data.train.fingerprint
    values["validation data (sha256)"] = data.validation.fingerprint if data.validation else ""
    values["tokenizer (sha256)"] = tokenizer_contents(config, data)
    return {**values, **versions()}


def tokenizer_contents(config: RunConfig, data: RunData) -> str:
    """What tells the tokenizer and its chat template, if that is used, wherever they lie."""
    return tokenizer_fingerprint(config.data.tokenizer) + data.tokenizer.template.fingerprint


def versions() -> dict[str, str]:
    """Versions of the code, the libraries and the device."""
    return {
        "version of megatron-mdm": megatron_mdm.__version__,
        "code of megatron-mdm (sha256)": code_fingerprint(package_folder()),
        "version of Python": ".".join(map(str, sys.version_info[:3])),
        **{f"version of {name}": version(name) for name in _LIBRARIES},
        "device": platform.device_name(),
    }


def package_folder() -> Path:
    return Path(megatron_mdm.__file__).parent


def code_fingerprint(package: Path) -> str:
    """A hash of a package's sources, so that changes without a commit count."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {sha256(path)}\n".encode())
    return digest.hexdigest()


def total_steps(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps of the run; epochs are rounded up to whole global batches, or to whole rollouts."""
    if config.schedule.steps:
        return config.schedule.steps
    epochs = Fraction(str(config.schedule.epochs))  # exactly what was written: 0.1 × 30 samples are 3
    if config.rl.is_used:
        rl = config.rl
        num_steps = rl.num_completions // config.batch.global_size * rl.num_iterations
        return math.ceil(epochs * num_samples / rl.prompts_per_rollout) * num_steps
    return math.ceil(epochs * num_samples / config.batch.global_size)


def describe_data(data: RunData, config: RunConfig) -> str:
    """One line: what was read and what was left out; and lines on template and special tokens."""
    lengths = data.train.lengths()
    sets = [data.train, *([data.validation] if data.validation else [])]
    left_out = sum(part.num_too_long for part in sets)
    bad = sum(part.num_bad for part in sets)
    validation = f", {len(data.validation):,} for validation" if data.validation else ""
    dropped = f"; {left_out:,} longer than {config.data.max_length} tokens left out" if left_out else ""
    if config.data.too_long == "truncate" and left_out:
        dropped = f"; {left_out:,} cut to {config.data.max_length} tokens"
    first = next((place for part in sets for place in part.first_bad), "")
    skipped = f"; {bad:,} bad ones skipped{f', the first: {first}' if first else ''}" if bad else ""
    split = _num_split(data.train)
    divided = f"; {split:,} conversations gave several samples: the chat template rewrites earlier turns" * bool(split)
    line = (
        f"data: {len(data.train):,} samples{validation}, {lengths.mean():.1f} tokens on average "
        f"(longest {lengths.max()}), {data.train.num_eligible().mean():.1f} eligible{dropped}{skipped}{divided}"
    )
    return "\n".join([line, *(f"warning: {told}" for told in data.tokenizer.template.warnings), *data.notes])


def _num_split(data: Dataset) -> int:
    """The number of records that gave more samples than one."""
    counts = Counter(data.records) if isinstance(data, SftDataset) else {}
    return sum(count > 1 for count in counts.values())
