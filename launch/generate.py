"""Answer prompts on the ranks that a launcher has started: the program is megatron_mdm/cli/generate.py."""

from megatron_mdm.cli.generate import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
