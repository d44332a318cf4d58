"""tools/convert_checkpoint.py: what it writes, how it goes on after a kill, and what verify and inspect say."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mdm.checkpoint.compare import differences
from tests.checkpoint.huggingface_models import EOS, MASK, VOCAB, write_checkpoint
from tests.checkpoint.test_bad_checkpoints import change_json, write_tokenizer
from tests.ranks import ProgramResult, run_program_ranks
from tests.small import small_model, write_ids

EMBEDDING = "model.embed_tokens.weight"


def convert(*arguments: object) -> ProgramResult:
    return run_program_ranks("tools/convert_checkpoint.py", [str(argument) for argument in arguments])[0]


def succeed(*arguments: object) -> str:
    result = convert(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("convert") / "llada", "llada", torch.bfloat16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("convert") / "llama", "llama", shard_size="1GB")


def test_types_and_verify(llada: Path, tmp_path: Path) -> None:
    succeed("import", llada, "--output", tmp_path / "wide", "--dtype", "fp32", "--tensor", "2")
    succeed("export", tmp_path / "wide", "--output", tmp_path / "narrow", "--dtype", "bf16")
    assert [path.name for path in (tmp_path / "narrow").glob("*.safetensors")] == ["model.safetensors"]
    assert "30 tensors are equal, bit for bit" in succeed("verify", llada, tmp_path / "narrow")
    different = convert("verify", llada, tmp_path / "wide")  # a run against a folder, types differ
    assert different.exit_code == 1
    assert "type bfloat16 and float32; greatest difference 0" in different.stdout
    assert json.loads((tmp_path / "narrow/config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"


def test_verify_names_what_differs(llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    (path,) = other.glob("*.safetensors")
    tensors = load_file(path)
    tensors[EMBEDDING][3, 4] += 0.5
    save_file(tensors, path)
    result = convert("verify", llama, other)
    assert result.exit_code == 1
    assert f"{EMBEDDING}: values; greatest difference 0.5" in result.stdout
    assert "1 of 30 tensors differ" in result.stderr
    tied = write_checkpoint(tmp_path / "tied", "llama_tied")
    for pair in ((llama, tied), (tied, llama)):
        assert [line for line in differences(*pair) if "only in" in line] == [f"lm_head.weight: only in {llama}"]


def test_inspect(llada: Path, tmp_path: Path) -> None:
    text = succeed("inspect", llada)
    assert "LLaDAModelLM, 30 tensors" in text
    assert "hidden_size: 32" in text
    described = json.loads(succeed("inspect", llada, "--json"))
    succeed("import", llada, "--output", tmp_path / "run", "--tensor", "2")
    run = json.loads(succeed("inspect", tmp_path / "run", "--json"))
    # Neither the layout nor the form changes a tensor's bits.
    theirs = "model.transformer.blocks.2.ff_out.weight"
    ours = "decoder.layers.2.mlp.linear_fc2.weight/weight"
    assert described["tensors"][theirs] == run["tensors"][ours]
    assert described["tensors"][theirs]["sha256"][:16] in text
    assert described["model"] == run["model"]


def test_a_killed_conversion_goes_on(llada: Path, tmp_path: Path) -> None:
    arguments = ("import", llada, "--output", tmp_path / "run", "--shard-size", "9KB")
    succeed(*arguments)
    whole = sorted((tmp_path / "run").rglob("*.safetensors"))
    assert len(whole) > 4
    contents = {path.relative_to(tmp_path / "run"): path.read_bytes() for path in whole}

    # What a kill leaves: some files finished and in the journal, one damaged since, the rest absent.
    unfinished = tmp_path / ".again.tmp"
    arguments = ("import", llada, "--output", tmp_path / "again", "--shard-size", "9KB")
    failed = convert_with_a_damaged_source(arguments, llada, tmp_path)
    assert failed.exit_code == 1
    journal = json.loads((unfinished / "journal.json").read_text(encoding="utf-8"))
    finished = [unfinished / name for name in journal["files"]]
    assert 2 <= len(finished) < len(whole)
    finished[0].write_bytes(b"damaged")
    times = {path: path.stat().st_mtime_ns for path in finished[1:]}
    time.sleep(0.01)
    output = succeed(*arguments)
    assert f"{len(finished) - 1} finished files are kept" in output
    again = {p.relative_to(tmp_path / "again"): p for p in (tmp_path / "again").rglob("*.safetensors")}
    assert {name: path.read_bytes() for name, path in again.items()} == contents
    for path, written in times.items():
        assert again[path.relative_to(unfinished)].stat().st_mtime_ns == written
    assert not unfinished.exists()


def convert_with_a_damaged_source(arguments: tuple[object, ...], source: Path, scratch: Path) -> ProgramResult:
    """A conversion that stops at a NaN in the last layer; the source is then as it was, to the nanosecond."""
    import os

    name = "model.transformer.blocks.2.attn_out.weight"
    places = json.loads((source / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    path = source / places[name]
    before = path.read_bytes()
    status = path.stat()
    tensors = load_file(path)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = convert(*arguments)
    path.write_bytes(before)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return result


def test_output_that_exists_is_kept(llada: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    result = convert("import", llada, "--output", tmp_path / "run")
    assert result.exit_code == 1
    assert "exists already" in result.stderr


def test_mask_token_of_an_autoregressive_model(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "llama"))
    write_tokenizer(folder, VOCAB - 2)
    output = succeed("import", folder, "--output", tmp_path / "spare")
    assert f"mask token {VOCAB - 2}: a spare row" in output
    write_tokenizer(folder, VOCAB)
    output = succeed("import", folder, "--output", tmp_path / "grown", "--tensor", "2")
    assert f"the table grew from {VOCAB} to {VOCAB + 1} rows" in output
    succeed("export", tmp_path / "grown", "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == VOCAB + 1
    assert config["mask_token_id"] == VOCAB
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    for name in (EMBEDDING, "lm_head.weight"):
        torch.testing.assert_close(after[name][:VOCAB], before[name], rtol=0, atol=0)
        torch.testing.assert_close(after[name][VOCAB], before[name].double().mean(0).float())
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    again = succeed("import", tmp_path / "out", "--output", tmp_path / "again")
    assert f"mask token {VOCAB}: " in again  # and the table does not grow twice
    assert "grew" not in again


def test_train_from_a_checkpoint_and_export(llada: Path, tmp_path: Path) -> None:
    """model.init_from on tensor 2 × pipeline 2; the run is exported, and a second run starts from the first."""
    write_ids(tmp_path / "train.jsonl", 20, num_ids=MASK)
    model = small_model(num_layers=3, ffn_hidden_size=48, vocab_size=VOCAB, rope_theta=5000.0)
    base = [f"model.{key}={value}" for key, value in model.model_dump(mode="json", exclude={"init_from"}).items()]
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{}}\ndata: {{train: {tmp_path}/train.jsonl, mask_token: {MASK}, pad_token: 0, eos_token: {EOS}, "
        "max_length: 64}\nbatch: {global_size: 4, micro_size: 1}\noptimizer: {lr: 1.0e-3}\nschedule: {steps: 2}\n"
        "precision: {dtype: fp32}\nlogging: {every: 1, tensorboard: false}\n",
        encoding="utf-8",
    )

    def train(run: str, start: Path, *more: str) -> list[ProgramResult]:
        places = [f"model.init_from={start}", f"checkpoint.directory={tmp_path / run}"]
        results = run_program_ranks("launch/train.py", ["--config", str(config), *base, *places, *more], 4)
        assert [result.exit_code for result in results] == [0] * 4, results[0].stderr
        return results

    first = train("first", llada, "parallel.tensor=2", "parallel.pipeline=2")
    assert "initial weights:" in first[0].stdout
    assert f"mask token {MASK}: a row of the checkpoint's table" in first[0].stdout
    succeed("export", tmp_path / "first", "--output", tmp_path / "trained")
    exported = json.loads((tmp_path / "trained/config.json").read_text(encoding="utf-8"))
    assert exported == json.loads((llada / "config.json").read_text(encoding="utf-8"))
    (path,) = (tmp_path / "trained").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}  # as config.json says

    def first_loss(results: str) -> float:
        lines = (tmp_path / results / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[0])["loss"]

    train("from_run", tmp_path / "first")
    train("from_export", tmp_path / "trained", "parallel.tensor=2")
    assert first_loss("from_run") == pytest.approx(first_loss("from_export"), rel=1e-5)
    assert first_loss("from_run") != pytest.approx(first_loss("first"), rel=1e-5)


def test_generate_from_an_imported_run(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "llama"))
    write_tokenizer(folder, VOCAB - 2)
    succeed("import", folder, "--output", tmp_path / "imported")
    (tmp_path / "imported").rename(tmp_path / "run")  # with its tokenizer
    shutil.rmtree(folder)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "word3"}\n', encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    files = ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(output)]
    generation = ["gen_length=8", "block_length=8", "steps=4", "data.end_tokens=[3]"]
    arguments = ["--run-dir", str(tmp_path / "run"), *files, "--tensor", "2", *generation]
    for result in run_program_ranks("launch/generate.py", arguments, 2):
        assert result.exit_code == 0, result.stderr
    assert "response" in json.loads(output.read_text(encoding="utf-8"))


def test_imported_weights_cannot_be_resumed(llada: Path, tmp_path: Path) -> None:
    succeed("import", llada, "--output", tmp_path / "run")
    write_ids(tmp_path / "train.jsonl", 20, num_ids=MASK)
    arguments = ["--config", str(tmp_path / "run/config.yaml"), f"data.train={tmp_path}/train.jsonl"]
    (result,) = run_program_ranks("launch/train.py", [*arguments, "--resume"])
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr


def test_export_without_a_family(llada: Path, tmp_path: Path) -> None:
    succeed("import", llada, "--output", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/huggingface")
    result = convert("export", tmp_path / "run", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "choose its form with --family" in result.stderr
    change = convert("export", tmp_path / "run", "--output", tmp_path / "out", "--family", "qwen2")
    assert change.exit_code == 1
    assert "'model.qkv_bias' False cannot be written as Qwen2ForCausalLM" in change.stderr
    succeed("export", tmp_path / "run", "--output", tmp_path / "out", "--family", "llama")
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["mask_token_id"] == MASK
    change_json(tmp_path / "out/config.json", tie_word_embeddings=True)
    tied = convert("import", tmp_path / "out", "--output", tmp_path / "tied")
    assert "says that they are tied" in tied.stderr
