"""torchrun less its traceback: the program is megatron_mdm/cli/launcher.py."""

import sys

from megatron_mdm.cli.launcher import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
