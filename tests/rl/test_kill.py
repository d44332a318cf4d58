"""A run that ends at any instant of a rollout and is resumed equals the run that did not, bit for bit.

Here it ends by an error that nothing catches, in one process, which leaves behind what a kill would;
`python -m tests.kill --layouts rl` kills ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kill import last_manifest
from tests.ranks import run_ranks
from tests.rl.small import rl_config
from tests.training.test_resume import losses

STEPS = 5  # two on each rollout
SAVE_EVERY = 3  # between the second rollout's two

INSTANTS = {  # name: (class, method, its call in which the run ends, the step that it resumes from)
    "rollout": ("rl.completions", "Completions", "_responses", 3, 3),
    "reward": ("rl.judge", "Judge", "_scores", 3, 3),
    "old values": ("rl.source", "RolloutSource", "_measured", 3, 3),
    "between updates": ("engine.zero", "ZeroEngine", "train_batch", 4, 3),
    "save": ("checkpoint.store", "CheckpointStore", "_complete", 1, 0),
}


class Ended(BaseException):
    """In place of a kill."""


def config_of(folder: Path, name: str) -> Any:
    return rl_config(
        folder,
        {"prompts_per_rollout": 2, "beta": 0.0},
        schedule={"steps": STEPS},
        checkpoint={"directory": str(folder / name), "save_every": SAVE_EVERY, "asynchronous": False},
    )


@contextmanager
def ending(module: str, owner: str, method: str, call: int) -> Iterator[None]:
    """Inside, the call of a method raises Ended."""
    from importlib import import_module

    kind = getattr(import_module(f"megatron_mdm.{module}"), owner)
    unchanged = getattr(kind, method)
    calls = 0

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Ended
        return unchanged(self, *arguments, **named)

    setattr(kind, method, counted)
    try:
        yield
    finally:
        setattr(kind, method, unchanged)


def all_runs(folder: Path) -> list[str]:
    """On one rank: the undisturbed run, then each one that ends, and its resumption. Returns which did end."""
    from megatron_mdm.rl.run import REINFORCED
    from tests.rl.runs import run_of

    run_of(config_of(folder, "whole"), REINFORCED)
    ended = []
    for name, (module, owner, method, call, _) in INSTANTS.items():
        config = config_of(folder, name)
        try:
            with ending(module, owner, method, call):
                run_of(config, REINFORCED)
        except Ended:
            ended.append(name)
        (folder / f"{name}.txt").write_text(
            str(sorted(path.name for path in (folder / name).glob("checkpoints/step-*")))
        )
        run_of(config, REINFORCED, resume=True)
    return ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    assert run_ranks(all_runs, 1, folder) == [list(INSTANTS)]
    return folder


@pytest.mark.parametrize("name", INSTANTS)
def test_resumed_bit_for_bit(name: str, folder: Path) -> None:
    *_, step = INSTANTS[name]
    assert (folder / f"{name}.txt").read_text() == str([f"step-{step:08d}"] if step else [])
    assert losses(folder / name) == losses(folder / "whole")
    assert last_manifest(folder / name) == last_manifest(folder / "whole")
    samples = [(folder / run / "rollouts/samples.jsonl").read_text() for run in (name, "whole")]
    assert samples[0] == samples[1]


def test_a_checkpoint_within_a_rollout_holds_it_and_checks_it(folder: Path) -> None:
    from megatron_mdm.checkpoint.manifest import find_fault
    from megatron_mdm.checkpoint.store import read_arrays
    from megatron_mdm.rl.rollouts import Rollout

    checkpoint = folder / f"whole/checkpoints/step-{SAVE_EVERY:08d}"
    rollout = Rollout.of(read_arrays(checkpoint))
    assert int(rollout.number) == 1
    assert rollout.old.any()
    assert find_fault(checkpoint) is None
    path = checkpoint / "source.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert find_fault(checkpoint) == "source.npz does not match its checksum"
