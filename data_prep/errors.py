"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """Bad input: shown as one line without a traceback; the command exits with status 1.

    The message says what was found, what was expected, where (file, key, line, rank) and what to do.
    """
