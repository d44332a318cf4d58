"""A small study on token ids that tests share: two methods, two seeds, one task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megatron_mdm.config.load import dump_config
from tests.small import small_config, write_ids


def write_study(folder: Path, name: str, **changes: Any) -> Path:
    """The study's YAML file; its folder is `name` beside it."""
    write_ids(folder / "train.jsonl", 24)
    write_ids(folder / "test.jsonl", 6, seed=1)
    config = small_config(
        folder,
        data={"validation_fraction": 0.2},
        evaluation={"every": 2, "num_samples": 4},
        schedule={"steps": 6},
        checkpoint={"directory": str(folder / "run"), "save_every": 2},
        logging={"every": 1, "tensorboard": False, "profile_every": 0},
    )
    (folder / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    settings = {
        "folder": str(folder / name),
        "config": str(folder / "run.yaml"),
        "seeds": [1, 2],
        "tasks": {
            "ids": {
                "bases": {"first": ""},
                "measure": "perplexity",
                "test": str(folder / "test.jsonl"),
                "settings": ["num_times=2", "num_repeats=2"],
                "score": "nats_per_token",
                "scale": 1.0,
            }
        },
        "methods": {"standard": {}, "mirror": {}},
        "parts": [{"name": "first", "methods": ["standard", "mirror"]}],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def reached(folder: Path) -> list[dict[str, Any]]:
    """What study.json says of every run, but for what the clock says."""
    runs = json.loads((folder / "study.json").read_text(encoding="utf-8"))["runs"]
    return [{key: value for key, value in run.items() if key != "seconds"} for run in runs]
