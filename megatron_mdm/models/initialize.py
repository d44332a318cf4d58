"""Initial weights that do not depend on the layout: drawn whole from (seed, parameter name), then cut."""

import zlib

import torch

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.models.sharding import sharding_of
from megatron_mdm.parallel.heartbeat import beat


def initialize_weights(model: torch.nn.Module, config: ModelConfig, seed: int, tensor_rank: int, degree: int) -> None:
    """Megatron's scheme: N(0, σ²) matrices, σ / √(2 · layers) for projections into the residual stream; norms
    are 1, biases 0.

    With `initialization: sharded` a rank draws its shard alone: fast for large models, but another layout draws others.
    """
    for name, parameter in model.named_parameters():
        beat()
        with torch.no_grad():
            if name.endswith(("norm.weight", "layer_norm_weight")):
                parameter.fill_(1.0)
                continue
            if name.endswith(".bias"):
                parameter.zero_()
                continue
            sharding = sharding_of(name)
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = config.init_std / ((2 * config.num_layers) ** 0.5 if residual else 1.0)
            if config.initialization == "sharded":
                parameter.copy_(
                    _normal(parameter.shape, std, seed, f"{name}/{tensor_rank if sharding.dim >= 0 else 0}")
                )
                continue
            shape = sharding.full_shape(parameter.shape, degree)
            if sharding.is_vocabulary:
                full = torch.zeros(shape)  # rows of padding stay zero: their number depends on the layout
                source = "0.word_embeddings.weight" if config.tie_embeddings else name
                full[: config.vocab_size] = _normal((config.vocab_size, *shape[1:]), std, seed, source)
            else:
                full = _normal(shape, std, seed, name)
            parameter.copy_(sharding.shard(full, tensor_rank, degree))


def _normal(shape: tuple[int, ...], std: float, seed: int, name: str) -> torch.Tensor:
    key = zlib.crc32(name.encode())
    torch_seed = int(stream(seed, Purpose.INITIAL_WEIGHTS, index=key).integers(2**63))
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(torch_seed))
