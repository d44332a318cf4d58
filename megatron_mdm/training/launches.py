"""Which launch has begun the run in a folder: whether another try of it resumes, or starts as it was told to.

A launcher that tries again starts the ranks with the arguments of the first try, `--overwrite` among them. A try that
has begun the run has emptied its folder and left the launch's id in it. The next try finds that and resumes the run;
where the first failed before, it finds none, and does what the arguments say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_mdm.config.files import write_json
from megatron_mdm.parallel import environment

LAUNCH = "launch.json"  # ids of the launch: of each node, where each was started by itself


def launch_id() -> str:
    """An id that all tries of a launch share; empty where nobody tries again."""
    return environment.variable(environment.LAUNCH_ID)


def has_begun(folder: Path) -> bool:
    """Whether an earlier try of this launch has begun the run in this folder."""
    try:
        return bool(launch_id()) and launch_id() in json.loads((folder / LAUNCH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def note_begin(folder: Path, launches: Iterable[object]) -> None:
    """Leave the launch's ids in the folder. launches: those that all ranks have."""
    write_json(folder / LAUNCH, sorted({str(launch) for launch in launches if launch}))
