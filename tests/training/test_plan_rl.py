"""Plans of reinforcement learning: predicted bytes against real allocations, phase by phase."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mdm.batch import ModelInputs
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import RlConfig, RunConfig
from megatron_mdm.engine.communication import MicroBatchShape, passing_communication
from megatron_mdm.engine.memory import rank_memory, token_losses_bytes, weights_bytes
from megatron_mdm.generation.memory import logits_bytes
from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds
from megatron_mdm.models.cache import Window
from megatron_mdm.models.parameters import padded_vocab_size
from megatron_mdm.parallel.layout import Layout
from megatron_mdm.training.dry_run import describe, memory_estimate
from megatron_mdm.training.plan.cluster import read_cluster
from megatron_mdm.training.plan.memory import with_rollouts
from megatron_mdm.training.plan.plan import Samples, make_plan
from megatron_mdm.training.plan.tables import plan_text
from tests.engine.test_communication import CountBytes
from tests.engine.test_memory import BUCKET, LiveBytes
from tests.ranks import run_ranks
from tests.small import EOS, MASK, PAD, small_config, small_model

LENGTH = 64
GEN_LENGTH = 48
ROWS = 8  # of a micro-batch: 4 completions, 2 views
NUM_MICRO_BATCHES = 2
VOCAB = 4000
SPECIAL = SpecialIds(MASK, PAD, EOS)
NUM_RANKS = 2
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "dp2_zero1": ({"zero": 1}, "bf16"),
    "dp2_zero3": ({"zero": 3}, "bf16"),
    "tp2_sp": ({"tensor": 2, "sequence": True, "zero": 1}, "bf16"),
    "pp2": ({"pipeline": 2, "zero": 0}, "fp32"),
}
COUNTS = {"prompts_per_rollout": 4, "num_iterations": 2}  # 32 completions: 4 steps with each
SHAPE = MicroBatchShape(ROWS, LENGTH, ROWS * GEN_LENGTH)


def write_base(folder: Path) -> None:
    """On a rank: a run that the others begin with."""
    from megatron_mdm.rl.run import REINFORCED
    from tests.rl.runs import run_of

    config = config_of(folder, {}, "fp32", base="")
    changes = {"beta": 0.0, "evaluate_every": 0}
    schedule = config.schedule.model_copy(update={"steps": 1})
    run_of(config.model_copy(update={"rl": config.rl.model_copy(update=changes), "schedule": schedule}), REINFORCED)


def config_of(folder: Path, parallel: dict[str, Any], dtype: str, base: str = "run") -> RunConfig:
    sizes = {"num_layers": 4, "num_kv_heads": 4, "hidden_size": 128, "ffn_hidden_size": 256, "vocab_size": VOCAB}
    decoding = {"gen_length": GEN_LENGTH, "block_length": 16, "steps": 6, "batch_size": 16, "stop_at_eos": False}
    return small_config(
        folder,
        model={**small_model(**sizes).model_dump(), "init_from": base and str(folder / base)},
        data={"max_length": LENGTH, "format": "prompts"},
        batch={"global_size": 16, "micro_size": ROWS // 2},
        diffusion={"views": 2},
        parallel=parallel,
        precision={"dtype": dtype},
        rl={"rewards": [{"name": "tests.rl.small:low_ids"}], "beta": 0.1, "generation": decoding, **COUNTS},
        deepspeed={"zero_optimization": {"reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}},
    )


def in_turn(configs: dict[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """On a rank."""
    return {name: {**counted(config), "run": most_of_a_run(config)} for name, config in configs.items()}


def most_of_a_run(config: RunConfig) -> int:
    """On a rank: the most bytes in two steps of a run: rollout, rewards, values of θ_old and of the reference, and
    updates."""
    from tests.rl.runs import begun

    with LiveBytes() as live:
        _, _, engine, source = begun(config)
        for step in range(2):
            engine.train_batch(source.prepare(step).micro_batches, 1e-3)
    return live.peak


def counted(config: RunConfig) -> dict[str, Any]:
    """On a rank: bytes of the reference, and the most bytes while there is a rollout, a sweep of the weights that
    train, one of the reference, and an optimizer step; bytes sent for logits and for losses."""
    from megatron_mdm.batch import Full
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.engine.inputs import logits_inputs
    from megatron_mdm.generation.generate import generate
    from megatron_mdm.parallel.groups import initialize
    from tests.engine.test_engines import inference_engine

    context = initialize(config.parallel)
    generation = GenerationConfig.of_rollouts(config)
    tokens = torch.randint(2, 50, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    selected = torch.arange(LENGTH).expand(ROWS, -1) >= LENGTH - GEN_LENGTH
    weights = torch.where(selected, -0.1, 0.0)
    micro_batches = [ModelInputs(tokens, Full(), selected, tokens, weights, torch.ones(ROWS))] * NUM_MICRO_BATCHES
    prompts = [[5] * (LENGTH - GEN_LENGTH)] * generation.batch_size * context.layout.data
    with LiveBytes() as live:
        engine = restored_engine(None, config, context, 0)
        engine.train_batch(micro_batches, 1e-3)
        gc.collect()
        before = live.now
        reference = inference_engine(config, context)
        gc.collect()
        found: dict[str, Any] = {"reference": live.now - before}
        with CountBytes() as sent:
            engine.logits(logits_inputs(tokens, Full(), selected))
        found["sent for logits"] = by_collective(sent.bytes)
        with CountBytes() as sent:
            engine.token_losses(micro_batches)
        found["sent for losses"] = by_collective(sent.bytes)
        for name, phase in {
            "rollout": lambda: generate(engine, prompts, generation, SPECIAL, context),
            "sweep": lambda: engine.token_losses(micro_batches),
            "sweep of the reference": lambda: reference.token_losses(micro_batches),
            "step": lambda: engine.train_batch(micro_batches, 1e-3),
        }.items():
            gc.collect()
            live.peak = live.now
            phase()
            found[name] = live.peak
    return {**found, "stage": context.pipeline_rank}


def by_collective(counted: Mapping[tuple[tuple[int, ...], str], int]) -> dict[str, int]:
    """All groups' bytes together; groups of one rank send nothing."""
    sums: Counter[str] = Counter()
    for (ranks, name), size in counted.items():
        sums[name] += size * (len(ranks) > 1)
    return dict(+sums)


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, list[dict[str, Any]]]]:
    """Of each layout, by rank."""
    folder = tmp_path_factory.mktemp("phases")
    prompt = LENGTH - GEN_LENGTH
    samples = [{"input_ids": [*range(2, 2 + LENGTH)], "prompt_length": prompt}] * COUNTS["prompts_per_rollout"]
    (folder / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    run_ranks(write_base, 1, folder)
    configs = {name: config_of(folder, parallel, dtype) for name, (parallel, dtype) in LAYOUTS.items()}
    ranks = run_ranks(in_turn, NUM_RANKS, configs)
    return {name: (config, [rank[name] for rank in ranks]) for name, config in configs.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_predicted_memory_is_that_of_real_phases(name: str, phases: Any) -> None:
    config, ranks = phases[name]
    layout = Layout.of(NUM_RANKS, config.parallel)
    for counted in ranks:
        stage = counted["stage"]
        memory = rank_memory(config, layout, stage, SHAPE, NUM_MICRO_BATCHES, "cpu")
        whole = with_rollouts(memory, config, layout, stage, SHAPE, "cpu")
        assert counted["reference"] == pytest.approx(weights_bytes(config, layout, stage), rel=0.03)
        between = whole.weights + whole.optimizer + whole.kept_gradients + whole.buffers + whole.reference
        assert between + whole.rollout == pytest.approx(counted["rollout"], rel=0.15)  # these logits are the most
        losses = between + token_losses_bytes(config, layout, stage, SHAPE, "cpu")
        for phase in ("sweep", "sweep of the reference"):
            assert losses == pytest.approx(counted[phase], rel=0.15)
        assert whole.total == pytest.approx(max(counted[phase] for phase in ("rollout", "step")), rel=0.15)
        assert whole.total == pytest.approx(counted["run"], rel=0.15)


@pytest.mark.parametrize("name", LAYOUTS)
def test_predicted_communication_is_that_of_real_passes(name: str, phases: Any) -> None:
    """Logits, then losses of two micro-batches. What ZeRO 3 has gathered for a small model stays for the next pass."""
    config, ranks = phases[name]
    layout = Layout.of(NUM_RANKS, config.parallel)
    width = padded_vocab_size(config.model, layout.tensor)
    for counted in ranks:
        of_logits = passing_communication(config, layout, counted["stage"], SHAPE, width)
        of_losses = passing_communication(config, layout, counted["stage"], SHAPE, 0)
        first = {("data", "all_gather"): weights_bytes(config, layout, 0)} if name == "dp2_zero3" else {}
        assert counted["sent for logits"] == {name: size for (_, name), size in (of_logits | Counter(first)).items()}
        sent = {name: NUM_MICRO_BATCHES * size for (_, name), size in of_losses.items()}
        assert counted["sent for losses"] == sent


class Logits:
    """An engine that makes logits of nothing."""

    def logits(self, inputs: ModelInputs, window: Window | None = None) -> torch.Tensor:
        return torch.randn(int(inputs.selected.sum()), VOCAB)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"noise": "host"},
    {"temperature": 0.0},
    {"top_p": 0.9},
    {"top_k": 5},
    {"temperature": 0.0, "top_p": 0.9},
    {"cfg_scale": 1.0},
    {"eos": "last"},
    {"remasking": "entropy"},
    {"remasking": "topk_margin"},
    {"remasking": "maskgit_plus", "temperature": 0.0},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_what_a_denoising_step_takes_by_its_settings(changes: dict[str, Any]) -> None:
    common = {"gen_length": 32, "block_length": 32, "steps": 1, "temperature": 1.0, "noise": "device", "batch_size": 8}
    config = GenerationConfig(**{**common, **changes})
    with LiveBytes() as live:
        denoise(Logits(), [[5, 6]] * 8, range(8), config, SPECIAL)
    assert live.peak == pytest.approx(logits_bytes(config, VOCAB, 4, 1, "cpu"), rel=0.15)


CONFIGS = sorted(Path(__file__).parents[2].glob("configs/rl/llada_8b_gsm8k_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("cluster", ["a100-80gb", "h100-80gb"])
def test_8b_parameters_fit_eight_gpus(path: Path, cluster: str) -> None:
    plan = make_plan(load_config(path), read_cluster(cluster), Samples(7473))
    assert plan.is_feasible, plan.obstacle
    assert plan.layout.world_size == 8
    rollout = plan.rollout
    assert rollout is not None
    counts = plan.config.rl.num_iterations * rollout.num_completions // plan.config.batch.global_size
    assert rollout.num_updates == counts
    assert "would share the completions out evenly" not in plan_text(plan)
    assert plan.num_steps * rollout.total / counts / 86400 == pytest.approx(plan.days, rel=0.05)
    text = plan_text(plan)
    assert f"rollout: {rollout.num_completions} completions" in text
    assert "reference  rollout" in text
    assert json.loads(json.dumps(plan.as_json()))["rollout_seconds"]["total"] == rollout.total


def test_what_a_reference_costs() -> None:
    """Its weights, on the device or, between passes, on the host; a pass for each update; nothing beside adapters."""
    plain, on_device, on_host, adapters = (
        make_plan(load_config(CONFIGS[-1], changes), read_cluster("h100-80gb"), Samples(7473))
        for changes in (
            ["rl.beta=0"],
            ["rl.beta=0.1"],
            ["rl.beta=0.1", "rl.reference=host"],
            ["rl.beta=0.1", "model.lora.rank=8"],
        )
    )
    size = plain.memory[0].weights
    assert plain.rollout is not None
    assert on_device.rollout is not None
    assert adapters.rollout is not None
    assert [plan.memory[0].reference for plan in (plain, on_device, on_host, adapters)] == [0, size, 0, 0]
    assert on_host.memory[0].host - plain.memory[0].host == size
    assert on_host.memory[0].rollout >= size > plain.memory[0].rollout
    assert on_device.fullest.total == plain.fullest.total + size
    assert plain.rollout.reference == 0.0 < plain.rollout.old < plain.rollout.weights
    assert on_device.rollout.reference == on_device.rollout.weights == plain.rollout.weights
    assert adapters.rollout.reference > 0


def test_ranks_without_work_are_told_of() -> None:
    changes = ["rl.generation.batch_size=48"]  # 6 batches of 256 completions for 4 ranks
    plan = make_plan(load_config(CONFIGS[-1], changes), read_cluster("h100-80gb"), Samples(7473))
    assert "; rl.generation.batch_size 32 would share the completions out evenly" in plan_text(plan)


def test_one_update_of_a_rollout_needs_no_values() -> None:
    changes = ["rl.num_iterations=1", "rl.beta=0", "batch.global_size=256", "rl.prompts_per_rollout=32"]
    plan = make_plan(load_config(CONFIGS[-1], changes), read_cluster("h100-80gb"), Samples(7473))
    assert plan.rollout is not None
    assert plan.rollout.num_updates == 1
    assert (plan.rollout.old, plan.rollout.weights, plan.rollout.reference) == (0, 0, 0)


def test_dry_runs_count_rollouts(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"zero": 0}, "fp32")
    text = describe(config, 1, 10)
    assert "reference 0.01, rollout 0.01" in text
    assert "rollouts: 4 prompts × 8 completions of at most 48 tokens; 4 steps with each" in text
    supervised = config.model_copy(update={"rl": RlConfig()})
    assert "rollout" not in describe(supervised, 1, 10)
    whole, training = (memory_estimate(each, Layout.of(1, each.parallel)) for each in (config, supervised))
    assert whole.total > training.total
