"""Makes real control groups of version 1 for tests, below the one that this process is in."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

MOUNTS = Path("/sys/fs/cgroup")


def own_group(controller: str) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return MOUNTS / controller / path.lstrip("/")
    raise FileNotFoundError(f"no cgroup of version 1 for {controller}")


def missing() -> str | None:
    """Why no group can be made here."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        folders = [own_group(controller) for controller in ("cpu", "memory")]
    except OSError as error:
        return str(error)
    return next((f"{folder} cannot be written" for folder in folders if not os.access(folder, os.W_OK)), None)


class Groups:
    """A memory and a CPU group. `enter` is the start of a command that runs in both."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        script = "".join(f"echo $$ >{folder}/cgroup.procs && " for folder in folders) + 'exec "$@"'
        self.enter = ["bash", "-c", script, "-"]


@contextlib.contextmanager
def limited(cores: float | None = None, memory: int | None = None) -> Iterator[Groups]:
    """Groups with a quota of CPU time and a limit of memory in bytes; None leaves them without."""
    with contextlib.ExitStack() as removing:
        folders = []
        for controller in ("cpu", "memory"):
            folder = own_group(controller) / f"hvd-dqn-test-{os.getpid()}"
            folder.mkdir()
            removing.callback(_remove, folder)
            folders.append(folder)
        cpu, memory_folder = folders
        if cores is not None:
            (cpu / "cpu.cfs_quota_us").write_text(str(round(100_000 * cores)))
            (cpu / "cpu.cfs_period_us").write_text("100000")
        if memory is not None:
            (memory_folder / "memory.limit_in_bytes").write_text(str(memory))
        yield Groups(folders)


def _remove(folder: Path) -> None:
    """A group is busy as long as a process in it has not quite ended."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return folder.rmdir()
        time.sleep(0.1)
    folder.rmdir()
