"""Runs on images and text: resumed ones, what reports say of them, and a checkpoint of MMaDA's shape in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mdm.config.load import dump_config, load_config
from megatron_mdm.config.schema import ImageVocabulary
from megatron_mdm.data.image_text import image_row
from tests.checkpoint.huggingface_models import llada_name, write_checkpoint
from tests.ranks import run_program_ranks
from tests.small import IMAGES, small_config, write_ids, write_images
from tests.training.test_layouts import METHOD
from tests.training.test_resume import losses

MMADA = ImageVocabulary()
NUM_ROWS = 134_656  # of MMaDA's table


def run(path: str, *arguments: object) -> str:
    (result,) = run_program_ranks(path, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with P-POTS, MIRROR, strata, a re-fit and dropped captions, by MMaDA's noise."""
    folder = tmp_path_factory.mktemp("images")
    blend = {str(write_images(folder / "images.jsonl", 24)): 1.0, str(write_ids(folder / "text.jsonl", 9)): 0.25}
    noise = {"mask_schedule": "cosine", "masking": "rounded_count"}
    config = small_config(
        folder,
        data={"train": blend, "validation": str(write_images(folder / "validation.jsonl", 6, seed=1))},
        objective={"name": "text_to_image"},
        image={"vocabulary": IMAGES.model_dump(), "caption_dropout": 0.3},
        diffusion={**METHOD, **noise, "calibration": {**METHOD["calibration"], "refit_every": 4}},
        schedule={"steps": 6},
        checkpoint={"save_every": 3},
        evaluation={"every": 3, "num_samples": 4, "num_times": 2},
    )
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    run("launch/train.py", "--config", folder / "config.yaml")
    return folder


def test_a_resumed_run_drops_the_same_captions(trained: Path) -> None:
    again = trained / "again"
    shutil.copytree(trained / "run", again)
    shutil.rmtree(again / "checkpoints/step-00000006")
    arguments = ["--config", trained / "config.yaml", f"checkpoint.directory={again}"]
    assert "resumed from" in run("launch/train.py", *arguments, "--resume")
    assert losses(again) == losses(trained / "run")
    saved = load_config(again / "config.yaml").image
    assert (saved.made_by, saved.num_tokens, saved.vocabulary) == ("a" * 64, 9, IMAGES)


def write_mmada(folder: Path) -> Path:
    """A checkpoint with MMaDA's whole table of text and image codes, and few small layers."""
    write_checkpoint(folder, "mmada", shard_size="1GB")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[llada_name(name)] = torch.randn(NUM_ROWS, 32, generator=generator) * 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"new_vocab_size": NUM_ROWS, "vocab_size": NUM_ROWS, "embedding_size": NUM_ROWS, "codebook_size": 8192}
    config |= {"mask_token_id": 126_336, "eos_token_id": MMADA.eos, "pad_token_id": MMADA.eos}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_mmadas_shape_is_imported_trained_exported_and_verified(tmp_path: Path) -> None:
    source = write_mmada(tmp_path / "mmada")
    convert = "tools/convert_checkpoint.py"
    run(convert, "import", source, "--output", tmp_path / "imported")
    assert "are equal, bit for bit" in run(convert, "verify", source, tmp_path / "imported")
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(8):
        caption, codes = generator.integers(0, 126_080, 5).tolist(), generator.integers(0, 8192, 16).tolist()
        row = image_row(caption, codes, MMADA)
        rows.append({"input_ids": row.ids, "spans": [row.span], "codes_of": "a" * 64})
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = write_ids(tmp_path / "text.jsonl", 8, num_ids=126_080)
    model = load_config(tmp_path / "imported/config.yaml").model.model_dump(exclude={"init_from"})
    config = small_config(
        tmp_path,
        model={**model, "init_from": str(tmp_path / "imported")},
        data={
            "train": {str(tmp_path / "images.jsonl"): 1.0, str(text): 0.5},
            "mask_token": 126_336,
            "pad_token": MMADA.eos,
            "eos_token": MMADA.eos,
        },
        objective={"name": "text_to_image"},
        image={"caption_dropout": 0.1},
        diffusion={"mask_schedule": "cosine", "masking": "rounded_count"},
        batch={"global_size": 4, "micro_size": 4},
        schedule={"steps": 5},
    )
    (tmp_path / "train.yaml").write_text(dump_config(config), encoding="utf-8")
    run("launch/train.py", "--config", tmp_path / "train.yaml")
    run(convert, "export", tmp_path / "run", "--output", tmp_path / "exported", "--family", "mmada")
    assert "are equal, bit for bit" in run(convert, "verify", tmp_path / "run", tmp_path / "exported")
    exported = json.loads((tmp_path / "exported/config.json").read_text(encoding="utf-8"))
    assert (exported["new_vocab_size"], exported["architectures"]) == (NUM_ROWS, ["MMadaModelLM"])
    name = llada_name("model.embed_tokens.weight")
    before, after = (
        {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}[name]
        for folder in (source, tmp_path / "exported")
    )
    changed = {int(row) for row in (before != after.to(before.dtype)).any(1).nonzero()}
    assert any(row >= MMADA.first_id for row in changed)  # codes behind LLaDA's ids
