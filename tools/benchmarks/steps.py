"""This stack's training step against a plain PyTorch loop, bf16 against fp32, each method against the standard,
and the head alone against full logits.

python -m tools.benchmarks steps vocab precision method head --output benchmark.json

Every ratio is one of medians of interleaved steps in one process; peak memory is that of a process of its own. The
step is the real one: collation, noising, forward, backward, clipping, AdamW. Runs on CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_mdm.parallel import platform

platform.quiet_libraries()

import torch  # noqa: E402

from megatron_mdm.config.files import write_json  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402
from tools.benchmarks.head import measure_head_memory  # noqa: E402
from tools.benchmarks.measure import NUM_WARM_UPS, machine_info  # noqa: E402
from tools.benchmarks.suites import SUITES, Bench, measure_memory  # noqa: E402


def show(result: dict[str, Any]) -> None:
    """A table of one case; beside each ratio of medians, the quartiles of the ratios of single rounds."""
    print(f"\n{result['description']}")
    if "note" in result:
        print(f"  {result['note']}")
    print(f"  {'':<24}{'ms/step':>10}{'samples/s':>12}{'peak MiB':>10}{'beyond states MiB':>20}")
    for name, median in result["median_seconds"].items():
        memory = result["memory_mib"].get(name)
        columns = f"{memory['peak']:>10.0f}{memory['beyond']:>20.0f}" if memory else ""
        print(f"  {name:<24}{1000 * median:>10.1f}{result['samples_per_second'][name]:>12.1f}{columns}")
    for ratio in result["ratios"]:
        low, middle, high = ratio["rounds_quartiles"]
        verdict = {True: ": met", False: ": NOT met", None: ""}[ratio.get("met")]
        spread = "" if low == high else f"single rounds: {low:.3f}, {middle:.3f}, {high:.3f}; "
        print(f"  {ratio['what']:<46}{ratio['ratio']:>7.3f}  ({spread}target {ratio['target']}{verdict})")
    print(flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"{', '.join(SUITES)}; all, where none is named")
    parser.add_argument("--output", default="", help="JSON file for raw timings, ratios and the machine")
    parser.add_argument("--repeats", type=int, default=0, help="timed rounds; 0: 7 for vocab, 15 for the others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--zero", type=int, default=0, choices=range(4), help="ZeRO stage of our engine")
    parser.add_argument("--gsm8k", type=Path, help="JSONL whose lengths are taken; else a distribution like GSM8K's")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer for --gsm8k")
    parser.add_argument("--case", default="", help="only cases whose name holds this text, such as 126464-fp32")
    parser.add_argument("--quick", action="store_true", help="a smoke test; its ratios mean little")
    parser.add_argument("--memory-of", choices=["ours", "plain"], default="", help=argparse.SUPPRESS)
    parser.add_argument("--head-memory-of", choices=["ours", "plain"], default="", help=argparse.SUPPRESS)
    parser.add_argument("--head-dtype", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--memory-case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--memory-views", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [suite for suite in arguments.suites if suite not in SUITES]
    if unknown:
        parser.error(f"no such suite: {', '.join(unknown)} (known: {', '.join(SUITES)})")
    if bool(arguments.gsm8k) != bool(arguments.tokenizer):
        parser.error("--gsm8k and --tokenizer go together")
    for path in (arguments.gsm8k, arguments.tokenizer):
        if path and not path.is_file():
            parser.error(f"{path}: no such file")
    return arguments


def main() -> None:
    arguments = parse()
    context = initialize()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bench = Bench(arguments, context)
    if arguments.head_memory_of:
        measure_head_memory(arguments.head_memory_of, arguments.head_dtype)
        return
    if arguments.memory_of:
        measure_memory(bench)
        return
    info = machine_info()
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    print(f"GSM8K's lengths: {bench.source.used}", flush=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for suite in arguments.suites or SUITES:
        for result in SUITES[suite](bench):
            show(result)
            results.setdefault(suite, []).append(result)
    if arguments.output:
        settings = {"quick": arguments.quick, "zero": arguments.zero, "warm_up_rounds": NUM_WARM_UPS}
        settings["gsm8k_lengths"] = bench.source.used
        write_json(Path(arguments.output), {"machine": info, "settings": settings, "suites": results})
        print(f"written: {arguments.output}")
