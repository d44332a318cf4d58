"""YAML composition, overrides, round trips, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config, load_config, load_section
from megatron_mdm.config.validate import validate
from megatron_mdm.generation.settings import GenerationConfig
from tests.small import small_config

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_round_trip(tmp_path: Path) -> None:
    config = small_config(tmp_path, diffusion={"sampler": "ppots", "strata": 4, "views": 2})
    path = tmp_path / "a.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_defaults_compose_and_the_file_wins(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(dump_config(small_config(tmp_path)), encoding="utf-8")
    (tmp_path / "method.yaml").write_text("diffusion: {views: 2}\noptimizer: {lr: 0.5}\n", encoding="utf-8")
    top = tmp_path / "top.yaml"
    top.write_text("defaults: [base.yaml, method.yaml]\noptimizer: {lr: 0.25}\n", encoding="utf-8")
    config = load_config(top, ["optimizer.eps=1e-6", "optimizer.betas=[0.8, 0.9]", "seed=7"])
    assert (config.diffusion.views, config.optimizer.lr, config.optimizer.eps) == (2, 0.25, 1e-6)
    assert (config.optimizer.betas, config.seed) == ((0.8, 0.9), 7)
    assert config.optimizer.weight_decay == 0.1


def test_configuration_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        small_config(tmp_path).optimizer.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [a.yaml]", "includes itself"),
        ("defaults: a.yaml", "must be a list"),
        ("defaults: [missing.yaml]", "no such configuration file"),
        ("- 1", "expected a mapping"),
        ("optimiser: {lr: 1}", "did you mean 'optimizer'"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "write it as"),
        ("optimizer.lr=[1", "not YAML"),
        ("seed.x=1", "is a value, not a section"),
        ("optimizer.lr=-1", "greater than 0"),
        ("diffusion.sampler=ppot", "'uniform', 'ppots' or 'clipped'"),
        ("diffusion.strata=1", "at least 2 strata"),
        ("schedule.epochs=1", "exactly one of steps and epochs"),
        ("diffusion.calibration.target=paper", "only estimator 'naive'"),
        ("model.vocab_size=-3", "must be positive"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump_config(small_config(tmp_path)), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_heads=5", "not a multiple of 'model.num_heads' 5"),
        ("model.num_kv_heads=3", "not a multiple of 'model.num_kv_heads' 3"),
        ("parallel.tensor=8", "does not divide the 4 ranks"),
        ("data.max_length=100", "exceeds 'model.max_sequence_length' 64"),
        ("model.vocab_size=tokenizer", "'model.vocab_size' must be a number"),
        ("data.mask_token=<mask>", "'data.mask_token' must be a token id"),
        ("evaluation.every=5", "neither 'data.validation'"),
        ("evaluation.patience=2", "needs 'evaluation.every'"),
        ("checkpoint.keep_best=true", "set 'evaluation.every'"),
        ("diffusion.strata=9", "exceeds 'batch.global_size' 8"),
        ("deepspeed={zero_optimization: {stage: 3}}", "'deepspeed.zero_optimization.stage' is set by the section"),
        ("parallel={pipeline: 2, zero: 3}", "cannot be combined with 'parallel.pipeline' 2"),
        ("parallel={pipeline: 4}", "exceeds the 2 'model.num_layers'"),
        ("parallel.sequence=true", "needs 'parallel.tensor' > 1"),
        ("parallel={offload: optimizer, zero: 0}", "needs 'parallel.zero' of 1 or more"),
        ("parallel={offload: all, zero: 1}", "needs 'parallel.zero' 3"),
    ],
)
def test_rules_across_sections(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump_config(small_config(tmp_path)), encoding="utf-8")
    validate(load_config(path), 4)
    with pytest.raises(UserError, match=message):
        validate(load_config(path, [override]), 4)


def test_fp32_gradients_need_zero_and_no_pipeline(tmp_path: Path) -> None:
    precision = {"dtype": "bf16", "gradients": "fp32"}
    validate(small_config(tmp_path, precision=precision), 4)
    for parallel, message in (({"zero": 0}, "needs 'parallel.zero'"), ({"pipeline": 2}, "cannot be combined with")):
        with pytest.raises(UserError, match=message):
            validate(small_config(tmp_path, precision=precision, parallel=parallel), 4)


def test_kv_heads_fewer_than_tensor_ranks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'model\.num_kv_heads' 2 is not a multiple of 'parallel.tensor' 4"):
        validate(small_config(tmp_path, parallel={"tensor": 4}), 4)


def test_sections_from_arguments() -> None:
    assert load_section(GenerationConfig, ["gen_length=64", "steps=64"]).gen_length == 64
    with pytest.raises(UserError, match="did you mean 'gen_length'"):
        load_section(GenerationConfig, ["gen_lenght=64"])
    with pytest.raises(UserError, match="must be a multiple of block_length 32"):
        load_section(GenerationConfig, ["gen_length=40"])


@pytest.mark.parametrize("path", sorted((CONFIGS / "methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_fits_the_quickstart(path: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(f"defaults: [{CONFIGS / 'quickstart.yaml'}, {path}]\n", encoding="utf-8")
    validate(load_config(top), 2)
