"""One command for all benchmarks: python -m tools.benchmarks NAME …, from the project's root."""

import sys
from importlib import import_module

BENCHMARKS = {  # each is the module of its name beside this file
    "steps": "a training step against a plain PyTorch loop and the processor's limit; bf16, methods, the head",
    "batching": "packed and bucketed with padded batches",
    "corpus": "corpus preparation with the tokenizer library alone",
    "saving": "the wait for a checkpoint in the background with a whole save",
    "checkpoints": "import and export with a plain copy",
    "host": "batches and noise a step ahead with batches when they are wanted, at a GPU's rates",
    "generation": "ways of decoding: steps, caches, thresholds",
}


def main() -> None:
    """Run the benchmark that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in BENCHMARKS:
        wrong = name not in ("-h", "--help")
        lines = [f"  {known:<12} {what}" for known, what in BENCHMARKS.items()]
        text = "\n".join(["usage: python -m tools.benchmarks NAME …", *lines, "NAME --help describes its arguments."])
        print(f"error: no such benchmark: {name}\n{text}" if wrong else text, file=sys.stderr if wrong else sys.stdout)
        sys.exit(2 if wrong else 0)
    sys.argv = [f"tools.benchmarks {name}", *arguments]
    benchmark = import_module(f"tools.benchmarks.{name}")
    from megatron_mdm.parallel.program import run_program

    run_program(benchmark.main)


if __name__ == "__main__":
    main()
