"""YAML composition, overrides, round trips, and what goes wrong."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config, load_config, load_section
from megatron_mdm.generation.settings import GenerationConfig
from megatron_mdm.objectives import check_run
from megatron_mdm.rl.run import parts_of
from tests.small import small_config, small_model

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def test_round_trip(tmp_path: Path) -> None:
    config = small_config(tmp_path, diffusion={"t_sampler": "ppots", "strata": 4, "views": 2})
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


BASE = """\
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64, max_sequence_length: 64}
data:
  train: train.jsonl
  max_length: 8
batch: {global_size: 8, micro_size: 4}
optimizer: {lr: 1e-3}
schedule: {steps: 1e2}
checkpoint: {directory: 010}
seed: 010
"""


@pytest.mark.parametrize(
    ("top", "overrides", "message"),
    [
        ("data: {max_length: 1}", [], "{top}, line 2: 'data.max_length': input should be greater than 1, got 1"),
        (
            "seed: 1",
            ["data.max_length=x"],
            "override 'data.max_length=x': 'data.max_length': input should be a valid int",
        ),
        ("diffusion:\n  views: 2\n  strata: 1", [], "{top}, line 4: 'diffusion.strata': must be at least 2 strata"),
        (
            "diffusion: {strata: a}",
            ["diffusion={strata: b}"],
            "override 'diffusion={strata: b}': 'diffusion.strata': inp",
        ),
        ("schedule: {epochs: 1}", [], "{top}, line 2: 'schedule': set exactly one of steps and epochs"),
        ("seed: 1", ["schedule.epochs=1"], "override 'schedule.epochs=1': 'schedule': set exactly one"),
        (
            "seed: 1",
            ["schedule={}", "schedule.steps=1", "schedule.epochs=1"],
            "override 'schedule.epochs=1': 'schedule': set exactly one",
        ),
        ("data: {max_length: 1, pad_tokn: a}", [], "{top}, line 2: unknown key 'data.pad_tokn'"),
        ("optimizer: {betas: [0.9, x]}", [], "{top}, line 2: 'optimizer.betas.1': input should be a valid number"),
        ("data: {train: {a: x}}", [], "{top}, line 2: 'data.train.a': input should be a valid number"),
        ("data: {train: {a: .5, b: x}}", ["seed=2"], "{top}, line 2: 'data.train.b'"),
        ("data:\n  mask_token: [MASK]", [], "{top}, line 3: 'data.mask_token': a list stands where a text is expected"),
        ("batch: {micro_size: 4}\nbatch: {micro_size: 2}", [], "{top}, line 3: key 'batch' stands here and in line 2"),
        ("data: {pad_tokn: a}", [], "{top}, line 2: unknown key 'data.pad_tokn' (did you mean 'data.pad_token'?)"),
        ("schedule: {steps: true}", [], "{top}, line 2: 'schedule.steps': input should be a valid integer"),
        ("schedule: {steps: 1.5}", [], "{top}, line 2: 'schedule.steps': input should be a valid integer"),
        ("optimizer: {lr: .inf}", [], "{top}, line 2: 'optimizer.lr': input should be a finite number"),
        (
            "seed: 1",
            ["optimizer.lr=inf"],
            "override 'optimizer.lr=inf': 'optimizer.lr': input should be a finite number",
        ),
        ("data: {train: {a: .nan}}", [], "{top}, line 2: 'data.train.a': input should be a finite number"),
        ("optimizer: {betas: [0.9, inf]}", [], "{top}, line 2: 'optimizer.betas.1': input should be a finite number"),
        (
            "diffusion: {calibration: {uniform_floor: nan}}",
            [],
            "'diffusion.calibration.uniform_floor': input should be a f",
        ),
        ("seed: .inf", [], "{top}, line 2: 'seed': input should be a finite number"),
    ],
)
def test_errors_name_the_place_that_set_the_value(top: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    """The file and line, or the override; of two values that collide, the one that was set last."""
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")
    path = tmp_path / "top.yaml"
    path.write_text(f"defaults: [base.yaml]\n{top}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert message.replace("{top}", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    config = load_config(path)
    assert (config.checkpoint.directory, config.seed, config.schedule.steps) == ("010", 10, 100)
    overrides = ["checkpoint.directory=runs/a #2", "seed=020", "data.mask_token=[MASK]", "data.pad_token=no"]
    config = load_config(path, [*overrides, "data.eos_token=", "batch.global_size=1e2", "data.train=null"])
    assert (config.checkpoint.directory, config.seed, config.batch.global_size) == ("runs/a #2", 20, 100)
    data = config.data
    assert (data.mask_token, data.pad_token, data.eos_token, data.train) == ("[MASK]", "no", "", "null")


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
        ("diffusion.t_sampler=ppot", "'uniform', 'ppots' or 'clipped'"),
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
        ("model.head_dim=7", "must be even for rotary positions"),
        ("model.compile=true", "needs 'batch.mode' packed and 'batch.micro_tokens'"),
        ("model.fp8=tensorwise", "'model.fp8' needs Transformer Engine: set 'model.kernels' to transformer_engine"),
        ("model.attention=causal", "is for 'objective.name' autoregressive"),
        ("diffusion.calibration.refit_every=5", "needs 'diffusion.t_sampler' ppots"),
        ("diffusion={t_sampler: clipped, clipping: {bounds: adaptive}}", "set 'evaluation.every'"),
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
    check_run(load_config(path), 4)
    with pytest.raises(UserError, match=message):
        check_run(load_config(path, [override]), 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("precision.dtype=auto", "'model.fp8' needs 'precision.dtype' bf16, not auto"),
        ("parallel={tensor: 1, zero: 3}", "'model.fp8' cannot be combined with 'parallel.zero' 3"),
        ("model.ffn_hidden_size=48", "multiples of 16; 'model.ffn_hidden_size' / 'parallel.tensor' is 24"),
        (
            "model.num_heads=8 model.num_kv_heads=2 model.head_dim=4",
            "multiples of 16; the width of queries, keys and values / 'parallel.tensor' is 24",
        ),
        ("model.head_dim=4", "multiples of 16; the width of all heads / 'parallel.tensor' is 8"),
        ("model.fp8=true", "'model.fp8': must be false, 'tensorwise' or 'delayed', got 'true'"),
    ],
)
def test_what_fp8_needs(tmp_path: Path, overrides: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    config = small_config(
        tmp_path,
        model={"num_kv_heads": 4, "head_dim": 8, "kernels": "transformer_engine", "fp8": "delayed"},
        parallel={"tensor": 2},
        precision={"dtype": "bf16"},
    )
    path.write_text(dump_config(config), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        check_run(load_config(path, re.split(" (?=model)", overrides)), 4)


def test_fp32_gradients_of_a_table_that_two_stages_share_need_bf16_on_the_device(tmp_path: Path) -> None:
    pipeline = {"pipeline": 2}
    offload = {**pipeline, "offload": "optimizer"}
    for dtype, parallel, tied, message in (
        ("bf16", {"zero": 0}, True, ""),
        ("bf16", pipeline, True, ""),
        ("bf16", offload, False, ""),
        ("bf16", offload, True, "cannot be combined with 'parallel.offload', 'parallel.pipeline' and"),
        ("fp16", {"offload": "optimizer"}, True, ""),
        ("fp16", pipeline, True, "cannot be combined with 'precision.dtype' fp16, 'parallel.pipeline' and"),
    ):
        model = small_model(tie_embeddings=tied).model_dump()
        precision = {"dtype": dtype, "gradients": "fp32"}
        config = small_config(tmp_path, model=model, precision=precision, parallel=parallel)
        with pytest.raises(UserError, match=message) if message else nullcontext():
            check_run(config, 4)


def test_what_just_fits_is_allowed(tmp_path: Path) -> None:
    config = small_config(tmp_path, diffusion={"strata": 8}, parallel={"pipeline": 2})
    assert (config.batch.global_size, config.data.max_length) == (8, config.model.max_sequence_length)
    check_run(config, 4)


def test_rules_of_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"either 'data.validation' or 'data.validation_fraction', not both"):
        check_run(small_config(tmp_path, data={"validation": "a", "validation_fraction": 0.1}), 4)
    with pytest.raises(UserError, match=r"'data.eos_padding' is for 'data.format' sft"):
        check_run(small_config(tmp_path, data={"format": "corpus", "eos_padding": True}), 4)


def test_kv_heads_fewer_than_tensor_ranks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'model\.num_kv_heads' 2 is not a multiple of 'parallel.tensor' 4"):
        check_run(small_config(tmp_path, parallel={"tensor": 4}), 4)


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
    check_run(load_config(top), 2)


METHODS_OF_RL = ("coupled_grpo", "diffu_grpo", "espo", "gdpo", "unigrpo", "unigrpo_ppots_mirror")


@pytest.mark.parametrize("name", METHODS_OF_RL)
def test_every_method_of_reinforcement_learning_fits_its_quickstart(name: str, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(f"defaults: [{CONFIGS}/rl/arithmetic.yaml, {CONFIGS}/rl/{name}.yaml]\n", encoding="utf-8")
    config = load_config(top)
    check_run(config, 2)
    parts_of(config).checked(config, 2)


@pytest.mark.parametrize("path", sorted((CONFIGS / "rl").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_reinforcement_learning_fits_its_ranks(path: Path) -> None:
    if path.stem in (*METHODS_OF_RL, "method", "llada_8b_gsm8k"):  # parts of others
        return
    config = load_config(path)
    ranks = 8 if "8b" in path.stem else 2
    check_run(config, ranks)
    parts_of(config).checked(config, ranks)
    assert config.rl.is_used == (config.data.format == "prompts")
