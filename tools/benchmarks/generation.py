"""Ways of decoding, side by side: a run's answers to the same questions with each, timed in interleaved repeats.

python -m tools.benchmarks generation --run-dir runs/quickstart --data runs/quickstart_data/test.jsonl \\
    gen_length=16 block_length=8 steps=16 batch_size=64

Prints for each way the exact-match score, the shares of texts and of tokens equal to exact decoding's, forward passes
an answer, and the speed-up over exact decoding: the ratio of the medians of seconds. One process; on a CPU its own CPU
seconds, which other processes of the machine disturb less than the clock.
"""

import argparse
import statistics
import time
from pathlib import Path

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from megatron_mdm.checkpoint.load import load_for_inference, run_config  # noqa: E402
from megatron_mdm.config.load import load_section  # noqa: E402
from megatron_mdm.data.records import BadRecords  # noqa: E402
from megatron_mdm.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_mdm.evaluation.exact_match import read_questions  # noqa: E402
from megatron_mdm.evaluation.tasks import TASKS  # noqa: E402
from megatron_mdm.generation.generate import generate  # noqa: E402
from megatron_mdm.generation.settings import GenerationConfig, Response, SpecialIds  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402

WAYS = {  # changes of the settings on the command line
    "exact": {},
    "half the steps": None,
    "stop at eos": {"stop_at_eos": True},
    "least entropy first": {"remasking": "entropy"},
    "greatest margin first": {"remasking": "topk_margin"},
    "threshold 0.95": {"threshold": 0.95},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.8": {"threshold": 0.8},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "prefix cache, threshold 0.9": {"cache": "prefix", "threshold": 0.9},
    "dual cache, threshold 0.9, stop at eos": {"cache": "dual", "threshold": 0.9, "stop_at_eos": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", choices=sorted(TASKS), default="gsm8k")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("generation", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()

    base = load_section(GenerationConfig, arguments.generation)
    task = TASKS[arguments.task]
    config = run_config(arguments.run_dir, 1)
    tokenizer = load_tokenizer(config.data)
    room = base.room(config.model)
    questions = read_questions(arguments.data, task, arguments.limit, tokenizer, config.data, BadRecords(), room)
    context = initialize()
    special = SpecialIds.of(tokenizer)
    engine = load_for_inference(arguments.run_dir, config, context)
    prompts = [question.prompt.ids for question in questions]
    clock = time.perf_counter if platform.is_cuda() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    responses = {}
    for repeat in range(arguments.repeats + 1):  # the first warms up
        for name, changes in WAYS.items():
            settings = base.model_copy(update={"steps": base.steps // 2} if changes is None else changes)
            began = clock()
            responses[name] = generate(engine, prompts, settings, special, context)
            if repeat:
                seconds[name].append(clock() - began)
    texts = {name: [tokenizer.decode(r.tokens) for r in found] for name, found in responses.items()}
    print(f"{len(prompts)} questions, {base.gen_length} tokens in blocks of {base.block_length}, {base.steps} steps")
    print(f"{'':40s}{'score':>8s}{'same text':>11s}{'tokens':>8s}{'passes':>9s}{'seconds':>9s}{'speed-up':>10s}")
    for name in WAYS:
        right = sum(task.extract(text) == answer for text, (_, answer) in zip(texts[name], questions))
        same = sum(ours == theirs for ours, theirs in zip(texts[name], texts["exact"]))
        tokens = _equal_tokens(responses[name], responses["exact"])
        passes = sum(response.steps for response in responses[name]) / len(prompts)
        median = statistics.median(seconds[name])
        speedup = statistics.median(seconds["exact"]) / median
        print(
            f"{name:40s}{right / len(prompts):8.3f}{same / len(prompts):11.3f}{tokens:8.3f}{passes:9.2f}{median:9.2f}"
            f"{speedup:9.2f}×"
        )


def _equal_tokens(ours: list[Response], theirs: list[Response]) -> float:
    """The share of all response positions that hold the same token."""
    pairs = [pair for a, b in zip(ours, theirs) for pair in zip(a.tokens, b.tokens)]
    return sum(a == b for a, b in pairs) / len(pairs)
