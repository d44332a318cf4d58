"""What a user can get wrong: one clear line, exit code 1 on every rank, and no rank that hangs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.load import dump_config
from tests.ranks import run_program_ranks
from tests.small import small_config, write_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_ids(tmp_path / "train.jsonl", 20)
    return tmp_path


def config_file(folder: Path, **sections: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(dump_config(small_config(folder, **sections)), encoding="utf-8")
    return path


def assert_refused(arguments: list[str], *parts: str, ranks: int = 2) -> None:
    results = run_program_ranks("launch/train.py", arguments, ranks)
    assert [result.exit_code for result in results] == [1] * ranks, results[0].stderr + results[0].stdout
    line = results[0].stderr.strip()
    assert line.startswith("error: ")
    assert "\n" not in line, line
    for part in parts:
        assert part in line, line


def append(folder: Path, line: str) -> None:
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def test_unknown_key(folder: Path) -> None:
    path = config_file(folder)
    path.write_text(path.read_text().replace("lr: 0.003", "lr: 0.003\n  weight_decya: 0.1"))
    assert_refused(
        ["--config", str(path)], str(path), "optimizer.weight_decya", "did you mean 'optimizer.weight_decay'"
    )


def test_unknown_override(folder: Path) -> None:
    assert_refused(
        ["--config", str(config_file(folder)), "optimizer.lrr=1"], "override 'optimizer.lrr=1'", "optimizer.lr"
    )


def test_value_of_wrong_type(folder: Path) -> None:
    assert_refused(["--config", str(config_file(folder)), "optimizer.lr=fast"], "'optimizer.lr'", "'fast'")


def test_missing_key(folder: Path) -> None:
    path = config_file(folder)
    path.write_text(path.read_text().replace("  num_layers: 2\n", ""))
    assert_refused(["--config", str(path)], "key 'model.num_layers' is missing")


@pytest.mark.parametrize("name", ["no_such.yaml", "broken.yaml"])
def test_configuration_file_that_cannot_be_read(folder: Path, name: str) -> None:
    (folder / "broken.yaml").write_text("model: [1, 2", encoding="utf-8")
    assert_refused(["--config", str(folder / name)], name, ranks=1)


def test_indivisible_batch(folder: Path) -> None:
    arguments = ["--config", str(config_file(folder)), "batch.global_size=6"]
    assert_refused(arguments, "'batch.global_size' 6", "'batch.micro_size' 2 × 2 data-parallel ranks = 4")


def test_layout_that_does_not_fit(folder: Path) -> None:
    config = str(config_file(folder))
    assert_refused(["--config", config, "parallel.tensor=4"], "does not divide the 2 ranks")
    pipeline = ["parallel.pipeline=2", "parallel.zero=2"]
    assert_refused(["--config", config, *pipeline], "'parallel.zero' 2 cannot be combined with 'parallel.pipeline' 2")


def test_missing_data_file(folder: Path) -> None:
    arguments = ["--config", str(config_file(folder)), f"data.train={folder / 'absent.jsonl'}"]
    assert_refused(arguments, "absent.jsonl: no such data file")


def test_fp16_without_cuda(folder: Path) -> None:
    assert_refused(["--config", str(config_file(folder)), "precision.dtype=fp16"], "fp16 needs a CUDA device", ranks=1)


def test_missing_tokenizer(folder: Path) -> None:
    assert_refused(
        ["--config", str(config_file(folder)), "data.tokenizer=absent.model"], "absent.model: no such tokenizer"
    )


def test_malformed_json_line(folder: Path) -> None:
    append(folder, '{"input_ids": [1, 2')
    assert_refused(["--config", str(config_file(folder))], "train.jsonl, line 21: not valid JSON")


def test_record_of_unknown_form(folder: Path) -> None:
    append(folder, json.dumps({"text": "hello"}))
    assert_refused(["--config", str(config_file(folder))], "line 21", "question and answer", "found text", ranks=1)


def test_no_eligible_token(folder: Path) -> None:
    append(folder, json.dumps({"input_ids": [5, 6, 7], "prompt_length": 3}))
    assert_refused(["--config", str(config_file(folder))], "line 21", "no eligible token")


def test_token_outside_the_vocabulary(folder: Path) -> None:
    append(folder, json.dumps({"input_ids": [5, 99, 7], "prompt_length": 1}))
    assert_refused(["--config", str(config_file(folder))], "line 21", "outside the vocabulary of 61 ids", ranks=1)


def test_too_long_sample_as_error(folder: Path) -> None:
    append(folder, json.dumps({"input_ids": [5] * 65, "prompt_length": 3}))
    arguments = ["--config", str(config_file(folder)), "data.too_long=error"]
    assert_refused(arguments, "line 21", "65 tokens exceed 'data.max_length' 64")


def test_too_long_sample_is_counted_and_reported(folder: Path) -> None:
    append(folder, json.dumps({"input_ids": [5] * 65, "prompt_length": 3}))
    results = run_program_ranks("launch/train.py", ["--config", str(config_file(folder)), "schedule.steps=1"], 2)
    assert results[0].exit_code == 0, results[0].stderr
    assert "20 samples" in results[0].stdout
    assert "1 longer than 64 tokens left out" in results[0].stdout


def test_mask_id_outside_the_vocabulary(folder: Path) -> None:
    arguments = ["--config", str(config_file(folder)), "data.mask_token=61"]
    assert_refused(arguments, "'data.mask_token': id 61 is outside the vocabulary of 61 ids")


def test_deepspeed_key_that_a_section_owns(folder: Path) -> None:
    path = config_file(folder, deepspeed={"gradient_clipping": 2.0})
    assert_refused(["--config", str(path)], "deepspeed.gradient_clipping", "optimizer.gradient_clipping", ranks=1)


def test_checkpoint_of_another_configuration(folder: Path) -> None:
    arguments = ["--config", str(config_file(folder)), "schedule.steps=2"]
    assert run_program_ranks("launch/train.py", arguments, 2)[0].exit_code == 0
    assert_refused([*arguments, "--resume", "model.hidden_size=64"], "config.yaml", "'model.hidden_size' = 32, not 64")
    append(folder, json.dumps({"input_ids": [5, 6, 7], "prompt_length": 1}))
    assert_refused([*arguments, "--resume"], "train.jsonl: the file has changed")


def test_broken_calibration_artifact(folder: Path) -> None:
    artifact = folder / "calibration.json"
    artifact.write_text("{}", encoding="utf-8")
    overrides = ["diffusion.t_sampler=ppots", f"diffusion.calibration.artifact={artifact}"]
    assert_refused(["--config", str(config_file(folder)), *overrides], "calibration.json: not a calibration artifact")


def test_calibration_of_what_draws_no_masks(tmp_path: Path) -> None:
    """Told before ranks join and an engine is built."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(small_config(tmp_path)), encoding="utf-8")
    write_ids(tmp_path / "train.jsonl", 8)
    arguments = ["--config", str(path), "--output", str(tmp_path / "c.json"), "objective.name=autoregressive"]
    (result,) = run_program_ranks("launch/calibrate.py", arguments, 1)
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "error: 'objective.name' autoregressive draws no masks: there is no p(t) to calibrate"
    )
    assert not (tmp_path / "c.json").exists()
