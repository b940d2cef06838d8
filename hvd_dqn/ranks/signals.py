"""The wish of the outside world that this job stop."""

import os
import signal
from types import FrameType

# Slurm's --signal=USR1@120, a cluster's preemption, and Ctrl-C.
WISHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Notes a signal, for the ranks to vote on at their next fixed cycle; a second Ctrl-C ends this process at once.

    Signals come to one rank or to several, in any order: what a rank does never depends on its own alone.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the first signal that came
        self._interrupts = 0

    def install(self, for_all: bool = True) -> None:
        """In the main thread, as Python wants it. `for_all`: a SIGTERM stops the whole job and not this process alone."""
        for wish in WISHES:
            if for_all or wish != signal.SIGTERM:
                signal.signal(wish, self._note)

    def ignore(self) -> None:
        """For the way out: a launcher that sees one rank end sends SIGTERM to those that are still ending."""
        for wish in WISHES:
            signal.signal(wish, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(130)  # a shell's code for Ctrl-C; the launcher ends the other ranks
        self.name = self.name or signal.Signals(number).name

    def __call__(self) -> bool:
        return self.name is not None
