"""Errors that end a command with a message instead of a traceback."""

import difflib
import sys
from collections.abc import Iterable


def tell(text: str) -> None:
    """Prints a line for people on stderr; stdout is for the result of a command."""
    print(f"hvd-dqn: {text}", file=sys.stderr, flush=True)


def nearest(name: str, known: Iterable[str], least: float = 0.5) -> str:
    """What to add to a message about `name`, which is none of the `known`; `least` is how alike two names must look."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=least)
    return f" Did you mean `{close[0]}`?" if close else ""


class InputError(ValueError):
    """The input is wrong: what was asked for cannot be done. Exit code 2, before any rank trains."""


class RunError(RuntimeError):
    """The running job cannot continue, for a reason outside this program. Exit code 1.

    One rank raises it, and ends the other ranks too.
    """


class JobError(RunError):
    """A RunError that all ranks raise together: only the chief prints it, and each rank ends by itself."""


class RanksChanged(Exception):
    """Hosts have joined or will leave, and all ranks agreed to form a new group. Not an error."""
