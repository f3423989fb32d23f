"""Mistakes that the user can mend, and the words for them."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: shown as one line without a traceback; the command exits with status 1.

    The message says what was found, what was expected, where (file, key, line, rank) and what to do.
    """


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the known one that was probably meant, or all of them."""
    known = list(known)
    match = difflib.get_close_matches(name, known, 1)
    if match:
        return f"did you mean {prefix}{match[0]}?"
    return f"expected one of: {', '.join(prefix + item for item in known)}"
