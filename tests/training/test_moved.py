"""Runs and data that were moved or renamed: they are found, and told by their contents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_mdm.checkpoint.load import checkpoint_identity, run_config
from megatron_mdm.config.load import dump_config, load_config
from megatron_mdm.config.places import from_run, to_run
from megatron_mdm.data.tokenizer import load_tokenizer
from tests.data.test_records import write_byte_tokenizer
from tests.ranks import ProgramResult, run_program_ranks
from tests.small import small_config, small_model


def train(*arguments: object) -> ProgramResult:
    return run_program_ranks("launch/train.py", [str(argument) for argument in arguments])[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a tokenizer, and a run of 4 of 8 steps on them."""
    folder = tmp_path_factory.mktemp("moved")
    (folder / "words").mkdir()
    write_byte_tokenizer(folder / "words")
    records = [{"prompt": f"{number} + 1?", "response": f"{number + 1}"} for number in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = {"tokenizer": str(folder / "words"), "mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "</s>"}
    model = small_model(vocab_size="tokenizer").model_dump()
    schedule = {"steps": 8}
    config = small_config(folder, model=model, data=tokenizer, schedule=schedule, checkpoint={"save_every": 4})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert train("--config", folder / "config.yaml").exit_code == 0
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000008")  # as if it had been stopped
    return folder


@pytest.fixture
def moved(trained: Path, tmp_path: Path) -> Path:
    """The run alone, under another name; nothing of what it was made from is left where it was."""
    shutil.copytree(trained / "run", tmp_path / "renamed")
    return tmp_path / "renamed"


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_a_renamed_run_goes_on_with_data_that_were_moved(trained: Path, moved: Path, tmp_path: Path) -> None:
    expected = losses(moved)
    data = tmp_path / "renamed.jsonl"
    words = tmp_path / "tokenizer"
    shutil.copy(trained / "train.jsonl", data)
    shutil.copytree(trained / "words", words)
    places = [f"data.train={data}", f"data.tokenizer={words}", f"checkpoint.directory={moved}"]
    result = train("--config", trained / "config.yaml", "--resume", *places)
    assert result.exit_code == 0, result.stderr
    assert f"resumed from {moved / 'checkpoints' / 'step-00000004'} at step 4" in result.stdout
    assert losses(moved) == expected
    # By its own configuration alone, but for the data.
    shutil.rmtree(moved / "checkpoints" / "step-00000008")
    result = train("--config", moved / "config.yaml", "--resume", f"data.train={data}")
    assert result.exit_code == 0, result.stderr
    assert losses(moved) == expected


def test_other_contents_are_refused(trained: Path, moved: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    words = tmp_path / "words"
    data.write_text((trained / "train.jsonl").read_text() + '{"prompt": "a", "response": "b"}\n')
    shutil.copytree(trained / "words", words)
    (words / "tokenizer.json").write_text((words / "tokenizer.json").read_text() + "\n")
    arguments = ["--config", trained / "config.yaml", "--resume", f"checkpoint.directory={moved}"]
    for place, key in ((f"data.train={data}", "data.train"), (f"data.tokenizer={words}", "data.tokenizer")):
        result = train(*arguments, place)
        assert result.exit_code == 1
        assert f"error: {place.partition('=')[2]}: the file has changed since the run" in result.stderr
        assert f"('{key}')" in result.stderr


def test_a_moved_run_answers(trained: Path, moved: Path, tmp_path: Path) -> None:
    """With its own copy of the tokenizer."""
    aside = trained.rename(trained.with_name("aside"))
    try:
        settings = ["gen_length=4", "block_length=4", "steps=2"]
        arguments = ["--run-dir", str(moved), "--prompts", str(aside / "train.jsonl")]
        arguments += ["--output", str(tmp_path / "out.jsonl"), *settings]
        (result,) = run_program_ranks("launch/generate.py", arguments)
        assert result.exit_code == 0, result.stderr
    finally:
        aside.rename(trained)


def test_answers_are_gone_on_with_by_the_same_checkpoint_only(trained: Path, moved: Path) -> None:
    """Wherever it lies; another run's of the same name is another."""
    name = "step-00000004"
    ours = checkpoint_identity(trained / "run", name)
    assert checkpoint_identity(moved, name) == ours
    manifest = moved / "checkpoints" / name / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert checkpoint_identity(moved, name) != ours


def test_what_a_configuration_holds(trained: Path, moved: Path) -> None:
    written = yaml.safe_load((moved / "config.yaml").read_text())
    assert written["checkpoint"]["directory"] == "$RUN"
    assert written["data"]["tokenizer"] == "$RUN/tokenizer/tokenizer.json"
    assert written["data"]["train"] == str(trained / "train.jsonl")
    config = run_config(moved)
    assert config.checkpoint.directory == str(moved)
    assert load_tokenizer(config.data).encode("a b") == load_tokenizer(
        load_config(trained / "config.yaml").data
    ).encode("a b")


def test_paths_relative_to_a_folder_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold where the run was moved together with them, where it alone was, and from other folders."""
    project = tmp_path / "project"
    for name in ("data/train.jsonl", "corpus/c-00000.idx", "runs/a/huggingface/tokenizer.json", "x/y"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    tree = {
        "data": {"train": {"corpus/c": 1.0, "org/set": 2.0}, "validation": "data/train.jsonl"},
        "model": {"init_from": str(project / "x")},
        "checkpoint": {"directory": "runs/a"},
    }
    tree["data"]["tokenizer"] = "runs/a/huggingface/tokenizer.json"
    monkeypatch.chdir(project)
    written = to_run(tree, Path("runs/a"))
    assert written == {
        "data": {
            "train": {"$RUN/../../corpus/c": 1.0, "org/set": 2.0},
            "validation": "$RUN/../../data/train.jsonl",
            "tokenizer": "$RUN/huggingface/tokenizer.json",
        },
        "model": {"init_from": str(project / "x")},  # absolute: where it says
        "checkpoint": {"directory": "$RUN"},
    }
    assert from_run(written, Path("runs/a")) == tree
    (project / "runs" / "a").rename(project / "b")  # alone
    alone = from_run(written, Path("b"))
    assert alone["data"] == {**tree["data"], "tokenizer": "b/huggingface/tokenizer.json"}
    (project / "b").rename(project / "runs" / "a")
    project = project.rename(tmp_path / "elsewhere")  # together
    monkeypatch.chdir(tmp_path)
    assert from_run(written, Path("elsewhere/runs/a"))["data"] == {
        "train": {"elsewhere/corpus/c": 1.0, "org/set": 2.0},
        "validation": "elsewhere/data/train.jsonl",
        "tokenizer": "elsewhere/runs/a/huggingface/tokenizer.json",
    }
