"""What this job may use of its host: the least of what the kernel, control groups (cgroups) and Slurm allow."""

import contextlib
import math
import os
import re
import resource
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hvd_dqn.errors import InputError

ROOT = Path("/")
OTHER_FILES = 256  # that a rank has open besides the watchdog's connections, about: libraries, pipes, MPI's sockets
LIBRARIES = 300_000_000  # bytes of memory in a rank that trains CartPole; with less than 250 MB it was killed
MEGABYTE = 1 << 20  # Slurm's megabytes


class Limit(NamedTuple):
    """A limit, and where it comes from, in words for display."""

    value: float
    source: str


def cores(environ: Mapping[str, str] | None = None, root: Path = ROOT) -> Limit:
    """How many cores this process may use together with its neighbours of the same job; a fraction under a CPU quota.

    SLURM_CPUS_ON_NODE is the job's on this node, shared by all its tasks there, and SLURM_CPUS_PER_TASK one task's. The
    second counts in tasks of srun alone: in a batch script, or in ranks of mpirun, it says nothing of this process.
    """
    environ = os.environ if environ is None else environ
    found = [Limit(len(os.sched_getaffinity(0)), "affinity")]
    found += filter(None, [cpu_quota(root), _of_slurm(environ, "SLURM_CPUS_ON_NODE")])
    if "SLURM_STEP_NUM_TASKS" in environ and "OMPI_COMM_WORLD_RANK" not in environ:
        found += filter(None, [_of_slurm(environ, "SLURM_CPUS_PER_TASK")])
    return min(found, key=lambda limit: limit.value)


def cpu_quota(root: Path = ROOT) -> Limit | None:
    """The least CPU time per wall time that a cgroup of this process allows, in cores. Its processes share it."""
    found = []
    for folder in _groups("cpu", root):
        numbers = [_number(folder, name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]  # v1
        with contextlib.suppress(OSError):
            numbers = [_digits(word) for word in (folder / "cpu.max").read_text().split()]  # v2: "max 100000"
        quota, period = numbers if len(numbers) == 2 else (None, None)
        if quota and period:
            found.append(Limit(quota / period, f"CPU quota of {folder}"))
    return min(found, key=lambda limit: limit.value, default=None)


def available_memory(sharers: int = 1, environ: Mapping[str, str] | None = None, root: Path = ROOT) -> Limit:
    """How many bytes the `sharers` processes of this job on this host may still take, together with all their neighbours.

    Whether Slurm enforces its limit by a cgroup or not, these processes have used some of it. Each is taken to use as
    much as this one.
    """
    environ = os.environ if environ is None else environ
    found = [Limit(_kilobytes(root / "proc/meminfo", "MemAvailable"), "the host")]
    for folder in _groups("memory", root):
        taken = _used_by_group(folder)
        found += [Limit(limit - taken, f"memory limit of {folder}") for limit in _limits_of_group(folder)]
    used = sharers * _kilobytes(root / "proc/self/status", "VmRSS")
    found += [limit._replace(value=limit.value - used) for limit in _slurms_memory(environ)]
    least = min(found, key=lambda limit: limit.value)
    return least._replace(value=max(0.0, least.value))


def check_libraries_fit(ranks: int) -> None:
    """Raises InputError if `ranks` of this host cannot even load their libraries: the kernel would kill them without a word."""
    limit = total_memory()
    if ranks * LIBRARIES > limit.value:
        raise InputError(
            f"TensorFlow alone takes about {LIBRARIES / 1e6:.0f} MB in each rank, and this job may have "
            f"{limit.value / 1e6:,.0f} MB here ({limit.source}). Received: {ranks} rank{'s' * (ranks > 1)} on "
            f"{socket.gethostname()}. Ask for more memory (sbatch --mem, docker run -m), or start fewer ranks."
        )


def allow_open_files(needed: int) -> None:
    """Raises this process's own limit of open files as far as it may. The default, 1,024, is for a thousand ranks too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def total_memory(environ: Mapping[str, str] | None = None, root: Path = ROOT) -> Limit:
    """How many bytes all processes of this job may have on this host, whatever they have by now."""
    environ = os.environ if environ is None else environ
    found = [Limit(_kilobytes(root / "proc/meminfo", "MemTotal"), "the host"), *_slurms_memory(environ)]
    for folder in _groups("memory", root):
        found += [Limit(limit, f"memory limit of {folder}") for limit in _limits_of_group(folder)]
    return min(found, key=lambda limit: limit.value)


def _slurms_memory(environ: Mapping[str, str]) -> Iterator[Limit]:
    """SLURM_MEM_PER_NODE, and SLURM_MEM_PER_CPU for each of SLURM_CPUS_ON_NODE: the job's on this node."""
    per_node, per_cpu = (_of_slurm(environ, f"SLURM_MEM_PER_{what}") for what in ("NODE", "CPU"))
    if per_node:
        yield Limit(per_node.value * MEGABYTE, per_node.source)
    if per_cpu and (on_node := _of_slurm(environ, "SLURM_CPUS_ON_NODE")):
        yield Limit(per_cpu.value * on_node.value * MEGABYTE, per_cpu.source)


def _limits_of_group(folder: Path) -> list[int]:
    """The limits of a memory cgroup in bytes. One of version 1 also knows the least above it."""
    found = [_number(folder, name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    found.append(_statistics(folder).get("hierarchical_memory_limit"))
    return [limit for limit in found if limit is not None]


def _used_by_group(folder: Path) -> int:
    """The bytes that a memory cgroup has. Cached pages of files are given back when others need memory."""
    usage, cached = "memory.current", ["inactive_file", "active_file", "slab_reclaimable"]  # v2
    if (folder / "memory.usage_in_bytes").exists():  # v1
        usage, cached = "memory.usage_in_bytes", ["total_inactive_file", "total_active_file"]
    statistics = _statistics(folder)
    return (_number(folder, usage) or 0) - sum(statistics.get(name, 0) for name in cached)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the cgroups that limit this process: its own and all above it, as far as they are mounted here.

    A container sees its own group as the root of what is mounted, or in a name space of its own as the root of all.
    """
    with contextlib.suppress(OSError, ValueError):
        paths: dict[str, PurePosixPath] = {}  # by controller, "" for version 2
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), PurePosixPath(group))
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            mount, filesystem = (part.split() for part in line.split(" - ", 1))
            kind, options = filesystem[0], filesystem[-1].split(",")
            if kind == "cgroup2":
                path = paths.get("")
            else:
                path = paths.get(controller) if kind == "cgroup" and controller in options else None
            if path is None:
                continue
            mounted, at = _unescaped(mount[3]), _unescaped(mount[4])
            inside = PurePosixPath()  # if the group lies outside of what is mounted, that is what a container sees
            if path.is_relative_to(mounted) and ".." not in path.parts:
                inside = path.relative_to(mounted)
            for folder in (inside, *inside.parents):
                yield root / at.lstrip("/") / folder


def _unescaped(word: str) -> str:
    r"""A path of mountinfo, where a blank is \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)


def _number(folder: Path, name: str) -> int | None:
    try:
        return _digits((folder / name).read_text())
    except OSError:
        return None


def _digits(text: str) -> int | None:
    """None for "max" and for -1, which both mean no limit."""
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _statistics(folder: Path) -> dict[str, int]:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split() for line in lines)}


def _of_slurm(environ: Mapping[str, str], name: str) -> Limit | None:
    """None where Slurm set no limit; --mem=0 means all of the node's memory."""
    number = _digits(environ.get(name, ""))
    return Limit(number, f"{name}={number}") if number else None


def _kilobytes(file: Path, name: str) -> float:
    """The bytes in a line such as "MemAvailable:   20620 kB"; infinity if there is none."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * float(line.split()[1])
    return 0.0 if name == "VmRSS" else math.inf
