"""Rules that span sections, checked before anything is loaded. Those of an objective are its own (objectives/)."""

from __future__ import annotations

from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.rl_rules import check_rl
from megatron_mdm.config.schema import ModelConfig, RunConfig

# DeepSpeed keys that follow from other sections: setting them raw would let the two disagree.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "gradient_clipping": "optimizer.gradient_clipping",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_param.device": "parallel.offload",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "data_types.grad_accum_dtype": "precision.gradients",
    "pipeline": "parallel",
    "tensor_parallel": "parallel",
    "sequence_parallel_size": "parallel",
    "tensorboard": "logging",
}

FOUR_BIT_BLOCK = 64  # neighbours in a row of a matrix that share a scale in 4 bits: bitsandbytes' default
FP8_MULTIPLE = 16  # of every dimension of a matrix product in FP8, the number of tokens included


def validate(config: RunConfig, world_size: int) -> None:
    """Check a configuration against itself and the number of ranks. Raises UserError with the remedy."""
    _check_parallel(config)
    validate_layout(config, world_size)
    _check_batch(config, world_size)
    _check_compile(config)
    _check_fp8(config)
    _check_data(config)
    _check_preview(config)
    check_rl(config)
    for key, section in OWNED_DEEPSPEED_KEYS.items():
        value: Any = config.deepspeed
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            raise UserError(f"'deepspeed.{key}' is set by the section '{section}'; remove it from 'deepspeed'")


def validate_layout(config: RunConfig, world_size: int) -> None:
    """The part of it that concerns forward passes, too: how the model is split over the ranks."""
    model = config.model
    parallel = config.parallel
    if parallel.pipeline > model.num_layers:
        raise UserError(f"'parallel.pipeline' {parallel.pipeline} exceeds the {model.num_layers} 'model.num_layers'")
    if world_size % (parallel.tensor * parallel.pipeline):
        raise UserError(
            f"'parallel.tensor' × 'parallel.pipeline' = {parallel.tensor * parallel.pipeline} does not divide the "
            f"{world_size} ranks that were started"
        )
    _check_model(config)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Data-parallel ranks: what tensor and pipeline parallelism leave of the world."""
    return world_size // (config.parallel.tensor * config.parallel.pipeline)


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches per optimizer step on each data-parallel rank; with a token budget, at most (they vary by step)."""
    samples = -(-config.batch.global_size // data_parallel_size(config, world_size))
    if config.batch.micro_tokens:
        per_batch = max(1, config.batch.micro_tokens // (config.rows_per_sample * config.data.max_length))
        return -(-samples // per_batch)
    return samples // config.batch.micro_size


def _check_parallel(config: RunConfig) -> None:
    parallel = config.parallel
    if parallel.pipeline > 1 and parallel.zero > 1:
        raise UserError(
            f"'parallel.zero' {parallel.zero} cannot be combined with 'parallel.pipeline' {parallel.pipeline}: a "
            "pipeline keeps gradients until its last micro-batch, so they cannot be partitioned; use ZeRO 0 or 1"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("'parallel.sequence' splits over the tensor-parallel ranks; it needs 'parallel.tensor' > 1")
    if parallel.offload != "none" and parallel.zero == 0:
        raise UserError("'parallel.offload' moves ZeRO's states to the host; it needs 'parallel.zero' of 1 or more")
    if parallel.offload == "all" and parallel.zero != 3:
        raise UserError("'parallel.offload' all moves parameters to the host; it needs 'parallel.zero' 3")
    dtype = config.precision.dtype
    in_two_types = config.precision.gradients == "fp32" and dtype != "fp32"
    is_tied_over_stages = parallel.pipeline > 1 and config.model.tie_embeddings
    if in_two_types and is_tied_over_stages and (dtype == "fp16" or parallel.offload != "none"):
        what = "'parallel.offload'" if parallel.offload != "none" else "'precision.dtype' fp16"
        raise UserError(
            f"'precision.gradients' fp32 cannot be combined with {what}, 'parallel.pipeline' and "
            "'model.tie_embeddings': DeepSpeed's optimizer for it hides the table's gradients from the sum over the "
            "first and the last stage; use model"
        )


def _check_model(config: RunConfig) -> None:
    model = config.model
    tensor = config.parallel.tensor
    _check_lora(model)
    _check_four_bit(config)
    if not model.head_dim and model.hidden_size % model.num_heads:
        raise UserError(
            f"'model.hidden_size' {model.hidden_size} is not a multiple of 'model.num_heads' {model.num_heads}; change "
            "one of them or set 'model.head_dim'"
        )
    if model.kv_channels % 2:
        raise UserError(
            f"a head's width ('model.head_dim', or 'model.hidden_size' / 'model.num_heads') is {model.kv_channels}; it "
            "must be even for rotary positions"
        )
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"'model.num_heads' {model.num_heads} is not a multiple of 'model.num_kv_heads' {model.num_kv_heads}"
        )
    for name in ("num_heads", "num_kv_heads", "ffn_hidden_size"):
        if getattr(model, name) % tensor:
            raise UserError(f"'model.{name}' {getattr(model, name)} is not a multiple of 'parallel.tensor' {tensor}")


def _check_lora(model: ModelConfig) -> None:
    if not model.lora.rank:
        return
    if not model.init_from:
        raise UserError("'model.lora' trains beside frozen weights: name them by 'model.init_from'")
    if model.kernels == "transformer_engine":
        raise UserError("'model.lora' needs 'model.kernels' torch: Transformer Engine fuses norms into the linear maps")
    if model.lora.dropout and "head" in model.lora.targets:
        raise UserError(
            "'model.lora.dropout' cannot be applied to the head, whose adapter is added to the matrix itself; leave "
            "head out of 'model.lora.targets', or set dropout to 0"
        )
    if model.lora.dropout and model.compile:
        raise UserError(
            "'model.lora.dropout' cannot be combined with 'model.compile': its masks need integers that wrap, which "
            "compiled code does not promise; set one of them to 0 or false"
        )


def _check_four_bit(config: RunConfig) -> None:
    model = config.model
    if not model.lora.rank or model.lora.base != "nf4":
        return
    if config.parallel.zero == 3:
        raise UserError(
            "'model.lora.base' nf4 cannot be combined with 'parallel.zero' 3, which partitions weights in the type that"
            " the model computes in; use ZeRO 0 to 2, or model"
        )
    if model.compile:
        raise UserError(
            "'model.lora.base' nf4 cannot be combined with 'model.compile'; use model, or set compile to false"
        )
    tensor = config.parallel.tensor
    sizes = {
        "'model.hidden_size'": (model.hidden_size, 1),
        "'model.num_heads' × the width of a head": (model.num_heads * model.kv_channels, tensor),
        "'model.ffn_hidden_size'": (model.ffn_hidden_size, tensor),
    }
    for name, (size, degree) in sizes.items():
        if size % (FOUR_BIT_BLOCK * degree):
            split = f" × 'parallel.tensor' {degree}" * (degree > 1)
            raise UserError(
                f"'model.lora.base' nf4 needs rows of whole blocks: {name} {size} is not a multiple of "
                f"{FOUR_BIT_BLOCK}{split}; use model, or another degree"
            )


def _check_batch(config: RunConfig, world_size: int) -> None:
    batch = config.batch
    ranks = data_parallel_size(config, world_size)
    longest = config.rows_per_sample * config.data.max_length
    if batch.micro_tokens and batch.mode == "padded":
        raise UserError("'batch.micro_tokens' needs 'batch.mode' bucketed or packed")
    if 0 < batch.micro_tokens < longest:
        raise UserError(
            f"'batch.micro_tokens' {batch.micro_tokens} cannot hold one sample: {config.rows_per_sample} "
            f"rows a sample × {config.data.max_length} 'data.max_length' = {longest} tokens; raise it"
        )
    if not batch.micro_tokens and batch.global_size % (batch.micro_size * ranks):
        raise UserError(
            f"'batch.global_size' {batch.global_size} is not a multiple of 'batch.micro_size' {batch.micro_size} × "
            f"{ranks} data-parallel ranks = {batch.micro_size * ranks}; change one of them"
        )


def _check_compile(config: RunConfig) -> None:
    if not config.model.compile:
        return
    if config.batch.mode != "packed" or not config.batch.micro_tokens:
        raise UserError(
            "'model.compile' compiles for one length: it needs 'batch.mode' packed and 'batch.micro_tokens', to which "
            "micro-batches are padded"
        )
    if config.parallel.zero == 3:
        raise UserError(
            "'model.compile' cannot be combined with 'parallel.zero' 3, whose gathers cut every layer in pieces; use "
            "ZeRO 0, 1 or 2"
        )
    if config.model.kernels == "transformer_engine":
        raise UserError("'model.compile' is for torch's kernels; set 'model.kernels' to torch, or leave it out")


def _check_fp8(config: RunConfig) -> None:
    model = config.model
    if not model.fp8:
        return
    if model.kernels != "transformer_engine":
        raise UserError("'model.fp8' needs Transformer Engine: set 'model.kernels' to transformer_engine")
    if config.precision.dtype != "bf16":
        raise UserError(f"'model.fp8' needs 'precision.dtype' bf16, not {config.precision.dtype}")
    if config.parallel.zero == 3:
        raise UserError(
            "'model.fp8' cannot be combined with 'parallel.zero' 3: FP8 copies of all weights stay on every rank; use "
            "ZeRO 0, 1 or 2"
        )
    tensor = config.parallel.tensor
    dimensions = {
        "'model.hidden_size'": model.hidden_size,
        "'model.ffn_hidden_size' / 'parallel.tensor'": model.ffn_hidden_size // tensor,
        "the width of all heads / 'parallel.tensor'": model.num_heads * model.kv_channels // tensor,
        "the width of queries, keys and values / 'parallel.tensor'": (
            (model.num_heads + 2 * model.num_kv_heads) * model.kv_channels // tensor
        ),
    }
    for name, size in dimensions.items():
        if size % FP8_MULTIPLE:
            raise UserError(f"'model.fp8' needs matrices of multiples of {FP8_MULTIPLE}; {name} is {size}")


def _check_data(config: RunConfig) -> None:
    data = config.data
    model = config.model
    if data.eos_padding and data.format != "sft":
        raise UserError(f"'data.eos_padding' is for 'data.format' sft: {data.format} has no answers to be padded")
    if data.max_length > model.max_sequence_length:
        raise UserError(
            f"'data.max_length' {data.max_length} exceeds 'model.max_sequence_length' {model.max_sequence_length}"
        )
    if not data.tokenizer:
        if model.vocab_size == "tokenizer" and not model.init_from:
            raise UserError("'data.tokenizer' is empty, so 'model.vocab_size' must be a number")
        for name in ("mask_token", "pad_token", "eos_token"):
            open_yet = model.init_from and name not in data.model_fields_set  # the checkpoint's files may say
            if isinstance(getattr(data, name), str) and not open_yet:
                raise UserError(f"'data.tokenizer' is empty, so 'data.{name}' must be a token id")
    if config.evaluation.every and not data.validation and not data.validation_fraction:
        raise UserError("'evaluation.every' is set, but neither 'data.validation' nor 'data.validation_fraction' is")
    is_validated = config.evaluation.every or (config.rl.is_used and config.rl.evaluate_every)
    if config.evaluation.patience and not is_validated:
        raise UserError("'evaluation.patience' needs 'evaluation.every'")
    if config.checkpoint.keep_best is True and not is_validated:
        raise UserError("'checkpoint.keep_best' judges by validation loss; set 'evaluation.every'")
    if data.validation and data.validation_fraction:
        raise UserError("set either 'data.validation' or 'data.validation_fraction', not both")


def _check_preview(config: RunConfig) -> None:
    if not config.image.preview:
        return
    for name, value in (("evaluation.every", config.evaluation.every), ("image.tokenizer", config.image.tokenizer)):
        if not value:
            raise UserError(f"'image.preview' draws pictures at validations: set '{name}', too")
