"""Every family against transformers' own implementation, on layouts, and through import and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import ParallelConfig
from megatron_mdm.models.families import FAMILIES
from tests.checkpoint.huggingface_models import MASK, REFERENCES, VOCAB, reference_logits, write_checkpoint
from tests.ranks import run_program_ranks, run_ranks
from tests.small import small_config

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 11))
LAYOUTS = {"tp1": {}, "tp2": {"tensor": 2}, "tp2_sp": {"tensor": 2, "sequence": True}, "pp2": {"pipeline": 2}}


def our_logits(folders: dict[str, str], scratch: str, parallel: dict[str, Any]) -> dict[Any, Any]:
    """On a rank: for each checkpoint, logits of all positions and rows' cross-entropies of a training engine."""
    from megatron_mdm.batch import Full
    from megatron_mdm.checkpoint.huggingface import HuggingFaceCheckpoint
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.engine.inputs import logits_inputs
    from megatron_mdm.parallel.groups import initialize

    context = initialize(ParallelConfig(**parallel))
    tokens = torch.from_numpy(TOKENS)
    inputs = logits_inputs(tokens, Full(), torch.ones(3, 11, dtype=torch.bool))
    scored = inputs._replace(labels=tokens, token_weight=torch.ones(3, 11), row_weight=torch.ones(3))
    logits = {}
    for name, folder in folders.items():
        described = HuggingFaceCheckpoint.open(Path(folder)).model
        model = described.model_copy(update={"init_from": folder, "vocab_divisor": 8}).model_dump()
        config = small_config(Path(scratch), model=model, parallel=parallel, batch={"global_size": 2, "micro_size": 1})
        engine = restored_engine(None, config, context, 0)
        logits[name] = engine.logits(inputs).float().numpy().copy()
        logits[name, "cross-entropy"] = engine.evaluate([scored])[0].loss.numpy().copy()
    return logits


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("families")
    return {family: str(write_checkpoint(folder / family, family)) for family in REFERENCES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(layout: str, checkpoints: dict[str, str], tmp_path: Path) -> None:
    parallel = LAYOUTS[layout]
    ranks = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    results = run_ranks(our_logits, ranks, checkpoints, str(tmp_path), parallel)
    for family in REFERENCES:
        expected = reference_logits(family, torch.from_numpy(TOKENS)).flatten(0, 1).numpy()
        losses = torch.nn.functional.cross_entropy(
            torch.from_numpy(expected), torch.from_numpy(TOKENS).flatten(), reduction="none"
        )
        for logits in results:
            np.testing.assert_allclose(logits[family], expected, rtol=1e-5, atol=1e-5, err_msg=family)
            np.testing.assert_allclose(logits[family, "cross-entropy"], losses.view(3, 11).sum(1), rtol=1e-5)


@pytest.mark.parametrize("family", REFERENCES)
def test_import_and_export_are_bit_identical(family: str, checkpoints: dict[str, str], tmp_path: Path) -> None:
    source = Path(checkpoints[family])
    reading = ["import", str(source), "--output", str(tmp_path / "run"), "--tensor", "2", "--pipeline", "2"]
    writing = ["export", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--shard-size", "25KB"]
    if "mask_token_id" not in json.loads((source / "config.json").read_text(encoding="utf-8")):
        reading += ["--mask-token", str(MASK)]  # else the table would grow
    for arguments in (reading, writing):
        (result,) = run_program_ranks("tools/convert_checkpoint.py", arguments)
        assert result.exit_code == 0, result.stderr
    before = tensors(source)
    after = tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=0)
    configs = [
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (source, tmp_path / "out")
    ]
    assert configs[0] == configs[1]
    assert load_config(tmp_path / "run/config.yaml").model.num_layers == 3


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_configuration_reads_back(name: str) -> None:
    from tests.small import small_model

    family = FAMILIES[name]
    model = small_model(rope_theta=777.0, norm_eps=1e-4, **family.implies)
    written = family.write(model, {})
    assert written["architectures"] == [family.architecture]
    values = family.read(written, "config.json")
    for key, value in values.items():
        assert getattr(model, key) == value, key
