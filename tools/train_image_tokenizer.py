"""Train a small image tokenizer: the program is megatron_mdm/cli/image_tokenizer.py."""

from megatron_mdm.cli.image_tokenizer import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
