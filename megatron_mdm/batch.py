"""What travels from the data to the model and back: clean samples, which token sees which, the model's inputs, weights,
statistics of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_mdm.config.errors import UserError

_SHORT = 64  # tokens: no segment of padding need be shorter than this
IdRange = tuple[int, int]  # (first, count) of consecutive token ids
PATTERNS: dict[str, type[AttentionPattern]] = {}  # every class of them by its name: what from_tensors reads


@dataclass(frozen=True)
class CleanBatch:
    """A micro-batch of clean samples, on the host."""

    tokens: Tensor  # [B, S] int64, right-padded
    eligible: Tensor  # [B, S] bool: target tokens, which may be masked
    delimiters: Tensor  # [B, S] bool: marks of an answer, which ISAD masks more often
    lengths: Tensor  # [B] int64, without padding
    positions: Tensor  # [B] int64: places in the global batch, 0 … n−1
    sample_ids: Tensor  # [B] int64: rows of the data set
    segments: Tensor | None = None  # [B, K] int64: tokens of a sample's parts that do not see each other, 0 behind

    @property
    def num_eligible(self) -> Tensor:
        """P [B] int64."""
        return self.eligible.sum(1)

    def pattern(self, views: int = 1, causal: bool = False) -> AttentionPattern:
        """The pattern of the V·B rows of V views: a token sees its sample or, where that has segments, its segment."""
        if self.segments is not None:
            return Segments(self.segments.repeat(views, 1), causal=causal)
        return padded_rows(self.lengths.repeat(views), self.tokens.shape[1], causal)


@dataclass(frozen=True, eq=False)
class AttentionPattern:
    """Which tokens of a micro-batch see which: R rows of S tokens, whose places in a row are 0 … S−1.

    A subclass outside the package gives mask(), and positions() where rotary positions are not the places; attention
    runs it by its mask. A kernel of its own is an entry for its `kind` in models.attention.EXECUTORS.
    """

    causal: bool = field(default=False, kw_only=True)  # a token sees itself and those before it only

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        PATTERNS[cls.__name__] = cls

    @property
    def kind(self) -> str:
        """What models.attention.EXECUTORS has kernels for."""
        return "dense"

    def mask(self, length: int) -> Tensor | None:
        """bool, broadcastable to [R, 1, S, S] with S the length: True where a query (the row of the matrix) sees a key.
        None: everything is seen."""
        raise NotImplementedError

    def mask_of(self, queries: Tensor, length: int) -> Tensor:
        """bool, broadcastable to [R, 1, S, T]: what the queries at some places [R, S] see of rows of T = length."""
        mask = self.mask(length)
        if mask is None:
            return torch.ones(1, 1, 1, length, dtype=torch.bool, device=queries.device)
        of_rows = mask.expand(len(queries), 1, length, length)[:, 0]
        return of_rows.gather(1, queries[..., None].expand(-1, -1, length))[:, None]

    def positions(self, length: int) -> Tensor | None:
        """[R or 1, S] int64: the rotary positions. None: 0 … S−1, the places."""
        return None

    def row_lengths(self, num_rows: int, width: int) -> Tensor:
        """[R] int64: tokens of each row, without the padding on its right."""
        return torch.full((num_rows,), width)

    def packed(self, num_rows: int, width: int) -> AttentionPattern:
        """The same rows, without their padding, one after another in a single row. Raises UserError where a pattern
        cannot be packed."""
        raise UserError(
            f"attention pattern {type(self).__name__} cannot be packed; use 'batch.mode' padded or bucketed"
        )

    def padded(self, num_rows: int, width: int, extra: int) -> AttentionPattern:
        """The same rows with so much more padding on their right."""
        return _Widened(self, width)

    def to(self, device: torch.device, non_blocking: bool = True) -> AttentionPattern:
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> AttentionPattern:
        """The same of other tensors: function's of each that it was made of."""
        return replace(self, **{name: _mapped(value, function) for name, value in self.values().items()})

    def values(self) -> dict[str, Any]:
        """What it was made of, by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True, eq=False)
class Full(AttentionPattern):
    """No row is padded: the fastest kernels."""

    @property
    def kind(self) -> str:
        return "causal" if self.causal else "full"

    def mask(self, length: int) -> Tensor | None:
        return torch.ones(1, 1, length, length, dtype=torch.bool).tril() if self.causal else None

    def mask_of(self, queries: Tensor, length: int) -> Tensor:
        if not self.causal:
            return super().mask_of(queries, length)
        return (torch.arange(length, device=queries.device) <= queries[..., None])[:, None]

    def packed(self, num_rows: int, width: int) -> AttentionPattern:
        return Segments(self.row_lengths(num_rows, width)[None], causal=self.causal)

    def padded(self, num_rows: int, width: int, extra: int) -> AttentionPattern:
        return Padded(self.row_lengths(num_rows, width), causal=self.causal)


@dataclass(frozen=True, eq=False)
class Padded(AttentionPattern):
    """Rows of several lengths: what is on their right is not seen."""

    lengths: Tensor  # [R] int64

    @property
    def kind(self) -> str:
        """Causally, no token of a sample would look at padding on its right anyway: kernels need no mask."""
        return "causal" if self.causal else "padded"

    def mask(self, length: int) -> Tensor:
        """[R, 1, 1, S], causally [R, 1, S, S]."""
        return self.mask_of(torch.arange(length, device=self.lengths.device)[None], length)

    def mask_of(self, queries: Tensor, length: int) -> Tensor:
        places = torch.arange(length, device=self.lengths.device)
        seen = places < self.lengths[:, None, None]  # [R, 1, T]
        if self.causal:
            seen = seen & (places <= queries[..., None])  # [R, S, T]
        return seen[:, None]

    def row_lengths(self, num_rows: int, width: int) -> Tensor:
        return self.lengths

    def packed(self, num_rows: int, width: int) -> AttentionPattern:
        return Segments(self.lengths[None], causal=self.causal).packed(1, width)

    def padded(self, num_rows: int, width: int, extra: int) -> AttentionPattern:
        return self


@dataclass(frozen=True, eq=False)
class Segments(AttentionPattern):
    """Each row is made of segments, one after another, which see themselves only; positions start from 0 in each."""

    lengths: Tensor  # [R, K] int64: of a row's segments, 0 behind its last; what they do not fill is padding

    @property
    def kind(self) -> str:
        """Kernels run the segments of a single row one by one."""
        return "segments" if len(self.lengths) == 1 else "dense"

    def mask(self, length: int) -> Tensor:
        number = self._numbers(length)
        seen = (number[:, :, None] == number[:, None, :])[:, None]
        return seen.tril() if self.causal else seen

    def positions(self, length: int) -> Tensor:
        begins = pad(self.lengths.cumsum(1), (1, 0)).gather(1, self._numbers(length))
        return torch.arange(length, device=self.lengths.device) - begins

    def _numbers(self, length: int) -> Tensor:
        """[R, S] int64: which segment each token is of; the padding's is K."""
        places = torch.arange(length, device=self.lengths.device).expand(len(self.lengths), -1)
        return torch.searchsorted(self.lengths.cumsum(1), places.contiguous(), right=True)

    def row_lengths(self, num_rows: int, width: int) -> Tensor:
        return self.lengths.sum(1)

    def packed(self, num_rows: int, width: int) -> AttentionPattern:
        return replace(self, lengths=self.lengths[self.lengths > 0][None])

    def padded(self, num_rows: int, width: int, extra: int) -> AttentionPattern:
        """The padding has segments of its own, hardly longer than others: attention's cost grows with the square."""
        rest = width + extra - self.lengths.sum(1, keepdim=True)
        size = max(int(self.lengths.max()), _SHORT)
        begins = torch.arange(0, int(rest.max()), size)
        return replace(self, lengths=torch.cat([self.lengths, (rest - begins).clamp(0, size)], 1))


@dataclass(frozen=True, eq=False)
class _Widened(AttentionPattern):
    """Another pattern's rows with padding on their right, which their tokens do not see."""

    inner: AttentionPattern
    width: int

    def mask(self, length: int) -> Tensor:
        extra = length - self.width
        mask = self.inner.mask(self.width)
        if mask is None:
            mask = torch.ones(1, 1, 1, self.width, dtype=torch.bool)
        mask = pad(mask.expand(*mask.shape[:3], self.width), (0, extra))
        return mask if mask.shape[2] == 1 else pad(mask, (0, 0, 0, extra), value=True)

    def positions(self, length: int) -> Tensor | None:
        positions = self.inner.positions(self.width)
        return None if positions is None else pad(positions, (0, length - self.width))

    def row_lengths(self, num_rows: int, width: int) -> Tensor:
        return self.inner.row_lengths(num_rows, self.width)


def padded_rows(lengths: Tensor, width: int, causal: bool = False) -> AttentionPattern:
    """The pattern of rows of lengths [R] in a micro-batch of this width: Full where none is padded, else Padded."""
    if bool((lengths == width).all()):
        return Full(causal=causal)
    return Padded(lengths, causal=causal)


class LossWeights(NamedTuple):
    token: Tensor  # [V·B, S] float32: a row's loss is Σ_i token_i · CE_i
    row: Tensor  # [V·B] float32: the global batch's loss is Σ over all its rows of row · (row's loss)


class SegmentBounds(NamedTuple):
    """Where the segments of a single row lie, as kernels want to be told. Made once for a micro-batch, on the host."""

    starts: Tensor  # [K + 1] int32: each segment's first token, then the end of the last
    sizes: tuple[int, ...]  # of each in tokens, on the host: no kernel waits for the device to know them

    @classmethod
    def of(cls, lengths: Tensor) -> SegmentBounds:
        """lengths [K] int64."""
        return cls(pad(lengths.cumsum(0), (1, 0)).to(torch.int32), tuple(lengths.tolist()))

    @property
    def longest(self) -> int:
        return max(self.sizes)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> SegmentBounds:
        return self._replace(starts=function(self.starts))


class ModelInputs(NamedTuple):
    """A micro-batch for the model. R rows (samples × views) of length S.

    Packed (engine/inputs.py), its rows stand one after another in a single row of T tokens without padding; what is
    scored stays by row. Places and segments are made on the host (engine/inputs.py), where they cost no waiting for a
    device; inputs without them are completed where they are used.
    """

    tokens: Tensor  # [R, S] int64; packed: [1, T]
    pattern: AttentionPattern  # which token sees which
    selected: Tensor  # [R, S] bool: the positions that reach the vocabulary (masked ones, in training)
    labels: Tensor  # [R, S] int64: clean token ids
    token_weight: Tensor  # [R, S] float32: a row's loss is Σ token_weight · CE over its selected positions
    row_weight: Tensor  # [R] float32: the total is Σ row_weight · (row's loss)
    positions: Tensor | None = None  # [R or 1, S] int64 (packed: T): rotary positions, where they are not the pattern's
    row_starts: Tensor | None = None  # [R] int64, of packed inputs only: where the rows begin among the T tokens
    places: Tensor | None = None  # [N] int64: the selected positions' places along [S, R], ascending
    segments: SegmentBounds | None = None  # of a single row of segments
    dropout_keys: Tensor | None = None  # [R, S] int64 (packed: [1, T]), in training passes with dropout only

    @property
    def is_packed(self) -> bool:
        return self.row_starts is not None

    def selected_places(self) -> Tensor:
        """places, where they are missing found anew (on a device, that waits for it)."""
        if self.places is not None:
            return self.places
        return self.selected.t().reshape(-1).nonzero().squeeze(1)

    def to(self, device: torch.device) -> ModelInputs:
        """Asynchronously, where a tensor's memory is pinned."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> ModelInputs:
        """In memory that a CUDA device copies from by itself."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> ModelInputs:
        """The same of other tensors: function's of each."""
        return ModelInputs(*(_mapped(value, function) for value in self))

    def as_tensors(self) -> dict[str, Tensor]:
        """The inputs as tensors for a file: entries by name, those of the pattern as pattern/<class>/<name>."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        of_pattern = f"pattern/{type(self.pattern).__name__}/"
        return tensors | {of_pattern + name: torch.as_tensor(value) for name, value in self.pattern.values().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ModelInputs:
        """What as_tensors gave. The pattern's class must have been imported."""
        values: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name in cls._fields}
        of_pattern: dict[str, Any] = {}
        for path in tensors.keys() - values.keys():
            _, kind, name = path.split("/")
            of_pattern[name] = tensors[path] if tensors[path].dim() else tensors[path].item()
        return cls(**values, pattern=PATTERNS[kind](**of_pattern))


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """function's of a tensor, or of the tensors that a value is made of; what has none stays as it is."""
    if isinstance(value, Tensor):
        return function(value)
    return value.mapped(function) if isinstance(value, AttentionPattern | SegmentBounds) else value


class RowStatistics(NamedTuple):
    """What a forward pass says of each row: [R] each, float32, detached."""

    loss: Tensor  # Σ token_weight · CE
    square: Tensor  # Σ (token_weight · CE)²
    gradient_square: Tensor  # Σ ‖token_weight · ∂CE/∂h‖², h what the vocabulary projection reads; 0 if not computed
