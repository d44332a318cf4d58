"""Train a sentencepiece tokenizer: the program is megatron_mdm/cli/tokenizer.py."""

from megatron_mdm.cli.tokenizer import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
