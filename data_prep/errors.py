"""Mistakes that the user can mend, and the words for them."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input: shown as one line without a traceback; the command exits with status 1.

    The message says what was found, what was expected, where (file, key, line, rank) and what to do.
    """


def exit_status(command: Callable[[], int]) -> int:
    """Runs a command that prints what it finds: its own status, 1 with one line for a UserError or what the system
    refuses (no such file, a full disk), 130 for Ctrl-C, and 0 without a word where its reader has seen enough
    (`| head`)."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"error: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the known one that was probably meant, or all of them."""
    known = list(known)
    match = difflib.get_close_matches(name, known, 1)
    if match:
        return f"did you mean {prefix}{match[0]}?"
    return f"expected one of: {', '.join(prefix + item for item in known)}"
