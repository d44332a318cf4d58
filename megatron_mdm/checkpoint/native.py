"""A run's folder as a source of weights: its configuration, its newest intact checkpoint, its Hugging Face side."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mdm.checkpoint.choice import AUTO, choose, located
from megatron_mdm.checkpoint.huggingface import COMPANIONS, CONFIG, is_checkpoint, read_json
from megatron_mdm.checkpoint.lazy_tensors import LazyTensor
from megatron_mdm.checkpoint.tensors import WEIGHT, TensorReader
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_atomically
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.tokenizer_folder import tokenizer_file
from megatron_mdm.models.families.family import Json
from megatron_mdm.models.parameters import parameter_table

RUN_CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
HUGGINGFACE = "huggingface"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class NativeCheckpoint:
    folder: Path  # the run's
    config: RunConfig
    path: Path  # of the checkpoint
    reader: TensorReader
    reason: str  # why this one

    @classmethod
    def open(cls, folder: Path, wish: str = AUTO, overrides: Sequence[str] = ()) -> NativeCheckpoint:
        """A checkpoint of a run whose files match their checksums. folder: the run's, for its best where it keeps one,
        else its newest; or one of the checkpoints in it. overrides: of its configuration. Raises UserError where there
        is none."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        folder, named = located(folder)
        if not (folder / RUN_CONFIG).is_file():
            raise UserError(f"{folder}: neither a Hugging Face checkpoint ({CONFIG}) nor a run's folder ({RUN_CONFIG})")
        config = load_config(folder / RUN_CONFIG, overrides)
        choice = choose(folder, named if wish == AUTO else wish)
        return cls(folder, config, choice.path, TensorReader.of(choice.path, config.model), choice.reason)

    @property
    def weights_only(self) -> bool:
        """Whether the checkpoint was imported, not trained: its weights are in the types they came in."""
        return self.reader.kinds() == {WEIGHT}

    def lazy_tensors(self, kind: str = WEIGHT) -> dict[str, LazyTensor]:
        """Whole tensors by name, those that it holds: moments of what is trained, and nothing of what adapters stand
        beside (weights.whole_tensors has the merged weights of such a run)."""
        tensors = {}
        for name, row in parameter_table(self.config.model).items():
            if row.is_base or (kind != WEIGHT and not row.trained):
                continue
            tensor = self.reader.tensor(name, kind)
            tensors[name] = tensor
            if tuple(tensor.shape) != row.shape:
                raise UserError(f"{self.path}: '{name}' has shape {list(tensor.shape)}, not {list(row.shape)}")
        return tensors

    def huggingface_config(self) -> Json:
        """The config.json that the weights came with; {} where they did not."""
        path = self.folder / HUGGINGFACE / CONFIG
        return read_json(path) if path.is_file() else {}


def keep_tokenizer(path: str, run_folder: Path) -> str:
    """Copy a tokenizer, with the files beside it that it is read with, into the run's folder, so that the run does not
    depend on where it came from. Returns its path there; one that is inside already, and none, stay as they are."""
    if not path or Path(path).resolve().is_relative_to(run_folder.resolve()):
        return path
    file = tokenizer_file(path)
    kept = run_folder / TOKENIZER
    kept.mkdir(parents=True, exist_ok=True)
    for name in {file.name, *COMPANIONS}:
        if (file.parent / name).is_file():
            write_atomically(kept / name, (file.parent / name).read_bytes())
    return str(kept / file.name)


def keep_companions(source: Path, run_folder: Path) -> None:
    """Copy configuration and tokenizer files of a checkpoint (or of another run's) beside a run's own."""
    origin = source if is_checkpoint(source) else located(source)[0] / HUGGINGFACE
    for name in COMPANIONS:
        if (origin / name).is_file():
            (run_folder / HUGGINGFACE).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin / name, run_folder / HUGGINGFACE / name)
