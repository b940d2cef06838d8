"""Turns signals into a request to stop the job."""

import os
import signal
from types import FrameType

# Slurm's --signal=USR1@120, a cluster's preemption, and Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Records a signal. The ranks vote on it at their next fixed cycle; a second Ctrl-C ends this process at once.

    Signals reach one rank or several, in any order, so no rank may react to its own signal alone.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the first signal
        self._interrupts = 0

    def install(self, for_all: bool = True) -> None:
        """Call it in the main thread, as Python requires. With `for_all` SIGTERM stops the job, else only this rank."""
        for number in STOP_SIGNALS:
            if for_all or number != signal.SIGTERM:
                signal.signal(number, self._note)

    def ignore(self) -> None:
        """Call it at the end: when one rank ends, the launcher may send SIGTERM to ranks that are still ending."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(130)  # the exit code of shells for Ctrl-C; the launcher ends the other ranks
        self.name = self.name or signal.Signals(number).name

    def __call__(self) -> bool:
        return self.name is not None
