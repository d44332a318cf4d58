"""The programs: `mdm NAME …`, one file each. The files of launch/ and tools/ call the same code.

Little is imported here: processes that a program starts import it again.
"""

from megatron_mdm.parallel.defaults import set_defaults

set_defaults()  # before a program imports torch
