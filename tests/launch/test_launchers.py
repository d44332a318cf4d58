"""The launch scripts: shellcheck, DeepSpeed's launcher, and Slurm's script with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from megatron_mdm.config.load import dump_config, load_config
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


def test_overwrite_holds_until_the_run_has_begun(tmp_path: Path) -> None:
    """Another job has the port at first; then the run of the day before is replaced, not finished."""
    arguments = ["--config", str(write_config(tmp_path)), "schedule.steps=2"]
    assert run_program_ranks("launch/train.py", [*arguments, "optimizer.lr=1e-5"])[0].exit_code == 0
    with socket.socket() as occupant:
        occupant.bind(("", 0))
        occupant.listen()
        port = str(occupant.getsockname()[1])
        variables = environment(RANKS_PER_NODE="1", MASTER_PORT=port, RESTART_SECONDS="0")
        command = ["bash", "launch/torchrun.sh", *arguments, "--overwrite"]
        with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
            assert job.stderr is not None
            said = next(line for line in job.stderr if line.startswith("error"))
            occupant.close()
            output, later = job.communicate(timeout=200)
    assert said == f"error: port {port} is taken on {socket.gethostname()}; set MASTER_PORT to a free one\n"
    assert job.returncode == 0, later
    assert "trying again (2 more times)" in later
    assert "resumed from" not in output
    assert load_config(tmp_path / "run/config.yaml").optimizer.lr == 3e-3


def test_another_try_goes_on_with_what_its_launch_has_begun(tmp_path: Path) -> None:
    """With the arguments of the first try, `--overwrite` among them; also where one of two nodes is restarted."""
    arguments = ["--config", str(write_config(tmp_path)), "schedule.steps=2", "--overwrite"]
    for launches, goes_on in ((["a", "b"], False), (["c", "b"], True), (["d", "e"], False)):
        wrapper = tmp_path / "wrapper.py"
        choice = f"import os; os.environ['MDM_LAUNCH_ID'] = {launches}[int(os.environ['RANK'])]"
        wrapper.write_text(f"{choice}\nimport runpy; runpy.run_path('launch/train.py', run_name='__main__')")
        result = run_program_ranks(str(wrapper), arguments, 2)[0]
        assert result.exit_code == 0, result.stderr
        assert ("resumed from" in result.stdout) == goes_on
        assert [record["step"] for record in losses(tmp_path / "run")] == [1, 2]


def test_gpus_are_counted_by_torchs_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks that a script starts, by CUDA_VISIBLE_DEVICES, on 4 GPUs of which the last is cut in two instances."""
    uuids = ["GPU-ab1", "GPU-ab2", "GPU-c3", "GPU-d4"]
    lines = [f"GPU {index}: H100 80GB (UUID: {uuid})" for index, uuid in enumerate(uuids)]
    lines += [f"  MIG 1g.10gb     Device  {index}: (UUID: MIG-{index})" for index in range(2)]
    write_programs(tmp_path, **{"nvidia-smi": "\n".join(["cat <<'X'", *lines, "X"])})
    # fmt: off
    values = [
        "0", "3", "4", "2,3", "1, 0", "", " ", "-1", "0,-1,1", "1,1", "0,9,1", "0,1,9,0", "2gpu,3x", "010", "+2", "x",
        "0,x,1", "GPU-c3", "GPU-d,GPU-c3", "GPU-ab", "GPU-", "GPU-ab1,GPU-ab", "GPU-c3,GPU-c3", "GPU-c3,GPU-c",
        "GPU-c3,0", "0,GPU-c3",
    ]
    # fmt: on
    expected = []
    for value in values:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        named = torch.cuda._parse_visible_devices()
        if named and isinstance(named[0], str):
            named = torch.cuda._transform_uuid_to_ordinals(named, uuids)
        expected.append(next((number for number, index in enumerate(named) if index >= len(uuids)), len(named)) or 1)
    script = "source launch/environment.sh; unset CUDA_VISIBLE_DEVICES; count_devices\n"
    script += 'for CUDA_VISIBLE_DEVICES in "$@" MIG-1,MIG-0; do count_devices; done'
    variables = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    counted = subprocess.run(
        ["bash", "-uc", script, "bash", *values], env=variables, capture_output=True, text=True, check=True
    )
    assert [int(line) for line in counted.stdout.split()] == [4, *expected, 1]
    assert counted.stderr == ""


@pytest.mark.parametrize(
    ("variables", "placed"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "--include localhost:2,3"),
        ({"CUDA_VISIBLE_DEVICES": "3,1,0", "RANKS_PER_NODE": "2"}, "--include localhost:3,1"),
        ({"CUDA_VISIBLE_DEVICES": "0", "RANKS_PER_NODE": "2"}, "error: 2 ranks on 1 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1"}, "error: 1 ranks on 1 GPUs (CUDA_VISIBLE_DEVICES=MIG-1)"),
        ({"CUDA_VISIBLE_DEVICES": "", "RANKS_PER_NODE": "2"}, "--num_gpus 2"),
        ({"CUDA_VISIBLE_DEVICES": "1", "HOSTFILE": "hosts"}, "--hostfile hosts --master_port 29400"),
    ],
)
def test_deepspeeds_launcher_is_told_which_gpus(variables: dict[str, str], placed: str, tmp_path: Path) -> None:
    """It numbers them from 0 by itself, whatever CUDA_VISIBLE_DEVICES says. With a stand-in for it, and for 4 GPUs."""
    write_programs(tmp_path, **{"deepspeed": 'echo "$@"', "nvidia-smi": "for n in 0 1 2 3; do echo GPU $n: A100; done"})
    known = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", **variables)
    del known["MASTER_PORT"]
    result = subprocess.run(
        ["bash", "launch/deepspeed.sh", "--config", "a"], env=known, capture_output=True, text=True, check=False
    )
    assert placed in result.stdout + result.stderr
    assert (result.returncode == 1) == placed.startswith("error")
    assert re.search(r"--master_port [1-9]\d+ ", result.stdout) or placed.startswith("error")


def test_deepspeeds_launcher_passes_on_what_the_user_has_set(tmp_path: Path) -> None:
    """To the other nodes it gives what a file names, and little else."""
    write_programs(tmp_path, deepspeed='cat "$DS_ENV_FILE"')
    set_by_user = {"INTERFACE": "eth1", "OMP_NUM_THREADS": "3", "PYTORCH_ALLOC_CONF": "backend:native"}
    known = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", HOSTFILE="hosts", HOME=str(tmp_path), **set_by_user)
    (tmp_path / ".deepspeed_env").write_text("MINE=1", encoding="utf-8")
    result = subprocess.run(["bash", "launch/deepspeed.sh"], env=known, capture_output=True, text=True, check=True)
    assert {"MINE=1", *(f"{name}={value}" for name, value in set_by_user.items())} <= set(result.stdout.splitlines())
    assert "CUDA_VISIBLE_DEVICES" not in result.stdout


@pytest.mark.parametrize(("code", "queued"), [(143, True), (1, False)])
def test_slurm_queues_again_what_another_start_may_cure(code: int, queued: bool, tmp_path: Path) -> None:
    """1: a mistake. Every start of the job has the same id and the same arguments."""
    srun = (
        f'echo "$MDM_LAUNCH_ID: ${{*: -2}} $2"; trap "exit {code}" USR1; sleep 0.3; kill -USR1 $PPID; sleep 0.3; exit 9'
    )
    write_programs(tmp_path, srun=srun, scontrol=SCONTROL)
    variables = environment(
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        CALLS=str(tmp_path / "calls"),
        SLURM_JOB_ID="17",
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="node0",
        SLURM_RESTART_COUNT="1",
        SLURM_CPUS_ON_NODE="96",
        SLURM_SUBMIT_DIR=os.getcwd(),
    )
    command = ["bash", "launch/slurm.sbatch", "--config", "a", "seed=1", "--overwrite"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code
    assert result.stdout.startswith("slurm-cluster-17: seed=1 --overwrite --cpus-per-task=96\n")
    assert (tmp_path / "calls").exists() == queued


def test_what_pip_says_is_shown_where_it_fails(tmp_path: Path) -> None:
    """pip's words in an installation into a .venv that is there."""
    (tmp_path / "launch").mkdir()
    shutil.copy("launch/environment.sh", tmp_path / "launch")
    (tmp_path / "setup.py").touch()
    pip = "echo WARNING: a; echo b >&2; exit $CODE"
    write_programs(tmp_path / ".venv/bin", python="", activate="PATH=$PWD/.venv/bin:$PATH", pip=pip)
    script = "source launch/environment.sh; prepare_environment '' && echo ready"
    for code, said in (("1", "WARNING: a\nb\n"), ("0", "")):
        variables = {**os.environ, "CODE": code}
        result = subprocess.run(
            ["bash", "-uc", script], env=variables, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.stdout == ("" if said else "ready\n")
        assert result.stderr == f"installing megatron-mdm and what it needs (about a minute)\n{said}"


def write_programs(folder: Path, **texts: str) -> None:
    """Stand-ins, as scripts of bash."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(
            text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8"
        )
        (folder / name).chmod(0o755)


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
    config = write_config(tmp_path)
    programs = tmp_path / "bin"
    calls = tmp_path / "calls"
    write_programs(programs, srun=SRUN, scontrol=SCONTROL)
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
    assert {"--signal=B:USR1@300", "--requeue", "--ntasks-per-node=1", "--exclusive"} <= set(options)
