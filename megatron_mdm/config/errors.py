"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake the user can mend: what is wrong, where, and what to do, in one line.

    Programs print it as `error: …` and exit with code 1; anything else is a defect and keeps its traceback.
    """
