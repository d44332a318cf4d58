"""Answer prompts: torchrun … launch/generate.py --run-dir DIR --prompts in.jsonl --output out.jsonl [key=value …]"""

import argparse
import json
from pathlib import Path

from megatron_mdm.parallel import platform

platform.quiet_libraries()

from megatron_mdm.checkpoint.load import load_for_inference, run_config  # noqa: E402
from megatron_mdm.config.files import write_atomically  # noqa: E402
from megatron_mdm.config.load import load_section  # noqa: E402
from megatron_mdm.data.sft import encode_prompt, read_prompts  # noqa: E402
from megatron_mdm.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_mdm.generation.generate import generate  # noqa: E402
from megatron_mdm.generation.settings import GenerationConfig, SpecialIds  # noqa: E402
from megatron_mdm.parallel.groups import initialize  # noqa: E402
from megatron_mdm.parallel.program import run_program  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", required=True, type=Path, help="a run's folder (checkpoint.directory)")
    parser.add_argument("--prompts", required=True, help="JSONL with a field 'prompt' or 'question'")
    parser.add_argument("--output", required=True, type=Path, help="JSONL to write: prompt and response")
    parser.add_argument("--tensor", type=int, default=0, help="tensor-parallel degree; 0: the run's")
    parser.add_argument("generation", nargs="*", metavar="key=value", help=", ".join(GenerationConfig.model_fields))
    arguments = parser.parse_intermixed_args()

    generation = load_section(GenerationConfig, arguments.generation)
    prompts = read_prompts(arguments.prompts)
    config = run_config(arguments.run_dir, arguments.tensor)
    tokenizer = load_tokenizer(config.data)
    context = initialize(config.parallel.tensor)
    engine = load_for_inference(arguments.run_dir, config, context)
    special = SpecialIds(tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id)
    ids, method = [encode_prompt(prompt, tokenizer) for prompt in prompts], config.diffusion.method
    responses = generate(engine, ids, generation, special, context, method)
    if context.is_main:
        records = ({"prompt": p, "response": tokenizer.decode(r)} for p, r in zip(prompts, responses))
        write_atomically(arguments.output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        print(f"{len(prompts)} responses: {arguments.output}", flush=True)


if __name__ == "__main__":
    run_program(main)
