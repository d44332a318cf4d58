"""The main job, small: data → tokenizer → calibration → training → answers → report, by the programs a user runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.ranks import run_program_ranks

CONFIG = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "num_kv_heads": 2,
        "ffn_hidden_size": 64,
        "max_sequence_length": 64,
    },
    "diffusion": {"t_sampler": "ppots", "views": 2, "strata": "full", "calibration": {"num_times": 10, "num_masks": 3}},
    "batch": {"global_size": 16, "micro_size": 4},
    "optimizer": {"lr": 0.003},
    "precision": {"dtype": "fp32"},  # in bf16, near ties fall as the batch and the layout round
    "schedule": {"epochs": 0.5, "name": "wsd"},
    "evaluation": {"every": 8, "num_samples": 8, "num_times": 2},
    "logging": {"every": 4},
}


def run(path: str, *arguments: str, ranks: int = 1) -> str:
    results = run_program_ranks(path, list(arguments), ranks)
    assert [result.exit_code for result in results] == [0] * ranks, results[0].stderr
    return results[0].stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    sizes = ["--train", "512", "--validation", "16", "--test", "12"]
    run("tools/prepare_data.py", "arithmetic", "--output", str(folder), *sizes)
    tokenizer = ["--output", str(folder / "tokenizer.model"), "--vocab-size", "320", "--model-type", "bpe"]
    run("tools/train_tokenizer.py", "--data", str(folder / "train.jsonl"), *tokenizer, "--whole-numbers", "24")
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "validation")}
    data |= {"tokenizer": str(folder / "tokenizer.model"), "max_length": 64}
    config = {**CONFIG, "data": data, "checkpoint": {"directory": str(folder / "run")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    output = run("launch/train.py", "--config", str(folder / "config.yaml"), ranks=2)
    assert "512 samples, 16 for validation" in output
    assert "trained 16 steps" in output
    return folder / "run"


def test_run_folder(trained: Path) -> None:
    for name in ("config.yaml", "calibration.json", "calibration.png", "curves.png", "summary.json", "metrics.jsonl"):
        assert (trained / name).stat().st_size > 0, name
    assert list((trained / "tensorboard").iterdir())
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [4, 8, 12, 16]
    assert [record["step"] for record in records if "validation_loss" in record] == [8, 16]
    last = next(record for record in reversed(records) if "loss" in record)
    assert {"lr", "grad_norm", "tokens_per_second", "variance_of_loss", "variance_of_estimator"} <= last.keys()
    assert len(last["loss_by_t"]) == 10
    artifact = json.loads((trained / "calibration.json").read_text())
    assert 0 < artifact["forwards"] <= 15 * 10 * 3
    assert 0.0 < artifact["efficiency"] <= 1.0 + 1e-9


def test_tensorboard_has_the_curves(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "validation_loss", "variance_of_loss"} <= scalars
    assert "loss_by_t/bin_0" in scalars
    assert events.Tags()["images"] == ["calibration"]


def test_evaluate_and_report(folder: Path, trained: Path) -> None:
    arguments = ["--run-dir", str(trained), "--data", str(folder / "test.jsonl"), "gen_length=16", "steps=8"]
    output = run("launch/evaluate.py", *arguments, "block_length=8", "batch_size=4", ranks=2)
    assert "exact match: 0." in output
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    result = json.loads((trained / "evaluation.json").read_text())
    assert len(samples) == result["num_questions"] == 12
    assert result["num_right"] == sum(sample["right"] for sample in samples)
    report = run("tools/report.py", "run", str(trained))
    assert "calibration efficiency:" in report
    assert "spread of t:" in report
    assert f"exact match: {result['exact_match']:.2f}" in report


def test_generate(folder: Path, trained: Path) -> None:
    output = folder / "out.jsonl"
    prompts = folder / "prompts.jsonl"
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    conversation = json.dumps({"messages": [*turns, {"role": "user", "content": "And twice?"}]})
    broken = '{"question": "cut \\ud83d"}'
    prompts.write_text((folder / "test.jsonl").read_text() + f"{broken}\n{conversation}\n")
    arguments = ["--run-dir", str(trained), "--prompts", str(prompts), "--output", str(output)]
    arguments += ["gen_length=16", "steps=4", "block_length=8"]
    refused = run_program_ranks("launch/generate.py", arguments)[0]
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: {prompts}, line 13: holds \\ud83d")
    refused = run_program_ranks("launch/generate.py", [*arguments[:-1], "block_length=16", "gen_length=64"])[0]
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: {prompts}, line 1: ")
    assert "64 of gen_length are" in refused.stderr
    assert "more than 'model.max_sequence_length' 64" in refused.stderr
    said = run("launch/generate.py", *arguments, "--on-error", "skip", ranks=2)
    assert said.startswith("device: cpu, ")
    assert "1 bad records left out" in said
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 13
    assert all(record.keys() == {"prompt", "response", "steps"} for record in records[:12])
    assert records[12]["messages"] == json.loads(conversation)["messages"]


def test_generation_goes_on_where_it_was_interrupted(folder: Path, trained: Path) -> None:
    whole = folder / "whole.jsonl"
    output = folder / "interrupted.jsonl"
    arguments = ["--run-dir", str(trained), "--prompts", str(folder / "test.jsonl")]
    settings = ["gen_length=16", "steps=4", "block_length=8", "batch_size=2", "temperature=0.5"]
    run("launch/generate.py", *arguments, "--output", str(whole), *settings)
    broken = output.with_name(output.name + ".partial")
    output.mkdir()  # so that the job cannot finish its file
    stopped = run_program_ranks("launch/generate.py", [*arguments, "--output", str(output), *settings])[0]
    assert stopped.exit_code == 1
    assert f"error: {output}: cannot be written (Is a directory)" in stopped.stderr
    output.rmdir()
    # As a killed job leaves it: some rows, and a line that was being written. One answer is marked.
    header, first, *_ = broken.read_text().split("\n")
    kept = "kept\u2028with\x85line\x0bseparators\u2029"
    marked = {**json.loads(first), "response": kept}
    broken.write_text(
        "\n".join([header, json.dumps(marked, ensure_ascii=False), '{"response": "of no row"}', '{"row": 9, "resp'])
    )
    refused = run_program_ranks("launch/generate.py", [*arguments, "--output", str(output), *settings[:-1]])[0]
    assert refused.exit_code == 1
    assert "begun with temperature = 0.5, not 0.0" in refused.stderr
    assert "1 responses are there already" in run(
        "launch/generate.py", *arguments, "--output", str(output), *settings, "--tensor", "2", ranks=2
    )
    assert not broken.exists()
    expected = [json.loads(line) for line in whole.read_text().split("\n") if line]
    expected[marked["row"]]["response"] = kept
    assert [json.loads(line) for line in output.read_text().split("\n") if line] == expected


def test_evaluate_likelihoods(folder: Path, trained: Path) -> None:
    settings = ["num_times=4", "num_repeats=2"]
    arguments = ["--run-dir", str(trained), "--data", str(folder / "test.jsonl"), "--task", "perplexity", *settings]
    assert "perplexity: at most" in run("launch/evaluate.py", *arguments, ranks=2)
    expected = json.loads((trained / "perplexity.json").read_text())
    run("launch/evaluate.py", *arguments, "--pipeline", "2", "batch_size=8", ranks=2)
    result = json.loads((trained / "perplexity.json").read_text())
    assert result["num_samples"] == 12
    assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert 0.0 < result["standard_error"] < result["nats_per_token"]
    choices = [{"prompt": "2 + 3", "choices": ["5", "many apples"], "answer": 0}] * 3
    (folder / "choices.jsonl").write_text("".join(json.dumps(record) + "\n" for record in choices))
    arguments = ["--run-dir", str(trained), "--data", str(folder / "choices.jsonl"), "--task", "multiple_choice"]
    assert "accuracy: " in run("launch/evaluate.py", *arguments, *settings, ranks=2)
    assert json.loads((trained / "multiple_choice.json").read_text())["num_questions"] == 3
    assert len((trained / "multiple_choice_samples.jsonl").read_text().splitlines()) == 3


def test_ways_of_decoding_side_by_side(folder: Path, trained: Path) -> None:
    arguments = ["--run-dir", str(trained), "--data", str(folder / "test.jsonl"), "--limit", "4", "--repeats", "1"]
    lines = run(
        "tools/benchmarks/__main__.py", "generation", *arguments, "gen_length=8", "block_length=4", "steps=8"
    ).splitlines()
    exact = next(line for line in lines if line.startswith("exact "))
    assert exact.split()[2:5] == ["1.000", "1.000", "8.00"]  # the same text as itself, in 8 passes
    assert any(line.startswith("prefix cache ") for line in lines)


def test_autoregressive_baseline(folder: Path) -> None:
    """The same programs train, score and answer with it."""
    target = folder / "autoregressive"
    method = ["objective.name=autoregressive", "diffusion.t_sampler=uniform", "diffusion.views=1"]
    overrides = [f"checkpoint.directory={target}", *method, "diffusion.strata=none"]
    run("launch/train.py", "--config", str(folder / "config.yaml"), *overrides, "schedule.epochs=0.25")
    records = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["validation_loss"] < records[0]["loss"]
    length = ["gen_length=16", "block_length=8", "steps=8", "batch_size=8"]
    run("launch/evaluate.py", "--run-dir", str(target), "--data", str(folder / "test.jsonl"), *length, ranks=2)
    assert json.loads((target / "evaluation.json").read_text())["num_questions"] == 12
    prompts = ["--prompts", str(folder / "test.jsonl"), "--output", str(folder / "autoregressive.jsonl")]
    run("launch/generate.py", "--run-dir", str(target), *prompts, *length, "--tensor", "2", ranks=2)
    assert len((folder / "autoregressive.jsonl").read_text().splitlines()) == 12


@pytest.fixture(scope="module")
def adapted(folder: Path, trained: Path) -> Path:
    """A run with adapters beside the weights of a copy of the trained one."""
    shutil.copytree(trained, folder / "base")
    arguments = ["--config", str(folder / "config.yaml"), f"checkpoint.directory={folder / 'adapted'}"]
    arguments += [f"model.init_from={folder / 'base'}", "model.lora.rank=4", "optimizer.lr=0.02"]
    output = run("launch/train.py", *arguments, "schedule.steps=8", "schedule.epochs=0", "diffusion.t_sampler=uniform")
    assert "; adapters: new ones, 0.0 M parameters" in output
    return folder / "adapted"


def test_several_adapters_are_evaluated(folder: Path, trained: Path, adapted: Path) -> None:
    """Without its adapter, a run is the one that it began with, bit for bit; PEFT's folder is its own adapter again."""
    exported = folder / "exported-adapter"
    lines = run(
        "tools/convert_checkpoint.py", "export", str(adapted), "--output", str(exported), "--adapter", "--family=llama"
    )
    assert "the base is a run: export it, too" in lines
    settings = [
        "--data",
        str(folder / "test.jsonl"),
        "--task",
        "perplexity",
        "num_times=2",
        "num_repeats=1",
        "--tensor=2",
    ]
    run("launch/evaluate.py", "--run-dir", str(trained), *settings, ranks=2)
    plain = json.loads((trained / "perplexity.json").read_text())
    assert "adapter" not in plain
    wishes = ["--adapter", str(exported), "--adapter", "own", "--adapter", "none"]
    output = run("launch/evaluate.py", "--run-dir", str(adapted), *wishes, *settings, ranks=2)
    assert [line for line in output.splitlines() if line.startswith("adapter: ")] == [
        f"adapter: {exported}",
        "adapter: own",
        "adapter: none",
    ]
    names = ("exported-adapter", "own", "none")
    results = {name: json.loads((adapted / f"perplexity.{name}.json").read_text()) for name in names}
    assert [result["adapter"] for result in results.values()] == list(names)
    assert results["none"]["perplexity"] == plain["perplexity"]
    assert results["own"]["perplexity"] == results["exported-adapter"]["perplexity"] != plain["perplexity"]
    assert results["own"]["adapter (sha256)"] != results["exported-adapter"]["adapter (sha256)"]
    assert "adapter (sha256)" not in results["none"]
    run("launch/evaluate.py", "--run-dir", str(trained), "--adapter", str(exported), *settings, ranks=2)
    beside = json.loads((trained / "perplexity.json").read_text())
    assert beside["perplexity"] == results["own"]["perplexity"]
    assert beside["adapter"] == "exported-adapter"


def test_answers_belong_to_an_adapter(folder: Path, trained: Path, adapted: Path) -> None:
    settings = ["--prompts", str(folder / "test.jsonl"), "gen_length=16", "steps=4", "block_length=8", "batch_size=4"]
    outputs = {name: folder / f"answers-{name}.jsonl" for name in ("plain", "none", "own")}
    run("launch/generate.py", "--run-dir", str(trained), *settings, "--output", str(outputs["plain"]))
    beside = ["--run-dir", str(adapted), *settings]
    run("launch/generate.py", *beside, "--output", str(outputs["none"]), "--adapter", "none")
    assert outputs["none"].read_bytes() == outputs["plain"].read_bytes()
    outputs["own"].mkdir()  # so that the job cannot finish its file
    assert run_program_ranks("launch/generate.py", [*beside, "--output", str(outputs["own"])])[0].exit_code == 1
    outputs["own"].rmdir()
    other = [*beside, "--output", str(outputs["own"]), "--adapter", "none"]
    refused = run_program_ranks("launch/generate.py", other)[0]
    assert refused.exit_code == 1
    assert "begun with adapter = 'own', not 'none'; go on with the same settings" in refused.stderr
    run("launch/generate.py", *beside, "--output", str(outputs["own"]), "--adapter", "own")
    assert len(outputs["own"].read_text().splitlines()) == 12


def test_weights_beside_adapters_that_were_moved_can_be_named(folder: Path, trained: Path, adapted: Path) -> None:
    moved = (folder / "base").rename(folder / "moved")
    settings = ["--data", str(folder / "test.jsonl"), "--task", "perplexity", "num_times=1", "num_repeats=1"]
    evaluate = ["--run-dir", str(adapted), *settings]
    for arguments, message in (
        (evaluate, f"'model.init_from' {folder / 'base'}"),
        ([*evaluate, f"model.init_from={adapted}"], f"{folder / 'base/checkpoints'}"),
        ([*evaluate, "--adapter", str(folder / "nowhere"), f"model.init_from={moved}"], "no such folder of an adapter"),
        (["--run-dir", str(trained), *settings, "--adapter=own"], "--adapter own: the run in"),
        (
            ["--run-dir", str(trained), *settings, f"model.init_from={moved}"],
            "has no adapters; its weights are its own",
        ),
        (["--run-dir", str(trained), *settings, "--adapter", str(trained)], "the run there has no adapters"),
    ):
        result = run_program_ranks("launch/evaluate.py", arguments)[0]
        assert result.exit_code == 1, arguments
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    run("launch/evaluate.py", *evaluate, f"model.init_from={moved}")
    assert json.loads((adapted / "perplexity.json").read_text())["adapter"] == "own"
    export = ["export", str(adapted), "--family", "llama", "--output", str(folder / "merged")]
    run("tools/convert_checkpoint.py", *export, "--base", str(moved))
    moved.rename(folder / "base")
    run("tools/convert_checkpoint.py", "verify", str(adapted), str(folder / "merged"))
    described = run("tools/convert_checkpoint.py", "inspect", str(adapted), "--no-checksums")
    assert "adapter: {rank: 4, alpha: 16.0, rslora: False, base: " in described
    assert "word_embeddings" not in described


def test_calibration_alone_equals_that_of_training(folder: Path, trained: Path) -> None:
    output = folder / "alone.json"
    run("launch/calibrate.py", "--config", str(folder / "config.yaml"), "--output", str(output), "precision.dtype=fp32")
    alone = json.loads(output.read_text())
    assert output.with_suffix(".png").exists()
    again = folder / "again.json"
    arguments = ["--config", str(folder / "config.yaml"), "--output", str(again), "precision.dtype=fp32"]
    run("launch/calibrate.py", *arguments, "batch.micro_size=8", ranks=2)
    assert json.loads(again.read_text())["cell_density"] == alone["cell_density"]
    after = ["--config", str(folder / "config.yaml"), "--output", str(folder / "after.json"), "--run-dir", str(trained)]
    run("launch/calibrate.py", *after)
    assert json.loads((folder / "after.json").read_text())["cell_density"] != alone["cell_density"]


def test_training_with_a_named_artifact(folder: Path, trained: Path) -> None:
    overrides = [
        f"diffusion.calibration.artifact={trained / 'calibration.json'}",
        "schedule.steps=2",
        "schedule.epochs=0",
    ]
    target = f"checkpoint.directory={folder / 'named'}"
    run("launch/train.py", "--config", str(folder / "config.yaml"), target, *overrides)
    # The run's folder holds all that resuming needs, the artifact too.
    assert (folder / "named" / "calibration.json").read_text() == (trained / "calibration.json").read_text()


def test_dry_run(folder: Path) -> None:
    output = run("launch/train.py", "--config", str(folder / "config.yaml"), "--dry-run", "--world-size", "4")
    assert "tensor 1 × pipeline 1 × data 4 = 4 ranks" in output
    assert "16 samples a step = 4 × 4 ranks × 1 micro-batches, 2 rows each; 16 steps" in output
    assert "memory per rank" in output


def test_early_stopping(folder: Path) -> None:
    """With a learning rate that cannot learn, the first validation stays the best: two more, and its weights are what
    evaluation takes, while the newest can be had."""
    overrides = ["optimizer.lr=1e-12", "evaluation.every=1", "evaluation.patience=2", "schedule.steps=50"]
    overrides += ["schedule.epochs=0", "diffusion.t_sampler=uniform", "precision.dtype=bf16"]
    target = f"checkpoint.directory={folder / 'early'}"
    output = run("launch/train.py", "--config", str(folder / "config.yaml"), target, *overrides)
    assert "no better validation loss in 2 validations" in output
    assert "after step 1; evaluation, generation and export take its checkpoint" in output
    summary = json.loads((folder / "early" / "summary.json").read_text())
    assert (summary["steps"], summary["best_step"]) == (3, 1)
    arguments = ["--run-dir", str(folder / "early"), "--data", str(folder / "test.jsonl"), "--limit", "1"]
    output = run("launch/evaluate.py", *arguments, "gen_length=4", "steps=1", "block_length=4")
    assert output.startswith("device: cpu, ")
    assert "weights: step-00000001, the best by validation loss (" in output
    assert json.loads((folder / "early" / "evaluation.json").read_text())["checkpoint"] == "step-00000001"
    arguments = ["export", str(folder / "early"), "--family", "llada", "--output", str(folder / "exported")]
    assert "weights: step-00000003, the newest" in run("tools/convert_checkpoint.py", *arguments, "--checkpoint=newest")


def test_a_layout_that_does_not_fit(folder: Path, trained: Path) -> None:
    arguments = ["--run-dir", str(trained), "--data", str(folder / "test.jsonl")]
    for layout, message in ((["--tensor", "2"], "does not divide the 1 ranks"), (["--pipeline", "3"], "exceeds the 2")):
        result = run_program_ranks("launch/evaluate.py", [*arguments, *layout])[0]
        assert result.exit_code == 1
        assert message in result.stderr


def test_not_a_run_folder(folder: Path) -> None:
    short = ["gen_length=16", "block_length=16"]
    for arguments, message in (
        (["--run-dir", str(folder / "none"), "--data", str(folder / "test.jsonl")], "not a run's folder"),
        (
            ["--run-dir", str(folder), "--data", str(folder / "test.jsonl"), *short],
            "the run has no checkpoint yet",
        ),
        (["--run-dir", str(folder), "--data", str(folder / "absent.jsonl")], "no such data file"),
    ):
        result = run_program_ranks("launch/evaluate.py", arguments)[0]
        assert result.exit_code == 1
        assert message in result.stderr
