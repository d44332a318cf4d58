"""Plans: what must fit fits, what does not is said, and the figures follow from the formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import ImageVocabulary, RunConfig
from megatron_mdm.data.image_text import image_row
from megatron_mdm.engine.communication import MicroBatchShape, stages
from megatron_mdm.models.adapter_rows import LINEAR_MAPS, matrix_shape
from megatron_mdm.models.parameters import num_parameters
from megatron_mdm.objectives import check_run
from megatron_mdm.training.plan.cluster import PRESETS, read_cluster
from megatron_mdm.training.plan.plan import Plan, Samples, make_plan
from megatron_mdm.training.plan.search import search
from megatron_mdm.training.plan.tables import plan_text
from megatron_mdm.training.plan.timing import forward_flops
from tests.ranks import run_program_ranks, run_ranks
from tests.small import small_config, small_model, write_ids

ROOT = Path(__file__).parent.parent.parent
SFT = sorted(set(ROOT.glob("configs/sft/llada_8b_*.yaml")) - set(ROOT.glob("configs/sft/*_lora.yaml")))
LORA = sorted(ROOT.glob("configs/sft/*_lora.yaml"))
IMAGES = sorted(ROOT.glob("configs/sft/mmada_8b_*.yaml"))
STARTS = [*SFT, *IMAGES, *(ROOT / f"configs/pretrain/{size}.yaml" for size in ("125m", "1b", "8b"))]


def planned(path: Path, *overrides: str, nodes: int = 1, cluster: str = "h100-80gb") -> Plan:
    return make_plan(load_config(path, overrides), read_cluster(cluster, nodes), Samples(7473))


@pytest.mark.parametrize("path", STARTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("cluster", [name for name, cluster in PRESETS.items() if cluster.gpus_per_node == 8])
def test_the_configurations_to_start_from_fit(path: Path, nodes: int, cluster: str) -> None:
    plan = planned(path, nodes=nodes, cluster=cluster)
    assert plan.is_feasible, plan.obstacle
    assert plan.layout.world_size == 8 * nodes
    assert plan.config.batch.mode == "packed"
    assert 0 < plan.mfu < plan.cluster.efficiency


@pytest.mark.parametrize("path", LORA, ids=lambda path: path.stem)
def test_adapters_of_8b_parameters_fit_one_gpu(path: Path) -> None:
    """Of 24 GB up to rank 32, of 48 and 80 GB up to rank 128; there without running blocks again, up to rank 64."""
    ranks = {rank: planned(path, f"model.lora.rank={rank}", cluster="rtx4090-24gb") for rank in (16, 32)}
    for rank, plan in ranks.items():
        assert plan.layout.world_size == 1
        assert plan.is_feasible, plan.obstacle
        held = plan.memory[0]
        frozen = 2 * load_and_count(path)
        adapters = rank * ranks[16].memory[0].optimizer / 16
        assert held.weights == pytest.approx(frozen + adapters / 6, rel=1e-3)  # two bytes beside twelve
        assert held.optimizer == pytest.approx(adapters, rel=1e-6)
    for cluster, rank, recompute, tokens in (
        ("l40s-48gb", 64, "none", 4096),
        ("l40s-48gb", 128, "full", 8192),
        ("h100-80gb", 128, "none", 8192),
    ):
        changes = (f"model.lora.rank={rank}", f"parallel.recompute={recompute}", f"batch.micro_tokens={tokens}")
        plan = make_plan(load_config(path, changes), read_cluster(cluster, 1, 1), Samples(7473))
        assert plan.is_feasible, plan.obstacle


@pytest.mark.parametrize("path", LORA, ids=lambda path: path.stem)
def test_four_bits_of_8b_parameters(path: Path) -> None:
    """The layers' matrices take 4.5 bits in place of 16, all else what it took."""
    plain, four_bit = (planned(path, f"model.lora.base={base}", cluster="rtx4090-24gb") for base in ("model", "nf4"))
    model = four_bit.config.model
    parts = [part for parts in LINEAR_MAPS.values() for part in parts]
    size = model.num_layers * sum(math.prod(matrix_shape(model, part)) for part in parts)
    assert four_bit.memory[0].weights == pytest.approx(plain.memory[0].weights - size * (16 - 4.5) / 8)
    assert plain.fullest.total - four_bit.fullest.total == pytest.approx(size * (16 - 4.5) / 8, rel=0.05)


def load_and_count(path: Path) -> int:
    return num_parameters(load_config(path, ["model.lora.rank=0"]).model)


@pytest.mark.parametrize("path", SFT, ids=lambda path: path.stem)
def test_fine_tuning_has_the_settings_of_the_paper(path: Path) -> None:
    config = load_config(path)
    optimizer = config.optimizer
    schedule = config.schedule
    assert (optimizer.lr, optimizer.weight_decay, optimizer.gradient_clipping) == (5e-5, 0.1, 1.0)
    assert (schedule.name, schedule.epochs, schedule.warmup_steps, schedule.min_lr_ratio) == ("linear", 5, 0, 0.0)
    assert (config.batch.global_size, config.data.max_length, config.data.too_long) == (32, 4096, "drop")
    assert (config.precision.dtype, config.evaluation.patience, config.seed) == ("bf16", 3, 42)
    diffusion = config.diffusion
    calibration = config.diffusion.calibration
    assert (diffusion.t_sampler, diffusion.views, diffusion.strata) == ("ppots", 2, "none")
    assert (diffusion.masking, diffusion.normalization) == ("bernoulli", "sample")
    assert (calibration.estimator, calibration.density, calibration.target) == ("naive", "epr", "paper")
    assert (calibration.num_samples, calibration.num_times, calibration.num_masks) == (15, 70, 15)


def test_text_to_image_has_the_settings_of_the_paper_and_of_mmada() -> None:
    """Rows of 512-pixel pictures: task token, bos, 510 tokens of caption, eos, soi, 1,024 codes, eoi."""
    configs = {path.stem.removeprefix("mmada_8b_text_to_image"): load_config(path) for path in IMAGES}
    assert configs.keys() == {"", "_mmada"}
    for config in configs.values():
        row = image_row([0] * 510, [0] * config.image.num_tokens, config.image.vocabulary)
        assert (config.data.max_length, row.is_cut) == (len(row.ids), False)
        assert (config.objective.name, config.model.vocab_size) == ("text_to_image", 134_656)
        assert (config.optimizer.lr, config.optimizer.gradient_clipping, config.precision.dtype) == (5e-5, 1.0, "bf16")
        assert (config.image.vocabulary, config.diffusion.normalization) == (ImageVocabulary(), "sample")
        check_run(config, 8)
    paper, own = configs[""], configs["_mmada"]
    assert (paper.schedule.name, paper.schedule.epochs, paper.schedule.warmup_steps) == ("linear", 5, 0)
    assert (paper.optimizer.weight_decay, paper.batch.global_size, paper.evaluation.patience) == (0.1, 32, 3)
    assert (paper.diffusion.mask_schedule, paper.diffusion.masking) == ("linear", "bernoulli")
    assert (paper.image.caption_dropout, paper.diffusion.t_sampler, paper.diffusion.views) == (0.0, "ppots", 2)
    assert (own.schedule.name, own.schedule.min_lr_ratio, own.optimizer.weight_decay) == ("cosine", 0.1, 0.01)
    assert (own.diffusion.mask_schedule, own.diffusion.masking) == ("cosine", "rounded_count")
    assert (own.image.caption_dropout, own.diffusion.t_sampler, own.diffusion.views) == (0.1, "uniform", 1)


def test_of_an_image_row_the_image_is_learnt() -> None:
    """1,024 of 1,539 tokens, half of which reach the head."""
    config = load_config(IMAGES[0])
    whole = planned(IMAGES[0], "image.num_tokens=0")
    image = planned(IMAGES[0])
    samples = 32 * config.diffusion.rows_per_sample
    scored = round(0.5 * (1539 - 1024) * samples)
    products = 3 * 2 * 4096 * 134_656 * scored  # forward, and backward twice
    assert whole.flops_per_step - image.flops_per_step == pytest.approx(products, rel=1e-2)


def test_8b_has_the_parameters_of_llada() -> None:
    assert planned(STARTS[-1]).num_parameters == pytest.approx(8.02e9, rel=1e-3)


def test_fp32_runs_without_tensor_cores() -> None:
    """torch rounds nothing to TF32 unasked: a fifteenth of bf16's rate."""
    half, single = (planned(STARTS[-3], f"precision.dtype={dtype}") for dtype in ("bf16", "fp32"))
    assert single.step.compute == pytest.approx(half.step.compute / half.cluster.fp32_share)
    assert half.cluster.fp32_share == pytest.approx(66.9 / 989, rel=0.02)


def test_what_does_not_fit_is_said() -> None:
    whole = ("parallel.tensor=1", "parallel.sequence=false", "parallel.zero=0")
    plan = planned(SFT[0], *whole, "precision.dtype=fp32")
    assert not plan.is_feasible
    # 8.0 B parameters: 4 bytes of weights, 4 of gradients, 8 of the optimizer.
    assert plan.fullest.states == 16 * plan.num_parameters
    assert "stage 0 needs" in plan.obstacle
    in_16_bit = planned(SFT[0], *whole)  # as stage 1: 2, 2, and 12 over the 8 ranks
    assert in_16_bit.fullest.states == 5.5 * plan.num_parameters
    assert "ZeRO 0 (in 16 bit run as 1), bf16" in plan_text(in_16_bit)


def test_every_layout_that_a_search_offers_fits_and_the_first_is_the_fastest() -> None:
    plans = search(load_config(STARTS[-1]), read_cluster("a100-80gb"), Samples(), 10)
    assert len(plans) == 10
    assert all(plan.is_feasible for plan in plans)
    assert plans[0].step.total <= 1.01 * min(plan.step.total for plan in plans)
    assert planned(STARTS[-1], cluster="a100-80gb").step.total >= 0.99 * plans[0].step.total


def test_a_search_without_a_result_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("{preset: a100-80gb, memory_gib: 16}", encoding="utf-8")
    with pytest.raises(UserError, match=r"no layout of 8 ranks fits; the nearest, .*GiB"):
        search(load_config(STARTS[-1]), read_cluster(str(tmp_path / "cluster.yaml")), Samples(), 3)


def test_figures_of_a_pipeline() -> None:
    overrides = ("parallel.pipeline=4", "parallel.zero=1", "parallel.tensor=1", "parallel.sequence=false")
    plan = planned(STARTS[-1], *overrides)
    batches = 1024 // 2
    assert plan.num_micro_batches == batches
    assert plan.bubble == pytest.approx(3 / (batches + 3))
    kept = [memory.activations for memory in plan.memory]
    assert kept == sorted(kept, reverse=True)  # the first stage has the most micro-batches in flight
    assert plan.activations["full"] < plan.activations["selective"] < plan.activations["none"]
    # 6 FLOPs per parameter and token, but that the embedding multiplies nothing and half of the tokens reach the head;
    # attention's products come on top.
    config = plan.config
    tables = int(config.model.vocab_size) * config.model.hidden_size
    matrices = plan.num_parameters - 1.5 * tables
    scores = 12 * config.model.num_layers * config.model.hidden_size * 4096
    assert plan.flops_per_step == pytest.approx((6 * matrices + scores) * plan.tokens_per_step, rel=1e-3)


def test_mirror_doubles_the_work_and_calibration_is_bounded() -> None:
    plan = planned(SFT[0])
    assert 1.5 < plan.views_factor <= 2.0
    assert plan.calibration[0] == plan.calibration[1]  # the paper's: all rows, always
    ours = {"estimator": "token_moments", "target": "second_moment"}
    adaptive = planned(SFT[0], *(f"diffusion.calibration.{key}={value}" for key, value in ours.items()))
    rows = 15 * 70 * 15
    assert adaptive.calibration[1] == pytest.approx(adaptive.calibration[0] * rows / 256)
    assert adaptive.calibration[1] == pytest.approx(plan.calibration[1])
    assert plan.num_steps == 1168
    assert plan.days > 0


def counted_flops(config: RunConfig, rows: int, length: int) -> int:
    """On a rank: FLOPs of a forward pass, by torch's counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_mdm.batch import Full, ModelInputs
    from megatron_mdm.engine.build import build_engine
    from megatron_mdm.parallel.groups import initialize

    engine = build_engine(config, initialize())
    tokens = torch.randint(0, 50, (rows, length))
    ones = torch.ones(rows, length)
    inputs = ModelInputs(tokens, Full(), ones.bool(), tokens, ones, torch.ones(rows))
    with FlopCounterMode(display=False) as counter:
        engine.evaluate([inputs])
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 20)
    model = small_model(num_kv_heads=2, ffn_hidden_size=96, vocab_size=64)
    config = small_config(tmp_path, model=model.model_dump(), precision={"dtype": "bf16"})
    (counted,) = run_ranks(counted_flops, 1, config, 3, 64)
    (stage,) = stages(config)
    assert counted == forward_flops(config, stage, MicroBatchShape(3, 64, 3 * 64))


def test_program(tmp_path: Path) -> None:
    arguments: list[Any] = ["--config", str(SFT[0]), "--samples", "7473"]
    (text,) = run_program_ranks(str(ROOT / "tools/plan.py"), arguments)
    assert text.exit_code == 0
    assert "it fits" in text.stdout
    assert "total: 1,168 steps" in text.stdout
    (result,) = run_program_ranks(str(ROOT / "tools/plan.py"), [*arguments, "--json", "parallel.recompute=full"])
    plan = json.loads(result.stdout)
    assert plan["is_feasible"]
    assert plan["memory_bytes_by_stage"][0]["total"] > plan["activations"]["full"]
    (refused,) = run_program_ranks(str(ROOT / "tools/plan.py"), [*arguments, "parallel.zero=0", "parallel.tensor=1"])
    assert refused.exit_code == 1
    assert "'parallel.sequence'" in refused.stderr
    (too_much,) = run_program_ranks(str(ROOT / "tools/plan.py"), [*arguments, "batch.micro_tokens=65536"])
    assert too_much.exit_code == 2
    assert "DOES NOT FIT" in too_much.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{preset: b200}", "'preset' b200 is unknown"),
        ("{preset: a100-80gb, bandwith: 1}", "line 1: unknown key 'bandwith'"),
        ("[1]", "expected a mapping"),
        ("{preset: a100-80gb, memory_gib: -1}", "'memory_gib'"),
    ],
)
def test_bad_clusters(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_cluster(str(tmp_path / "cluster.yaml"))


def test_unknown_clusters_and_vocabularies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a preset"):
        read_cluster("dgx")
    config = small_config(tmp_path, model=small_model(vocab_size="tokenizer").model_dump())
    with pytest.raises(UserError, match=r"model\.vocab_size"):
        make_plan(config, read_cluster("a100-80gb"), Samples())
