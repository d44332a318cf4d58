"""The launch scripts: shellcheck, DeepSpeed's launcher, and Slurm's script with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_mdm.config.load import dump_config
from tests.ranks import _free_port, run_program_ranks
from tests.small import small_config, write_ids
from tests.training.test_resume import losses

SCRIPTS = [*sorted(Path("launch").glob("*.sh")), Path("launch/slurm.sbatch"), Path(".ci/run")]
# Two tasks on this machine as two nodes; signals go on to both, as Slurm's own srun passes them on.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=("$!"); done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    wait "$task"; while kill -0 "$task" 2>/dev/null; do wait "$task"; done; wait "$task" || code=$?
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.2\\n'; else echo "$@" >>"$CALLS"; fi
"""
STEPS = 60


def write_config(folder: Path) -> Path:
    write_ids(folder / "train.jsonl", 30)
    config = small_config(folder, schedule={"steps": STEPS}, parallel={"zero": 1}, checkpoint={"save_every": 0})
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_program_ranks("launch/train.py", ["--config", str(write_config(folder))], 2)[0]
    assert result.exit_code == 0, result.stderr
    return folder / "run"


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.getcwd(), "MASTER_PORT": str(_free_port()), **more}


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_shellcheck(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_deepspeed_launcher(undisturbed: Path, tmp_path: Path) -> None:
    command = ["bash", "launch/deepspeed.sh", "--config", str(write_config(tmp_path))]
    variables = environment(RANKS_PER_NODE="2")
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_slurm_saves_before_the_time_limit_and_goes_on_when_queued_again(undisturbed: Path, tmp_path: Path) -> None:
    config, programs, calls = write_config(tmp_path), tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    variables = environment(
        PATH=f"{programs}:{os.environ['PATH']}",
        CALLS=str(calls),
        SLURM_JOB_ID="17",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_SUBMIT_DIR=os.getcwd(),
        RANKS_PER_NODE="1",
    )
    command = ["bash", "launch/slurm.sbatch", "--config", str(config)]
    metrics = tmp_path / "run/metrics.jsonl"
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        while job.poll() is None and not (metrics.exists() and '"step": 3,' in metrics.read_text(encoding="utf-8")):
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@300 has Slurm do
        output, _ = job.communicate(timeout=100)
    assert job.returncode == 0, output
    assert calls.read_text() == "requeue 17\n"
    (saved,) = os.listdir(tmp_path / "run/checkpoints")
    assert int(saved.removeprefix("step-")) < STEPS, "stopped too late to show anything"

    variables["SLURM_RESTART_COUNT"] = "1"
    again = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from" in again.stdout
    assert calls.read_text() == "requeue 17\n"
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_slurm_is_told_to_signal_the_script_and_to_queue_again() -> None:
    options = re.findall(r"^#SBATCH (--\S+)", Path("launch/slurm.sbatch").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"--signal=B:USR1@300", "--requeue", "--ntasks-per-node=1"} <= set(options)
