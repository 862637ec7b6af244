"""The one exception that users are meant to see."""


class UserError(Exception):
    """Something the user can mend. Its text is one sentence: what is wrong and what to do.

    The command line prints it on one line and exits with status 2, without a traceback.
    """
