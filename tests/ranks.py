"""Starts real ranks for tests, with a timeout, and leaves no process behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# Generous: a busy machine needs a while for two imports of TensorFlow. It only guards against hangs.
TIMEOUT = 300


def run(
    command: Sequence[str | Path], cwd: Path = ROOT, timeout: float = TIMEOUT, **env: str
) -> subprocess.CompletedProcess:
    """Runs `command` in a session of its own and kills all of that session when it takes too long."""
    # Without the variables of a launcher: these tests may themselves run under one.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_COMM_WORLD", "PMIX_", "HOROVOD_"))}
    clean |= {"PATH": f"{BIN}:{os.environ['PATH']}", "OMPI_MCA_rmaps_base_oversubscribe": "1", **env}
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=clean,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"hung for {timeout} s: {command}\n{out}\n{err}") from None
    except BaseException:  # Ctrl-C: the next to measure shall have the cores to itself
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def horovodrun(ranks: int, *command: str | Path, gloo: bool = False, **options) -> subprocess.CompletedProcess:
    return run(["horovodrun", *(["--gloo"] if gloo else []), "-np", str(ranks), *command], **options)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that run in this folder, or have a path in it among their arguments."""
    found = [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.pid != os.getpid()]
    return [p for p in found if any(str(folder) in word for word in [*(p.info["cmdline"] or []), p.info["cwd"] or ""])]


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def checkpoints(folder: Path) -> list[int]:
    """The total steps of those of the run in `folder` that one can go on from."""
    found = []
    for path in (folder / "run/checkpoints").glob("*/MANIFEST.json"):
        with contextlib.suppress(FileNotFoundError):  # cleared away in this very moment
            found.append(json.loads(path.read_text()))
    return sorted(manifest["total_steps"] for manifest in found if manifest["resumable"])
