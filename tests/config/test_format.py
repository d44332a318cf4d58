"""The format of config.yaml: what is written, what earlier code wrote, and keys by their earlier names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config, load_config
from tests.small import small_config

FORMAT_1 = Path(__file__).parent.parent / "checkpoint" / "format_1" / "run"


def test_a_run_in_format_1_is_read() -> None:
    config = load_config(FORMAT_1 / "config.yaml", ["optimizer.lr=0.5"])
    assert config.objective.name == "masked"
    assert (config.diffusion.t_sampler, config.diffusion.views, config.diffusion.strata) == ("ppots", 2, "full")
    assert Path(config.checkpoint.directory) == FORMAT_1
    assert config.optimizer.lr == 0.5


def test_what_is_written_says_its_format(tmp_path: Path) -> None:
    """And reads back the same, as a run's and as a user's file."""
    config = small_config(tmp_path, objective={"name": "autoregressive"})
    for folder in (None, tmp_path):
        text = dump_config(config, folder)
        assert text.startswith("format: 2\n")
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        assert load_config(tmp_path / "config.yaml").objective.name == "autoregressive"


@pytest.mark.parametrize(
    ("found", "message"),
    [("3", "'format' 3 was written by a later megatron-mdm"), ("a", "'format' 'a' is no version")],
)
def test_another_format_is_refused(found: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = dump_config(small_config(tmp_path), tmp_path)
    path.write_text(text.replace("format: 2", f"format: {found}"), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}, line 1: {message}")


@pytest.mark.parametrize(
    ("old", "new"), [("diffusion.method", "objective.name"), ("diffusion.sampler", "diffusion.t_sampler")]
)
def test_earlier_names_are_told(old: str, new: str, tmp_path: Path) -> None:
    """In what a user writes: a file, or an override."""
    (tmp_path / "base.yaml").write_text(dump_config(small_config(tmp_path)), encoding="utf-8")
    path = tmp_path / "mine.yaml"
    section, key = old.split(".")
    path.write_text(f"defaults: [base.yaml]\n{section}:\n  {key}: uniform\n", encoding="utf-8")
    for arguments, where in (
        ((path,), f"{path}, line 3"),
        ((tmp_path / "base.yaml", [f"{old}=x"]), f"override '{old}=x'"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(*arguments)
        assert str(caught.value) == f"{where}: '{old}' is now '{new}'"
