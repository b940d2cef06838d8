"""Starts benchmarks as jobs of several ranks, or as independent processes, with one thread each."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hvd_dqn.errors import InputError, JobError
from hvd_dqn.ranks.placement import is_launched

TIMEOUT = 3_600.0  # seconds
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
READY = "ready"  # what `--gate` prints before it waits
# Horovod recommends these transports, which allow several threads. Unbound: Horovod's thread would share a bound rank's core.
MPIRUN = ("mpirun", "--bind-to", "none", "--map-by", "slot", "-mca", "pml", "ob1", "-mca", "btl", "^openib")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
HVD_DQN = (sys.executable, "-m", "hvd_dqn", "bench")


def check_launcher() -> None:
    """Raises InputError if this process cannot start jobs."""
    if is_launched():
        raise InputError("This benchmark starts its jobs itself: start it alone, without horovodrun, mpirun or srun.")
    if shutil.which("mpirun") is None:
        raise InputError(
            "This benchmark starts jobs of several ranks by mpirun, which is not on PATH: run launch/setup.sh."
        )


def run_job(ranks: int, arguments: Sequence[str]) -> dict[str, Any]:
    """The result of `hvd-dqn bench ARGUMENTS --json` as one job of `ranks` ranks."""
    with _started([[*mpirun(ranks), *HVD_DQN, *arguments, "--json"]]) as (job,):
        return job.answer()


def mpirun(ranks: int) -> list[str]:
    """The command that starts `ranks` ranks on this machine, even if it has fewer cores."""
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []  # otherwise Open MPI refuses
    return [*MPIRUN, "--oversubscribe", *root, "-np", str(ranks)]


def run_independently(processes: int, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The results of independent processes. All start to measure when the last one is ready."""
    with _started([[*HVD_DQN, *arguments, "--json", "--gate"]] * processes) as jobs:
        for job in jobs:
            job.read(READY)
        for job in jobs:
            job.go()
        return [job.answer() for job in jobs]


class _Job:
    """One process, or a launcher with its ranks."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._command, self._errors = command, (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            command,
            env=os.environ | ONE_THREAD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # so that its ranks can be ended with it
        )

    def read(self, beginning: str) -> str:
        """The next line of its output with this beginning. Raises JobError if the process ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(beginning):
                return line
        code = self.process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or ["nothing"]
        raise JobError(f"`{' '.join(self._command)}` ended with code {code} and without a result. It said: {said[-1]}")

    def go(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `answer` reports how
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.read("{"))
        self.process.wait()
        return result

    def kill(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill(signal.SIGTERM)  # mpirun ends its ranks, which have sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        self.kill(signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout, self._errors):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.process.wait()


@contextlib.contextmanager
def _started(commands: Sequence[Sequence[str]]) -> Iterator[list[_Job]]:
    with contextlib.ExitStack() as ending:
        starting, asked = True, False

        def end(number: int, frame: object) -> None:
            nonlocal asked
            asked = True
            if not starting:  # else a process that is just starting would be left behind
                sys.exit(128 + number)

        # The jobs have their own sessions, so only this process can end them.
        before = signal.signal(signal.SIGTERM, end)
        ending.callback(signal.signal, signal.SIGTERM, before)
        jobs = []
        for command in commands:
            folder = ending.enter_context(tempfile.TemporaryDirectory())
            jobs.append(_Job(command, Path(folder)))
            ending.callback(jobs[-1].close)
        starting = False
        if asked:
            sys.exit(128 + signal.SIGTERM)
        clock = threading.Timer(TIMEOUT, _kill, args=[jobs])
        clock.daemon = True
        clock.start()
        ending.callback(clock.cancel)
        yield jobs


def _kill(jobs: Sequence[_Job]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):  # as in `close`: mpirun ends its ranks
        for job in jobs:
            job.kill(number)
        time.sleep(GRACE)
