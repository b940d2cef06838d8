"""The ways in which hvd_dqn refuses to go on, each printed as a message instead of a traceback."""

import difflib
import sys
from collections.abc import Iterable


def tell(text: str) -> None:
    """A line for people, apart from what a command prints as its result."""
    print(f"hvd-dqn: {text}", file=sys.stderr, flush=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add to a message about `name`, which is none of the `known`."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{close[0]}`?" if close else ""


class InputError(ValueError):
    """What the user asked for cannot be done: exit code 2, before any rank trains."""


class RunError(RuntimeError):
    """The running job cannot go on, for a reason that lies outside this program: exit code 1.

    Raised on one rank, which takes the others with it.
    """


class JobError(RunError):
    """A RunError that all ranks raise alike, so that the chief says it and each ends by itself."""


class RanksChanged(Exception):
    """Hosts have joined or will leave, and all ranks agreed to group anew: not an error, but the end of a generation."""
