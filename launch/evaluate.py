"""Score a run's answers: torchrun … launch/evaluate.py --run-dir DIR --data test.jsonl [gen_length=128 …]"""

import argparse
import json
from pathlib import Path

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from megatron_mdm.checkpoint.load import load_for_inference, run_config  # noqa: E402
from megatron_mdm.config.files import write_atomically, write_json  # noqa: E402
from megatron_mdm.config.load import load_section  # noqa: E402
from megatron_mdm.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_mdm.evaluation.exact_match import evaluate_exact_match, read_questions  # noqa: E402
from megatron_mdm.evaluation.tasks import TASKS  # noqa: E402
from megatron_mdm.generation.settings import GenerationConfig  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402
from megatron_mdm.parallel.program import run_program  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", required=True, type=Path, help="a run's folder (checkpoint.directory)")
    parser.add_argument("--data", required=True, help="JSONL with question/answer or prompt/response")
    parser.add_argument("--task", choices=sorted(TASKS), default="gsm8k")
    parser.add_argument("--limit", type=int, default=0, help="questions to ask; 0: all")
    parser.add_argument("--tensor", type=int, default=0, help="tensor-parallel degree; 0: the run's")
    parser.add_argument("generation", nargs="*", metavar="key=value", help=", ".join(GenerationConfig.model_fields))
    arguments = parser.parse_intermixed_args()

    generation = load_section(GenerationConfig, arguments.generation)
    questions = read_questions(arguments.data, TASKS[arguments.task], arguments.limit)
    config = run_config(arguments.run_dir, arguments.tensor)
    tokenizer = load_tokenizer(config.data)
    context = initialize(config.parallel.tensor)
    engine = load_for_inference(arguments.run_dir, config, context)
    task, method = TASKS[arguments.task], config.diffusion.method
    result = evaluate_exact_match(engine, questions, task, tokenizer, generation, context, method)
    if context.is_main:
        samples = result.pop("samples")
        write_json(arguments.run_dir / "evaluation.json", {"task": arguments.task, "data": arguments.data, **result})
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_atomically(arguments.run_dir / "samples.jsonl", lines)
        low, high = result["interval"]
        print(f"exact match: {result['exact_match']:.2f}")
        print(f"{result['num_right']} of {result['num_questions']} right, 95 % interval {low:.3f} to {high:.3f}")
        print(f"samples: {arguments.run_dir / 'samples.jsonl'}", flush=True)


if __name__ == "__main__":
    run_program(main)
