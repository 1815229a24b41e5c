"""Errors meant for the person at the keyboard: one line that names the place and says what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The input is wrong. The message names the file, row or key and says what to do.

    The command line prints it as one line and exits with status 2; in Python it is an ordinary exception.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: `; did you mean 'x'?`, or the list of valid names when nothing is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(names)}" if names else ""


def check_known(given: Iterable[str], valid: Iterable[str], what: str, where: str) -> None:
    """Raise `UserError` for the first name in `given` that is not in `valid`."""
    valid = list(valid)
    for name in given:
        if name not in valid:
            raise UserError(f"{where}: unknown {what} {name!r}{nearest(name, valid)}")
