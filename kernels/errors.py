"""The one exception for a user's mistake: the command line prints its message and exits with 2, without a traceback."""


class UserError(ValueError):
    """Bad input. The message is one or two sentences that name the field, its value and the remedy."""
