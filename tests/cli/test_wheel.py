"""Programs work from a wheel, in an environment and a folder that know nothing of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("megatron_mdm", "configs", "setup.py", "README.md", "LICENSE")


def run(*command: str | Path, folder: Path) -> str:
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(word) for word in command], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment: the wheel, and, behind it, the packages that are installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build writes into its sources
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, folder=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "environment", folder=folder)
    programs = folder / "environment/bin"
    run(*pip, "--python", programs / "python", "install", "--no-deps", "--no-index", wheel, folder=folder)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(programs / "python", "-c", code, folder=folder).strip())
    # What a .pth file names comes last; .pth files there, such as those of an editable installation, do not count.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return programs


def test_the_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    code = "import megatron_mdm, os; print(*sorted(os.listdir(os.path.dirname(megatron_mdm.__file__))))"
    found = run(installed / "python", "-c", code, folder=tmp_path).split()
    assert {"configs", "py.typed", "cli"} <= set(found)
    where = run(installed / "python", "-c", "import megatron_mdm; print(megatron_mdm.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_a_dry_run_on_two_ranks(installed: Path, tmp_path: Path) -> None:
    """Of the packaged quickstart, whose data are not there."""
    command = ["train", "--nproc", "2", "--config", "quickstart", "--dry-run"]
    output = run(installed / "mdm", *command, folder=tmp_path)
    lines = output.splitlines()
    assert [line.split(":")[0] for line in lines] == ["layout", "model", "batch", "method", "not there yet"], output
    assert "data 2" in lines[0]
    assert "16 × 2 ranks × 1 micro-batches" in lines[2]
    assert lines[-1].startswith("not there yet: runs/quickstart_data/tokenizer.model, runs/quickstart_data/train.jsonl")


def test_a_plan(installed: Path, tmp_path: Path) -> None:
    output = run(installed / "mdm", "plan", "--config", "pretrain/8b", "--nodes", "4", folder=tmp_path)
    assert "= 32 ranks" in output
