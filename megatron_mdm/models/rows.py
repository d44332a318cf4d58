"""One row of the table of parameters (parameters.py): what there is to know of a parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_mdm.models.sharding import Shape, Split

# Names are megatron-core's.
EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Initial:
    """Initial values: one of initialize.LAWS, and the standard deviation where the law has one."""

    law: str
    std: float = 0.0


ONES = Initial("ones")
ZEROS = Initial("zeros")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One row of the table."""

    name: str  # in checkpoints, whatever the layout, the kernels and the modules around it
    shape: Shape  # whole: of all ranks, without padding
    layers: tuple[int, ...]  # that hold it, 0 being the embedding; tied embeddings are held by the first and the last
    initial: Initial
    split: Mapping[str, Split] = field(default_factory=dict)  # axis of the layout → how its ranks divide the tensor
    vocab_divisor: int = 0  # a vocabulary table's rows are padded to a multiple of this × degree; 0: it is none
    # Split or not, each tensor-parallel rank's gradient is a part of the sum: never, with sequence parallelism (it sees
    # some positions), or always (it sees some heads).
    gradient_in_parts: str = "never"
    decay: bool = True
    trained: bool = True  # else it is frozen: no gradient, no optimizer state
    is_base: bool = False  # frozen, and in no checkpoint of the run: a resumed run reads it from model.init_from again
    is_four_bit: bool = False  # frozen, and kept in 4 bits (four_bit.py)
    is_buffer: bool = False  # a module's buffer, which is kept with the weights and never trained
    seed_name: str = ""  # initial values are drawn by this name; empty: by `name`

    @property
    def is_vocabulary(self) -> bool:
        return self.vocab_divisor > 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def drawn_by(self) -> str:
        return self.seed_name or self.name

    def padded_shape(self, degree: int) -> Shape:
        """The shape of the whole tensor at this tensor-parallel degree, padding included."""
        if not self.is_vocabulary:
            return self.shape
        return (padded_rows(self.shape[0], self.vocab_divisor, degree), *self.shape[1:])

    def local_shape(self, degree: int) -> Shape:
        """The shape of the shard that one tensor-parallel rank holds."""
        split = self.split.get("tensor")
        shape = self.padded_shape(degree)
        return split.local_shape(shape, degree) if split else shape


def padded_rows(rows: int, divisor: int, degree: int) -> int:
    multiple = divisor * degree
    return (rows + multiple - 1) // multiple * multiple


def layer_prefix(layer: int) -> str:
    """The prefix of the names of a transformer layer's parameters; layer counts from 0."""
    return f"decoder.layers.{layer}."
