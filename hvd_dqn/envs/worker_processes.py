"""Starts and ends the worker processes in which Gymnasium steps environments, and explains their failures."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import gymnasium
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from hvd_dqn.envs.wrappers import EnvFailure, one_line
from hvd_dqn.printing import MOST_LINES, FewLines


def start(makers: Sequence[Callable[[], gymnasium.Env]], shows_first: bool = True) -> AsyncVectorEnv:
    """One process for each of `makers`, in which it makes its environment. At most the first shows what it prints."""
    # What Gymnasium logs of a worker's end, with its traceback, is in our own message.
    warnings.filterwarnings("ignore", module=r"gymnasium\.vector\.async_vector_env")
    with _plain_children():
        return AsyncVectorEnv(
            [functools.partial(_make_in_worker, maker, shows_first and i == 0) for i, maker in enumerate(makers)],
            copy=False,
            # Spawned, because a forked child would share the parent's MPI and TensorFlow threads.
            context="spawn",
            autoreset_mode=AutoresetMode.SAME_STEP,
        )


def _make_in_worker(maker: Callable[[], gymnasium.Env], shows: bool) -> gymnasium.Env:
    if multiprocessing.parent_process() is not None:  # Gymnasium also makes one in the rank itself, for its spaces
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal: the rank decides how to end
        sys.stdout = FewLines(MOST_LINES if shows else 0)
    return maker()


@contextlib.contextmanager
def _plain_children() -> Iterator[None]:
    """Hides the main module and the launcher's variables from processes that start inside the block.

    Otherwise a worker would run the main module again, which imports TensorFlow and Horovod. And `import mpi4py` in an
    environment would connect the worker to MPI as if it were the rank.
    """
    main = sys.modules["__main__"]
    names = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    ranked = {k: v for k, v in os.environ.items() if k.startswith(("OMPI_", "PMI_", "PMIX_", "HOROVOD_"))}
    for name in names:
        setattr(main, name, None)
    for name in ranked:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(ranked)
        for name, value in names.items():
            setattr(main, name, value)


def end(vector: AsyncVectorEnv, seconds: float) -> None:
    """Ends worker processes within `seconds`. Gymnasium's own `close` waits for ever if one hangs or has died."""
    if vector.closed:
        return
    vector.closed = True
    deadline = time.monotonic() + seconds
    for pipe in vector.parent_pipes:
        with contextlib.suppress(OSError, AttributeError):  # None: the worker has failed
            pipe.send(("close", None))
    for process in vector.processes:
        _wait(process, deadline)
    for process in vector.processes:
        if process.is_alive():
            process.kill()
        process.join()
    for pipe in vector.parent_pipes:
        if pipe is not None:
            pipe.close()


def failure(vector: AsyncVectorEnv, error: Exception, first: int) -> EnvFailure:
    """Names the workers that made a call of `vector` raise `error`. `first` is the number of the first copy."""
    raised = [i for i, pipe in enumerate(vector.parent_pipes) if pipe is None]
    if raised:
        return EnvFailure([first + i for i in raised], "failed", f"{type(error).__name__}: {one_line(error)}")
    gone = [i for i, pipe in enumerate(vector.parent_pipes) if _hung_up(pipe)]
    ends = []
    for process in (vector.processes[i] for i in gone):
        _wait(process, time.monotonic() + 1)  # the pipe closes a moment before the exit code is known
        ends.append("hung up" if process.exitcode is None else f"ended with exit code {process.exitcode}")
    if gone:
        return EnvFailure([first + i for i in gone], "failed", f"its process {', '.join(sorted(set(ends)))}")
    return EnvFailure(range(first, first + vector.num_envs), "failed", f"{type(error).__name__}: {one_line(error)}")


def _wait(process: BaseProcess, deadline: float) -> None:
    # `join` with a timeout waits for ever for a process that has closed all its files, including its sentinel.
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)


def _hung_up(pipe: Connection) -> bool:
    try:
        while pipe.poll():
            pipe.recv()  # an answer that is no longer needed
    except (EOFError, OSError):
        return True
    return False
