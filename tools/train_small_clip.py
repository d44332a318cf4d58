"""Train a small CLIP: the program is megatron_mdm/cli/small_clip.py."""

from megatron_mdm.cli.small_clip import main
from megatron_mdm.parallel.program import run_program

if __name__ == "__main__":
    run_program(main)
