"""Hugging Face checkpoints in and out: the program is megatron_mdm/cli/convert.py."""

from megatron_mdm.cli.convert import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
