"""Variables that libraries read when they are loaded: every rank has them, whatever has started it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_mdm.parallel.defaults import DEFAULTS, set_defaults


def defaults(**variables: str) -> dict[str, str]:
    set_defaults(variables)
    return variables


def test_what_is_not_set_is_set() -> None:
    found = defaults(NCCL_DEBUG="")
    assert found == {**DEFAULTS, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert defaults(RANK="0")["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("name", "value"), [("NCCL_DEBUG", "INFO"), ("OMP_NUM_THREADS", "4"), ("PYTORCH_ALLOC_CONF", "backend:native")]
)
def test_what_the_user_has_set_wins(name: str, value: str) -> None:
    assert defaults(RANK="0", **{name: value})[name] == value
    assert "PYTORCH_ALLOC_CONF" not in defaults(PYTORCH_CUDA_ALLOC_CONF="backend:native")  # its older name


def test_the_interface_is_named_to_both_libraries() -> None:
    found = defaults(INTERFACE="eth1", GLOO_SOCKET_IFNAME="eth0")
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("eth1", "eth0")


def test_a_program_sets_them_before_torch_is_imported() -> None:
    said = "import os, sys, megatron_mdm.cli; print('torch' in sys.modules, os.environ['CUDA_DEVICE_MAX_CONNECTIONS'])"
    variables = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    result = subprocess.run([sys.executable, "-c", said], env=variables, capture_output=True, text=True, check=True)
    assert result.stdout == "False 1\n"
