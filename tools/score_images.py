"""Score pictures on disk against their captions: the program is megatron_mdm/cli/image_scores.py."""

from megatron_mdm.cli.image_scores import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
