"""The command `mdm`: what it lists and takes, and configurations by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_mdm.cli.configs import absent_inputs, config_path, names
from megatron_mdm.cli.main import PROGRAMS
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from tests.ranks import ProgramResult, run_program_ranks

ROOT = Path(__file__).parents[2]


def mdm(*arguments: str) -> ProgramResult:
    return run_program_ranks(str(ROOT / "megatron_mdm/cli/__main__.py"), list(arguments))[0]


def test_help_lists_every_program_in_a_line() -> None:
    result = mdm("--help")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name in PROGRAMS:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
        assert (ROOT / f"megatron_mdm/cli/{name}.py").is_file()
    assert mdm().stdout == result.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_describes_its_arguments(name: str) -> None:
    result = mdm(name, "--help")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"usage: mdm {name} ")


def test_an_unknown_program_is_a_line() -> None:
    result = mdm("trian")
    assert result.exit_code == 2
    assert result.stderr == "error: mdm has no program 'trian'; did you mean train? (mdm --help lists them)\n"


def test_a_wrong_number_of_ranks_is_a_line() -> None:
    result = mdm("train", "--nproc", "two", "--config", "quickstart")
    assert result.exit_code == 2
    assert "argument --nproc: 'two' is not a positive number" in result.stderr


def test_plan_takes_a_configuration_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = mdm("plan", "--config", "pretrain/8b", "--cluster", "h100-80gb", "--nodes", "4")
    assert result.exit_code == 0, result.stderr
    assert "= 32 ranks" in result.stdout


def test_configurations_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = ROOT / "configs/quickstart.yaml"
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml", "configs/quickstart"):
        assert config_path(name) == packaged
    assert {"quickstart", "pretrain/8b"} <= set(names())
    assert all(config_path(name).is_file() for name in names())
    with pytest.raises(UserError, match=r"quikstart: no such configuration file, nor is .* packaged \(.*quickstart"):
        config_path("quikstart")
    (tmp_path / "quickstart").write_text("", encoding="utf-8")
    assert config_path("quickstart") == Path("quickstart")  # a file wins


def test_files_of_a_packaged_configuration_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named; of a user's own configuration an absent file stays a mistake."""
    monkeypatch.chdir(tmp_path)
    path = config_path("quickstart")
    config = load_config(path)
    assert absent_inputs(config, path) == [config.data.tokenizer, config.data.train, config.data.validation]
    os.makedirs("runs/quickstart_data")
    Path(config.data.tokenizer).touch()
    Path(config.data.train + ".bin").touch()
    assert absent_inputs(config, path) == [config.data.validation]
    assert absent_inputs(config, tmp_path / "mine.yaml") == []
