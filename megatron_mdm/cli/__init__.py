"""The programs: `mdm NAME …`, one file each. The files of launch/ and tools/ call the same code.

Nothing is imported here: processes that a program starts import it again.
"""
