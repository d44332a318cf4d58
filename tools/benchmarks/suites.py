"""The suites of the benchmark `steps`: what is compared with what."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np

from megatron_mdm.config.errors import UserError
from megatron_mdm.diffusion.control_variate import CentredVariate, WeightedLosses
from megatron_mdm.diffusion.moments import MomentSums
from megatron_mdm.diffusion.t_samplers import UniformSampler
from megatron_mdm.engine.build import build_engine
from megatron_mdm.models.layers import build_model
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.training.loop import StepResult, Trainer
from tools.benchmarks.adapters import MEMORY_TARGET, RANK, TIME_TARGET, adapter_cases
from tools.benchmarks.baseline import PlainLoop, as_plain
from tools.benchmarks.cases import Case, LengthSource, Method, dataset, num_parameters, source_of, trainer, whole_model
from tools.benchmarks.head import head_suite
from tools.benchmarks.limit import LIMIT_CASES, limit_of
from tools.benchmarks.measure import compare, interleaved, peak_memory, report_memory, resident_mib

LOSS_TOLERANCE = 1e-5  # relative, fp32
NUM_MEMORY_STEPS = 3
T = TypeVar("T")
VIEWS = {1: "single view", 2: "MIRROR"}


def vocab_cases() -> list[tuple[Case, float, float | None]]:
    """(case, least speed ratio, largest memory ratio or None)"""
    small: list[tuple[Case, float, float | None]]
    large: list[tuple[Case, float, float | None]]
    small = [(Case(f"vocab-8192-{dtype}", 8192, dtype, "equal", 32, 32), 1.0, None) for dtype in ("fp32", "bf16")]
    large = [(Case(f"vocab-126464-{dtype}", 126_464, dtype, "gsm8k", 32, 32), 3.0, 0.5) for dtype in ("fp32", "bf16")]
    return small + large


def quickstart_case(dtype: str) -> Case:
    return Case(f"quickstart-{dtype}", 400, dtype, "short", 128, 32, hidden_size=192, ffn_hidden_size=512)


PRECISION_CASES: tuple[Callable[[str], Case], ...] = (
    quickstart_case,
    lambda dtype: Case(f"gsm8k-8192-{dtype}", 8192, dtype, "gsm8k", 32, 32),
    lambda dtype: Case(f"gsm8k-126464-{dtype}", 126_464, dtype, "gsm8k", 8, 8),
)
METHODS = {
    "standard": (Method(), 0.0),
    "P-POTS": (Method(t_sampler="ppots"), 1.02),
    "P-POTS + MIRROR": (Method(t_sampler="ppots", views=2), 2.05),
    "MIRROR": (Method(views=2), 2.05),
    "strata": (Method(strata="sqrt"), 1.02),
    "exact count": (Method(masking="exact_count"), 1.02),
    "exact count + MIRROR": (Method(masking="exact_count", views=2), 2.05),
    "MultiSample-2": (Method(multisample=2), 2.05),
    "clipped": (Method(t_sampler="clipped"), 1.02),
    "ISAD": (Method(isad=True), 1.02),
    "SyRM": (Method(syrm=True), 1.02),
    "EMA": (Method(), 1.02),
    "re-fitting": (Method(t_sampler="ppots"), 1.02),
}


class Bench:
    """The command line's settings and what builds a case from them."""

    def __init__(self, arguments: argparse.Namespace, context: ParallelContext) -> None:
        self.arguments = arguments
        self.context = context
        self.source = LengthSource(arguments.gsm8k, arguments.tokenizer)

    def repeats(self, default: int) -> int:
        return self.arguments.repeats or (3 if self.arguments.quick else default)

    def some(self, cases: Sequence[T]) -> Sequence[T]:
        """All; in a smoke test, the first."""
        return cases[:1] if self.arguments.quick else cases

    def size(self, case: Case) -> Case:
        return case.small() if self.arguments.quick else case

    def ours(self, case: Case, plain: PlainLoop | None, methods: list[Method]) -> list[Trainer]:
        """A trainer per method, over one engine; a plain loop gets the initial weights."""
        config = case.config(self.arguments.zero)
        if plain:
            plain.load(build_model(config.model, config.parallel, self.context, config.seed))
        engine = build_engine(config, self.context)
        data = dataset(case, self.source)
        return [trainer(method, data, engine, config, self.context) for method in methods]

    def plain(self, case: Case) -> PlainLoop:
        config = case.config(self.arguments.zero)
        return PlainLoop(case, config.optimizer.lr, config.diffusion.epsilon)


def vocab(bench: Bench) -> Iterator[dict[str, Any]]:
    """Ours against the plain loop at two vocabularies, one view and MIRROR. Both draw t from strata (K = n) and take
    each step's samples and t alike, so that as many tokens are masked; each draws its own masks."""
    for case, speed_target, memory_target in bench.some(vocab_cases()):
        if bench.arguments.case not in case.name:
            continue
        case = bench.size(case)
        plain = bench.plain(case)
        trainers = dict(zip(VIEWS, bench.ours(case, plain, [Method(views=v, strata="full") for v in VIEWS])))
        check = check_same_loss(case, trainers[2], plain)
        variants: dict[str, Callable[[int], Any]] = {}
        for views, name in VIEWS.items():
            variants[f"ours, {name}"] = trainers[views].train_step
            variants[f"plain, {name}"] = partial(plain.step, trainers[views], views)
        seconds = interleaved(variants, bench.repeats(7), case.name)
        result = record(case, seconds)
        result["comparison"] = check
        del variants, trainers, plain
        gc.collect()
        for views, name in VIEWS.items():
            pair = seconds[f"plain, {name}"], seconds[f"ours, {name}"]
            result["ratios"].append(compare(f"speed, ours / plain, {name}", *pair, ">=", speed_target))
            if views == 2 or not bench.arguments.quick:
                result["ratios"].append(_memory(bench, case, views, result, memory_target))
        yield result


def _memory_of(bench: Bench, variant: str, case: Case, views: int) -> dict[str, float]:
    """What a process of its own takes for some steps."""
    arguments = bench.arguments
    words = ["--memory-of", variant, "--threads", arguments.threads]
    if arguments.gsm8k:
        words += ["--gsm8k", arguments.gsm8k, "--tokenizer", arguments.tokenizer]
    words += ["--zero", arguments.zero, "--memory-case", case.name, "--memory-views", views]
    words += ["--quick"] if arguments.quick else []
    return peak_memory([str(value) for value in words])


def _memory(bench: Bench, case: Case, views: int, result: dict[str, Any], target: float | None) -> dict[str, Any]:
    """Peak memory of both, each in a process of its own."""
    peaks = {}
    for variant in ("ours", "plain"):
        values = _memory_of(bench, variant, case, views)
        result["memory_mib"][f"{variant}, {VIEWS[views]}"] = values
        peaks[variant] = [values["peak"]]
    return compare(f"peak memory, ours / plain, {VIEWS[views]}", peaks["ours"], peaks["plain"], "<=", target)


def measure_memory(bench: Bench) -> None:
    """The inside of a memory measurement: a few steps of one variant in this process."""
    arguments = bench.arguments
    cases = [*(case for case, _, _ in vocab_cases()), *(case for pair in adapter_cases() for case in pair)]
    case = bench.size({case.name: case for case in cases}[arguments.memory_case])
    method = Method(views=arguments.memory_views, strata="full")
    if arguments.memory_of == "plain":
        import transformers.models.llama.modeling_llama  # noqa: F401  counted with the libraries
    libraries = resident_mib()
    if arguments.memory_of == "ours":
        (ours,) = bench.ours(case, None, [method])
        step = cast(Callable[[int], Any], ours.train_step)
        model = whole_model(ours)
    else:
        plain = bench.plain(case)
        config = case.config(arguments.zero)
        samples = trainer(method, dataset(case, bench.source), None, config, bench.context)
        step = partial(plain.step, samples, arguments.memory_views)
        model = plain.model
    for index in range(NUM_MEMORY_STEPS):
        step(index)
    report_memory(libraries, num_parameters(model))


def check_same_loss(case: Case, ours: Trainer, plain: PlainLoop) -> dict[str, float]:
    """Train step 0 of both on the same weights and masks; refuse to time two loops that compute different things."""
    micro_batches = source_of(ours).loader.batch(0).micro_batches
    batches = [view for micro in micro_batches for view in as_plain(source_of(ours).noise(micro, 0), ours)]
    theirs = plain.optimize(batches, source_of(ours).noise.views)
    mine = ours.train_step(0)
    loss = abs(mine.loss / theirs.loss - 1.0)
    norm = abs(mine.grad_norm / theirs.grad_norm - 1.0)
    print(
        f"{case.name}: first batch, MIRROR: loss {mine.loss:.6f} (plain {theirs.loss:.6f}, relative difference "
        f"{loss:.1e}), gradient norm {mine.grad_norm:.5f} (plain {theirs.grad_norm:.5f}, {norm:.1e})"
    )
    if case.dtype == "fp32" and loss > LOSS_TOLERANCE:
        raise UserError(
            f"{case.name}: the two losses differ by more than {LOSS_TOLERANCE}; the timings would not compare"
        )
    return {"ours": mine.loss, "plain": theirs.loss, "loss_difference": loss, "grad_norm_difference": norm}


def precision(bench: Bench) -> Iterator[dict[str, Any]]:
    """Our step in bf16 against fp32, same model, samples and masks."""
    for make in bench.some(PRECISION_CASES):
        cases = {dtype: bench.size(make(dtype)) for dtype in ("fp32", "bf16")}
        trainers = {dtype: bench.ours(case, None, [Method(strata="full")])[0] for dtype, case in cases.items()}
        variants = {dtype: ours.train_step for dtype, ours in trainers.items()}
        seconds = interleaved(variants, bench.repeats(15), cases["bf16"].name.removesuffix("-bf16"))
        result = record(cases["bf16"], seconds)
        result["ratios"].append(compare("speed, bf16 / fp32", seconds["fp32"], seconds["bf16"], ">=", 1.5))
        del variants, trainers
        gc.collect()
        yield result


def method(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every method over one engine, with the standard step. P-POTS draws t from p(t) = 1 + 0.5 cos(2πt), which is not
    uniform but has mean 1/2, so that as many masked rows reach the head; methods share each step's quantiles."""
    case = bench.size(quickstart_case("bf16" if platform.multiplies_bf16() else "fp32"))
    trainers = dict(zip(METHODS, bench.ours(case, None, [method for method, _ in METHODS.values()])))
    variants: dict[str, Callable[[int], Any]] = {name: ours.train_step for name, ours in trainers.items()}
    variants["EMA"] = _watched(trainers["EMA"], _ema)
    variants["re-fitting"] = _watched(trainers["re-fitting"], _collect_moments)
    seconds = interleaved(variants, bench.repeats(25), "method")
    result = record(case, seconds)
    result["note"] = "P-POTS with p(t) = 1 + 0.5 cos(2 pi t): mean t 1/2, as many masked rows as the standard method"
    result["ratios"] = [
        compare(f"step time, {name} / standard", seconds[name], seconds["standard"], "<=", target)
        for name, (_, target) in METHODS.items()
        if name != "standard"
    ]
    yield result


def _watched(trainer: Trainer, watch: Callable[[StepResult, dict[str, Any]], None]) -> Callable[[int], StepResult]:
    """A step with what a hook of the method does after it."""
    memory: dict[str, Any] = {}

    def step(index: int) -> StepResult:
        result = trainer.train_step(index)
        watch(result, memory)
        return result

    return step


def _ema(result: StepResult, memory: dict[str, Any]) -> None:
    variate = memory.setdefault("variate", CentredVariate.new(10, 0.01))
    mass = UniformSampler().weighted_mass(10)
    batch = WeightedLosses(result.t, result.weight, result.term / result.weight, mass)
    variate.adjusted(batch)
    variate.update(batch)
    variate.state()


def _collect_moments(result: StepResult, memory: dict[str, Any]) -> None:
    """Every step of re-fitting but the fit itself."""
    sums = MomentSums.of(result.moments, 70)
    memory["sums"] = memory.get("sums", sums).plus(sums, 0.99)
    memory["sums"].sums.tolist()


def limit(bench: Bench) -> Iterator[dict[str, Any]]:
    """Each case's step against the processor's matrix products: see limit.py."""
    for case, target in bench.some(LIMIT_CASES):
        if bench.arguments.case not in case.name:
            continue
        case = bench.size(case)
        (ours,) = bench.ours(case, None, [Method(strata="full")])
        found = limit_of(case, ours, bench.repeats(25))
        result = record(case, {"step": found["seconds"]})
        result["note"] = "seconds of a step by kind: " + ", ".join(
            f"{kind} {1000 * value:.1f} ms" for kind, value in found["profile_seconds"].items()
        )
        result["limit"] = found
        peak = [max(found["peaks"])] * len(found["seconds"])
        result["ratios"] = [compare("model FLOPs / matrix products'", found["flops_per_second"], peak, ">=", target)]
        del ours
        gc.collect()
        yield result


def adapters(bench: Bench) -> Iterator[dict[str, Any]]:
    """Adapters against training every parameter, on the same batches."""
    for pair in bench.some(adapter_cases()):
        cases = dict(zip(("full", "LoRA"), (bench.size(case) for case in pair)))
        trainers = {name: bench.ours(case, None, [Method(strata="full")])[0] for name, case in cases.items()}
        seconds = interleaved(
            {name: ours.train_step for name, ours in trainers.items()}, bench.repeats(15), pair[0].name
        )
        result = record(cases["full"], seconds)
        result["note"] = f"LoRA of rank {RANK} beside all matrices of the layers; memory without the libraries'"
        result["ratios"] = [compare("step time, LoRA / full", seconds["LoRA"], seconds["full"], "<=", TIME_TARGET)]
        del trainers
        gc.collect()
        values = {name: _memory_of(bench, "ours", case, 1) for name, case in cases.items()}
        result["memory_mib"] = values
        lora, full = ([values[name]["peak"] - values[name]["libraries"]] for name in ("LoRA", "full"))
        result["ratios"].append(compare("peak memory, LoRA / full", lora, full, "<=", MEMORY_TARGET))
        yield result


def record(case: Case, seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        "case": {**vars(case)},
        "description": f"{case.name}: {case.num_layers} layers × {case.hidden_size}, vocabulary {case.vocab_size:,}, "
        f"{case.global_size} samples a step, micro-batches of {case.micro_size}, lengths '{case.lengths}'",
        "seconds": seconds,
        "median_seconds": medians,
        "samples_per_second": {name: case.global_size / median for name, median in medians.items()},
        "memory_mib": {},
        "ratios": [],
    }


SUITES: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "vocab": vocab,
    "precision": precision,
    "method": method,
    "head": lambda bench: head_suite(bench.arguments),
    "limit": limit,
    "adapters": adapters,
}
