"""What launchers leave in the environment, where nodes and ranks meet, and who says what when they do not."""

from __future__ import annotations

import os
import socket
import time

import pytest
from torch.distributed.run import get_args_parser

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel import environment
from megatron_mdm.parallel.groups import rank_from_environment, world_size_from_environment
from megatron_mdm.parallel.platform import ranks_on_host
from megatron_mdm.parallel.rendezvous import meeting, meeting_point
from tests.ranks import run_program_ranks, run_ranks

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
NOWHERE = "no-such-host.invalid"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WHOLE, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_SECONDS_TO_RESOLVE", 0.2)


def test_empty_variables_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WHOLE, "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    environment.check_rank()
    environment.check_alone()
    assert (rank_from_environment(), world_size_from_environment(), ranks_on_host()) == (0, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": ""}, "RANK is set, but WORLD_SIZE not"),
        ({"MASTER_ADDR": " ", "LOCAL_RANK": ""}, "RANK is set, but LOCAL_RANK and MASTER_ADDR not"),
        ({"WORLD_SIZE": "two"}, "the variable WORLD_SIZE is 'two', not a number"),
        ({"RANK": "-1"}, "the variable RANK is '-1', not a number"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE 2"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; a port is between 1 and 65535"),
        ({"MASTER_ADDR": NOWHERE}, f"MASTER_ADDR is '{NOWHERE}', which has no address on {socket.gethostname()}"),
        ({"MASTER_ADDR": "a" * 70}, "which has no address on"),
        ({"MASTER_ADDR": "a..b"}, "which has no address on"),
    ],
)
def test_what_is_amiss_is_named(changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**WHOLE, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        environment.check_rank()
    assert message in str(caught.value)


def test_whole_variables_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    environment.check_rank()


def test_one_of_several_needs_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="WORLD_SIZE is 8, but RANK is not set"):
        environment.check_alone()


def test_a_name_service_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a resolver's server is out of reach: one look-up takes minutes."""
    assert 0.2 + environment._SECONDS_TO_ANSWER < 30
    monkeypatch.setattr(environment, "_SECONDS_TO_ANSWER", 0.2)
    monkeypatch.setattr(environment, "_look_up", lambda host, reasons: time.sleep(5))
    with pytest.raises(UserError, match="the name service does not answer"):
        environment.check_host("anywhere")


def test_on_one_node_any_free_port_is_taken() -> None:
    first, second = (get_args_parser().parse_args(["--nproc-per-node", "2", "x.py"]) for _ in range(2))
    with meeting(first), meeting(second):
        assert meeting_point(first) == meeting_point(second) == ("127.0.0.1", 0)  # 0: the system finds one
    assert first.rdzv_id != second.rdzv_id
    named = get_args_parser().parse_args(["--nproc-per-node", "2", "--master-port", "29511", "x.py"])
    with meeting(named):
        assert meeting_point(named) == ("127.0.0.1", 29511)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes", "2", "--rdzv-endpoint", f"{NOWHERE}:29400"], f"MASTER_ADDR is '{NOWHERE}', which has no address"),
        (["--rdzv-endpoint", f"{NOWHERE}:29400"], f"MASTER_ADDR is '{NOWHERE}'"),
        (["--rdzv-endpoint", "127.0.0.1:port"], "'127.0.0.1:port' is no MASTER_ADDR:MASTER_PORT"),
        (["--nnodes", "two"], r"NODES \(--nnodes\) is 'two', not a number"),
    ],
)
def test_a_meeting_point_that_cannot_be(options: list[str], message: str) -> None:
    arguments = get_args_parser().parse_args(["--rdzv-backend", "c10d", *options, "x.py"])
    with pytest.raises(UserError, match=message), meeting(arguments):
        pass


def waits_for_another(port: int) -> tuple[str, str]:
    """On a rank that is alone, or whose port is taken: (what it says, why it gives up)."""
    import io
    from contextlib import redirect_stderr

    from megatron_mdm.parallel import groups

    groups._SECONDS_TO_SPEAK = 0.3
    os.environ["WORLD_SIZE"] = "2"
    if port:
        os.environ["MASTER_PORT"] = str(port)
    with redirect_stderr(io.StringIO()) as said, pytest.raises(groups.JoinError) as caught:
        groups.join_job(timeout_minutes=0.02)
    return said.getvalue(), str(caught.value)


def test_ranks_that_never_come_are_waited_for_aloud() -> None:
    ((said, reason),) = run_ranks(waits_for_another, 1, 0)
    host = socket.gethostname()
    assert said.startswith(
        f"warning: rank 0 on {host} waits for others of 2 ranks (WORLD_SIZE); somebody answers at 127"
    )
    assert f"rank 0 on {host} has not found the other ranks at 127.0.0.1:" in reason
    assert "(MASTER_ADDR, MASTER_PORT)" in reason


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as occupant:
        occupant.bind(("", 0))
        occupant.listen()
        port = occupant.getsockname()[1]
        ((_, reason),) = run_ranks(waits_for_another, 1, port)
    assert reason == f"port {port} is taken on {socket.gethostname()}; set MASTER_PORT to a free one"


def test_a_program_names_it_before_anything_else(tmp_path) -> None:
    """Also where RANK itself is what is wrong."""
    for name, value in (("WORLD_SIZE", ""), ("RANK", "first")):
        wrapper = tmp_path / "wrapper.py"
        run = "import runpy; runpy.run_path('launch/train.py', run_name='__main__')"
        wrapper.write_text(f"import os; os.environ['{name}'] = '{value}'; {run}", encoding="utf-8")
        (result,) = run_program_ranks(str(wrapper), ["--config", "absent.yaml"])
        assert result.exit_code == 1
        assert name in result.stderr
        assert result.stderr.count("\n") == 1
