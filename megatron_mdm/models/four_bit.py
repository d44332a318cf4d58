"""The layers' frozen matrices in 4 bits: `model.lora.base: nf4` (QLoRA, Dettmers et al. 2023), by bitsandbytes.

A block of 64 neighbours in a row of a matrix is kept as 64 indices into the sixteen numbers of NF4, and the greatest
magnitude among them in fp32: 4.5 bits a weight. Blocks lie within rows, and a shard begins and ends at a block's edge
(config/validate.py), so the tensor-parallel ranks hold slices of what one rank would. A matrix is dequantised, in the
type that the model computes in, for each product that it takes part in, and not kept: once in the forward pass, and
again in the backward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.config.validate import FOUR_BIT_BLOCK
from megatron_mdm.models.adapter_rows import LINEAR_MAPS
from megatron_mdm.parallel import platform


class FourBitLinear(nn.Module):
    """A column- or row-parallel linear map of megatron-core's, whose weight is frozen. It is filled as any other, and
    computes as any other, until it is quantised."""

    wrapped = "base"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = base
        self.shape = torch.Size()  # of the weight, once it has been quantised
        self.register_buffer("indices", None)
        self.register_buffer("scales", None)  # fp32 as int32: a module that is cast to another type keeps integers

    @torch.no_grad()
    def quantize(self) -> None:
        """Put 4 bits in place of the weight that the base holds. Raises UserError where bitsandbytes cannot."""
        weight = self.base.weight
        self.shape = weight.shape
        packed, state = bitsandbytes().quantize_4bit(weight.detach(), blocksize=FOUR_BIT_BLOCK, quant_type="nf4")
        self.indices = packed
        self.scales = state.absmax.view(torch.int32)
        del self.base.weight  # a parameter, which a plain tensor takes the place of while there is one

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.shape:
            return self.base(hidden)
        self.base.weight = weight = self._weight(hidden.dtype)
        try:
            with self._dequantized_again(weight):
                return self.base(hidden)
        finally:
            self.base.weight = None

    def _weight(self, dtype: torch.dtype) -> Tensor:
        library = bitsandbytes()
        scales = self.scales.view(torch.float32)
        state = library.QuantState(scales, shape=self.shape, dtype=dtype, blocksize=FOUR_BIT_BLOCK, quant_type="nf4")
        return library.dequantize_4bit(self.indices, state)

    def _dequantized_again(self, weight: Tensor) -> AbstractContextManager[None]:
        """Inside, autograd keeps in place of the weight what it is dequantised from in the backward pass. Of a frozen
        linear map megatron-core keeps nothing else."""
        pointer, dtype = weight.data_ptr(), weight.dtype

        def keep(tensor: Tensor) -> Tensor | None:
            is_the_weight = tensor.data_ptr() == pointer and tensor.shape == self.shape and tensor.is_contiguous()
            return None if is_the_weight else tensor

        def use(kept: Tensor | None) -> Tensor:
            return self._weight(dtype) if kept is None else kept

        return saved_tensors_hooks(keep, use)


def attach_four_bit(layer: nn.Module) -> None:
    """Put a FourBitLinear around each linear map of a transformer layer."""
    for path in LINEAR_MAPS:
        parent, _, name = path.rpartition(".")
        module = layer.get_submodule(parent)
        setattr(module, name, FourBitLinear(module.get_submodule(name)))


def quantize_frozen(layers: nn.Module, model: ModelConfig) -> None:
    """Quantise what `model.lora.base` says, in layers that have been filled. Raises UserError where bitsandbytes is
    missing or does not work on this rank's device."""
    if model.lora.rank and model.lora.base == "nf4":
        for module in layers.modules():
            if isinstance(module, FourBitLinear):
                module.quantize()


@cache
def bitsandbytes() -> Any:
    """bitsandbytes.functional, which takes seconds to import. Raises UserError where it is missing, or fails at a block
    on this rank's device."""
    try:
        from bitsandbytes import functional

        block = torch.linspace(-1, 1, FOUR_BIT_BLOCK, device=platform.device())
        packed, state = functional.quantize_4bit(block, blocksize=FOUR_BIT_BLOCK, quant_type="nf4")
        functional.dequantize_4bit(packed, state)
    except ImportError as error:
        raise UserError(
            "'model.lora.base' nf4 needs bitsandbytes, which cannot be imported here "
            f"({error}): pip install 'megatron-mdm[nf4]', or use model"
        ) from error
    except Exception as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"'model.lora.base' nf4: bitsandbytes does not work on {platform.device()} here ({text}); use model"
        ) from error
    return functional
