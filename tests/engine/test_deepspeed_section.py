"""The free-form section: DeepSpeed's own reader judges it, before memory is estimated or ranks join."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config, load_config
from megatron_mdm.config.validate import validate
from megatron_mdm.engine.deepspeed_config import deepspeed_config
from megatron_mdm.engine.deepspeed_section import check_deepspeed_section
from megatron_mdm.engine.memory import fullest_stage
from megatron_mdm.parallel.layout import Layout
from tests.ranks import run_program_ranks
from tests.small import small_config, write_ids


def loaded(folder: Path, *overrides: str) -> Any:
    path = folder / "base.yaml"
    path.write_text(dump_config(small_config(folder)), encoding="utf-8")
    config = load_config(path, [f"deepspeed.{override}" for override in overrides])
    validate(config, 1)
    return config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense=1", "'deepspeed.nonsense': DeepSpeed 0.19"),
        ("wall_clock_breakdwn=true", "has no such key; the nearest that it knows is 'deepspeed.wall_clock_breakdown'"),
        ("zero_optimization.reduce_bucket_siz=1", "the nearest that it knows is 'deepspeed.zero_optimization.reduce_b"),
        (
            "zero_optimization.offload_param.pin=true",
            "nearest that it knows is 'deepspeed.zero_optimization.offload_par",
        ),
        ("aio.block_sizes=1", "the nearest that it knows is 'deepspeed.aio.block_size'"),
        ("flops_profiler.enable=true", "the nearest that it knows is 'deepspeed.flops_profiler.enabled'"),
        ("wandb.grup=a", "the nearest that it knows is 'deepspeed.wandb.group'"),
        ("torch_autocast.enable=true", "the nearest that it knows is 'deepspeed.torch_autocast.enabled'"),
        ("zero_optimization=5", "'deepspeed.zero_optimization': expected a section, got 5"),
        ("zero_optimization=true", "'deepspeed.zero_optimization': expected a section, got True"),
        ("zero_optimization.offload_param=5", "'deepspeed.zero_optimization.offload_param'"),
        (
            "zero_optimization.reduce_bucket_size=many",
            "'deepspeed.zero_optimization.reduce_bucket_size': input should be",
        ),
        ("zero_optimization.reduce_bucket_size=-1", "should be greater than 0, got -1"),
        (
            "zero_optimization.reduce_bucket_size=1.5",
            "'deepspeed.zero_optimization.reduce_bucket_size': input should be",
        ),
        ("zero_optimization.overlap_comm=maybe", "'deepspeed.zero_optimization.overlap_comm': input should be"),
        ("wall_clock_breakdown=yess", "'deepspeed.wall_clock_breakdown': expected true or false, got 'yess'"),
        ("wall_clock_breakdown=1", "'deepspeed.wall_clock_breakdown': expected true or false, got 1"),
        ("memory_breakdown=no", "'deepspeed.memory_breakdown': expected true or false, got 'no'"),
        ("steps_per_print=often", "'deepspeed.steps_per_print': expected a whole number, got 'often'"),
        ("prescale_gradients={a: 1}", "'deepspeed.prescale_gradients': expected true or false"),
        ("gradient_predivide_factor=x", "'deepspeed.gradient_predivide_factor': expected a number, got 'x'"),
        ("gradient_predivide_factor=.inf", "'deepspeed.gradient_predivide_factor': expected a finite number"),
        ("aio.block_size=a", "'deepspeed.aio.block_size': expected a whole number, got 'a'"),
        ("activation_checkpointing=3", "'deepspeed.activation_checkpointing': DeepSpeed cannot read 3"),
        ("communication_data_type=5", "'deepspeed.communication_data_type': expected a text, got 5"),
        ("communication_data_type=fp64", "'deepspeed.communication_data_type': DeepSpeed cannot read 'fp64' (Invalid"),
        ("amp.enabled=true", "'deepspeed.amp': DeepSpeed cannot read"),
        ("gradient_allreduce_op=max", "'deepspeed.gradient_allreduce_op': DeepSpeed cannot read 'max' (Invalid"),
        ("data_types=3", "'deepspeed.data_types': expected a section, got 3"),
        ("data_types.grad_accum_dtype=bf16", "is set by the section 'precision.gradients'"),
        ("zero_optimization.offload_optimizer.device=cpu", "is set by the section 'parallel.offload'"),
        ("tensor_parallel.autotp_size=2", "is set by the section 'parallel'"),
    ],
)
def test_what_deepspeed_cannot_read(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_deepspeed_section(loaded(tmp_path, override))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_that_do_not_go_together(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(dump_config(small_config(tmp_path, parallel={"zero": 3})), encoding="utf-8")
    with pytest.raises(
        UserError, match="'deepspeed' \\(gradient_allreduce_op='sum' is not supported with ZeRO stage 3"
    ):
        check_deepspeed_section(load_config(path, ["deepspeed.gradient_allreduce_op=sum"]))


def test_what_deepspeed_reads_is_passed_on(tmp_path: Path) -> None:
    overrides = [
        "zero_optimization.reduce_bucket_size=5e5",
        "zero_optimization.overlap_comm=true",
        "steps_per_print=1e2",
        "zero_optimization.allgather_bucket_size=auto",
        "wall_clock_breakdown=false",
        "aio.block_size=1e6",
        "flops_profiler={enabled: false, module_depth: -1}",
        "communication_data_type=fp32",
        "zero_optimization.offload_optimizer.pin_memory=true",
        "activation_checkpointing.number_checkpoints=2",
        "wandb={enabled: false, project: a}",
        "gradient_predivide_factor=2",
        "torch_autocast.enabled=false",
        "data_types.keep_in_fp32_modules=auto",
        "checkpoint.tag_validation=Ignore",
        "compile={deepcompile: false}",
    ]
    config = loaded(tmp_path, *overrides)
    split = config.parallel.model_copy(update={"tensor": 2, "pipeline": 2})
    for layout in (config.parallel, split):
        check_deepspeed_section(config.model_copy(update={"parallel": layout}))
    values = deepspeed_config(config, 1)
    assert values["zero_optimization"]["reduce_bucket_size"] == 500_000
    assert (type(values["aio"]["block_size"]), values["steps_per_print"]) == (int, 100)
    offload = config.model_copy(update={"parallel": config.parallel.model_copy(update={"offload": "optimizer"})})
    assert deepspeed_config(offload, 1)["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": True,
    }


def test_memory_counts_the_buckets_that_were_asked_for(tmp_path: Path) -> None:
    """On a GPU, where they are allocated whole."""
    layout = Layout()
    sizes = {"1e6": 4e6, "2e6": 8e6, "auto": 4 * 5e8}
    for size, expected in sizes.items():
        config = loaded(tmp_path, f"zero_optimization.reduce_bucket_size={size}")
        assert fullest_stage(config, layout, "cuda").buffers == expected


def test_a_mistake_in_it_ends_dry_run_and_plan_with_one_line(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 20)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(small_config(tmp_path)), encoding="utf-8")
    mistake = ["--config", str(path), "deepspeed.zero_optimization.reduce_bucket_size=many"]
    for program, more in (("launch/train.py", ["--dry-run"]), ("tools/plan.py", [])):
        (result,) = run_program_ranks(program, [*mistake, *more])
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: 'deepspeed.zero_optimization.reduce_bucket_size': input should be")
