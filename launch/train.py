"""Train a model on the ranks that a launcher has started: the program is megatron_mdm/cli/train.py."""

from megatron_mdm.cli.train import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
