"""What the model of a run's checkpoint computes with: its weights, or those that it stands beside with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_mdm.checkpoint.base import fingerprint, is_of_a_run
from megatron_mdm.checkpoint.chosen_adapters import read_adapter
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor
from megatron_mdm.checkpoint.manifest import MANIFEST
from megatron_mdm.checkpoint.merged import AdapterWeights, merged, without_adapters
from megatron_mdm.checkpoint.native import RUN_CONFIG, NativeCheckpoint
from megatron_mdm.checkpoint.tensors import TensorReader
from megatron_mdm.checkpoint.weights import adapters_in, base_tensors, check_same_architecture, family_in
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import ModelConfig

OWN = "own"
NONE = "none"
ADAPTERS = f"{OWN}: the run's; {NONE}: the weights that they stand beside, alone; or a folder of PEFT's or a run's"


class ChosenAdapter(NamedTuple):
    name: str  # own, none or a folder; empty where nothing was asked for and the run has none
    weights: AdapterWeights | None = None
    sha256: str = ""  # of what it depends on
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return Path(self.name).resolve().name if self.name not in ("", OWN, NONE) else self.name

    def identity(self) -> dict[str, str]:
        """JSON-able: what tells it from others, wherever it lies; empty where nothing was asked for and there is
        none."""
        named = {"adapter": self.label} if self.name else {}
        return {**named, "adapter (sha256)": self.sha256} if self.weights else named

    def lines(self) -> list[str]:
        """What to tell of it."""
        return [*([f"adapter: {self.name}"] if self.name else []), *self.notes]


def distinct_labels(adapters: Sequence[ChosenAdapter]) -> list[str]:
    """For files' names: a label for each, numbered where several have the same; of one alone, none."""
    if len(adapters) == 1:
        return [""]
    labels = list[str]()
    for label in (adapter.label for adapter in adapters):
        same = sum(other == label or other.startswith(f"{label}-") for other in labels)
        labels.append(f"{label}-{same + 1}" if label in labels else label)
    return labels


class RunWeights:
    """Whole tensors by name, of which nothing has been read yet."""

    def __init__(self, folder: Path, model: ModelConfig, checkpoint: Path, overrides: Sequence[str] = ()) -> None:
        """model: the section to read it for. overrides: of the run's configuration: where its adapters' base is.

        Raises UserError where that is gone, or holds other weights than the adapters were trained beside.
        """
        self.model = without_adapters(model)
        own = load_config(folder / RUN_CONFIG, overrides)
        self.has_adapters = own.model.lora.rank > 0
        if self.has_adapters:
            check_same_architecture(self.model, without_adapters(own.model), folder / RUN_CONFIG)
        elif overrides:
            raise UserError(f"'{overrides[0]}': the run in {folder} has no adapters; its weights are its own")
        else:
            own = own.model_copy(update={"model": self.model})
        self.run = NativeCheckpoint(folder, own, checkpoint, TensorReader.of(checkpoint, own.model), "")
        self.base: dict[str, LazyTensor] = base_tensors(self.run) if self.has_adapters else self.run.lazy_tensors()

    def adapter(self, wish: str = "") -> ChosenAdapter:
        """The adapter that a wish names; empty: the run's own, if it has one. Raises UserError naming what is damaged,
        or by what it does not fit."""
        if wish == NONE or (not wish and not self.has_adapters):
            return ChosenAdapter(wish)
        if wish in ("", OWN):
            if not self.has_adapters:
                raise UserError(f"--adapter {OWN}: the run in {self.run.folder} has no adapters")
            return ChosenAdapter(OWN, adapters_in(self.run), sha256(self.run.path / MANIFEST))
        found = read_adapter(Path(wish), self.model, family_in(self.run), self.base)
        beside = Path(self.run.config.model.init_from) if self.has_adapters else self.run.path
        notes = found.notes
        if found.base and found.base != (ours := fingerprint(beside)):
            if is_of_a_run(found.base) == is_of_a_run(ours):
                raise UserError(f"--adapter {wish}: was trained beside other weights than those of {beside}")
            kinds = "a run's checkpoint", "a Hugging Face checkpoint"
            kind = kinds[is_of_a_run(ours)]
            notes = (*notes, f"{wish}: was trained beside {kind}; that it held the weights of {beside} is not checked")
        return ChosenAdapter(wish, found.weights, found.sha256, notes)

    def tensors(self, adapter: ChosenAdapter) -> dict[str, LazyTensor]:
        """The parameters with an adapter merged into them."""
        return merged(self.base, adapter.weights, self.model) if adapter.weights else self.base
