"""Errors that end a command with a message instead of a traceback."""

import difflib
import sys
from collections.abc import Iterable


def tell(text: str) -> None:
    """Prints a line on stderr; stdout is for the result of a command."""
    print(f"hvd-dqn: {text}", file=sys.stderr, flush=True)


def nearest(name: str, known: Iterable[str], least: float = 0.5) -> str:
    """What to add to a message about an unknown `name`: the most similar of `known`, if similar by `least` or more."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=least)
    return f" Did you mean `{close[0]}`?" if close else ""


class InputError(ValueError):
    """The input is wrong. Exit code 2, before any rank trains."""


class LibraryError(InputError):
    """A library cannot be loaded: it is missing, damaged, or was replaced by a version that does not fit the others."""


class RunError(RuntimeError):
    """The running job cannot continue, for a reason outside this program. Exit code 1.

    The rank that raises it ends the other ranks too.
    """


class JobError(RunError):
    """A RunError that all ranks raise together. Only the chief prints it, and each rank ends itself."""


class RanksChanged(Exception):
    """Hosts have joined or will leave, and all ranks agreed to form a new group. Not an error."""
