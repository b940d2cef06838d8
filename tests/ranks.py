"""Starts real ranks for tests, with a timeout, and leaves no process behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def horovodrun(ranks: int, *command: str | Path, gloo: bool = False, **options) -> subprocess.CompletedProcess:
    return run(["horovodrun", *(["--gloo"] if gloo else []), "-np", str(ranks), *command], **options)
