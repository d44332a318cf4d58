"""Damage a run's checkpoints at random and see that nobody loads them: python -m tests.corruption RUN [--cases 100]

RUN is a run's folder with at least two checkpoints; the damage is done to a copy. Exit code 1 where damage is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from megatron_mdm.checkpoint.store import search, steps


class Outcome(NamedTuple):
    damage: str  # what was done, to which file
    found: str  # name of the checkpoint that would be loaded; empty: none
    message: str


def damage(path: Path, generator: random.Random) -> str:
    """Cut a file short or flip one of its bits."""
    content = bytearray(path.read_bytes())
    if generator.random() < 0.5:
        length = generator.randrange(len(content))
        path.write_bytes(content[:length])
        return f"{path.name} cut to {length} of {len(content)} bytes"
    place = generator.randrange(len(content))
    bit = generator.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.name} flipped"


def corrupt(checkpoints: Path, cases: int, seed: int) -> list[Outcome]:
    """Each case damages one file of the newest checkpoint of a fresh copy; every file gets its turn."""
    generator = random.Random(seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "checkpoints")
        shutil.copytree(checkpoints, copy)
        newest = steps(copy)[-1]
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        for case in range(cases):
            path = files[case % len(files)]
            intact = path.read_bytes()
            what = damage(path, generator)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                name, _ = search(copy)
            outcomes.append(Outcome(what, name, said.getvalue()))
            path.write_bytes(intact)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    checkpoints = arguments.run / "checkpoints"
    *_, before, newest = steps(checkpoints)
    outcomes = corrupt(checkpoints, arguments.cases, arguments.seed)
    missed = [outcome for outcome in outcomes if outcome.found != before.name]
    for outcome in missed:
        print(f"missed: {outcome.damage}: {outcome.found or 'nothing'} would be loaded")
    print(f"{newest}: {len(outcomes) - len(missed)} of {len(outcomes)} damages detected, {before.name} taken instead")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
