"""Score a run on the ranks that a launcher has started: the program is megatron_mdm/cli/evaluate.py."""

from megatron_mdm.cli.evaluate import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
