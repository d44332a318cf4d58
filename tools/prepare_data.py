"""Prepare data files, and look at them: the program is megatron_mdm/cli/prepare.py."""

from megatron_mdm.cli.prepare import main

if __name__ == "__main__":
    # Not above: the processes that tokenise import this file, and need no torch.
    from megatron_mdm.parallel.program import run_program

    run_program(main)
