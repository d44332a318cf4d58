"""What `bash launch/test.sh quick` runs."""

from __future__ import annotations

from pathlib import Path

from tests.test_architecture import ROWS

FOLDER = Path(__file__).parent
WITHOUT_FOLDER = {"batch"}  # a module, which the tests of diffusion and models are about


def test_the_quick_tier_touches_every_package() -> None:
    lines = (FOLDER / "quick.txt").read_text(encoding="utf-8").splitlines()
    paths = [Path(line.split("::")[0]) for line in lines if line.startswith("tests/")]
    assert all((FOLDER.parent / path).is_file() for path in paths), paths
    touched = {path.parts[1] for path in paths if len(path.parts) > 2}
    assert set().union(*ROWS) - WITHOUT_FOLDER <= touched
    assert {"launch", "tools"} <= touched
