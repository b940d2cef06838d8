"""What the doctor finds out about a host by the standard library alone, and so also when NumPy or TensorFlow is broken."""

import ctypes
import ipaddress
import json
import os
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from hvd_dqn import __version__
from hvd_dqn.loading import cure, replaced, versions
from hvd_dqn.ranks import limits
from hvd_dqn.ranks.placement import launched_ranks, local_size

SEGMENT = 4 << 20  # bytes of /dev/shm that Open MPI 4 takes for each rank
SINGLE_COPY = "OMPI_MCA_btl_vader_single_copy_mechanism"

Ranks = Sequence[dict[str, Any]]


def describe_host() -> dict[str, Any]:
    """What one rank reports about its host: JSON values."""
    cores, memory, quota = limits.cores(), limits.available_memory(local_size()), limits.cpu_quota()
    return {
        "limits": {"cores": [*cores], "memory": [*memory], "quota": None if quota is None else quota.value},
        "replaced": [list(each) for each in replaced()],
        "shared_memory": shared_memory(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "address": own_address(),
    }


def shared_memory(folder: str = "/dev/shm") -> int | None:
    """The bytes that it can hold at most."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def own_address() -> str | None:
    """The address of this host's name, as other programs here find it."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def mpirun_version() -> str | None:
    """What `mpirun --version` says of itself; None without one."""
    program = shutil.which("mpirun")
    if program is None:
        return None
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    said = done.stdout.strip() or done.stderr.strip()
    return f"{said.splitlines()[0]} ({program})" if said else None


class Readable:
    """Some memory of this process, which its neighbours try to read as Open MPI does for large messages."""

    TEXT = b"hvd_dqn!"

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(self.TEXT)
        self.place = os.getpid(), ctypes.addressof(self._buffer)


def read_error(process: int, address: int) -> str | None:
    """Why this process may not read the memory of another one of this host; None if it may."""

    class Piece(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "process_vm_readv"):
        return None  # then Open MPI does not use it either
    length = len(Readable.TEXT)
    buffer = ctypes.create_string_buffer(length)
    here, there = Piece(ctypes.addressof(buffer), length), Piece(address, length)
    read = libc.process_vm_readv
    read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    read.restype = ctypes.c_ssize_t
    if read(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) == length and buffer.raw == Readable.TEXT:
        return None
    return os.strerror(ctypes.get_errno())


def by_host(ranks: Ranks) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for host, group in groupby(sorted(ranks, key=lambda rank: rank["host"]), key=lambda rank: rank["host"]):
        yield host, list(group)


def replaced_packages(ranks: Ranks) -> Iterator[str]:
    for host, neighbours in by_host(ranks):
        found = neighbours[0]["replaced"]
        if found:
            changed = ", ".join(f"{package} {version} instead of {pin}" for package, version, pin in found)
            yield (
                f".venv on {host} has {changed}: another package's installation replaced what launch/constraints.txt "
                f"pins. This mends it: {cure([package for package, *_ in found])}"
            )


def other_mpi(ranks: Ranks) -> Iterator[str]:
    chief = ranks[0]
    mpi, mpirun = chief.get("mpi", ""), chief.get("mpirun")
    if mpi.startswith("none") and "mpi4py" in chief["versions"]:
        yield (
            f"mpi4py finds no MPI ({mpi.removeprefix('none: ')}): load the module of the MPI that launch/setup.sh was run "
            "with, or run it again with an mpirun on PATH."
        )
    elif mpi and mpirun and family(mpi) != family(mpirun):
        yield (
            f"mpi4py uses {mpi}, but the mpirun on PATH is another MPI's: {mpirun}. Ranks that it starts do not find each "
            "other. Put the first one's mpirun on PATH, or run launch/setup.sh with the second one's."
        )


def family(said: str) -> tuple[str, str]:
    """The maker of an MPI and its major version, whose launchers and libraries belong together."""
    words = said.lower()
    maker = next(
        (name for name in ("open mpi", "openrte", "intel", "mvapich", "mpich", "hydra") if name in words), words
    )
    maker = {"openrte": "open mpi", "hydra": "mpich"}.get(maker, maker)
    version = re.search(r"(\d+)\.\d", said)
    return maker, version[1] if version and maker == "open mpi" else ""  # the others keep one interface


def unreadable_neighbours(ranks: Ranks) -> Iterator[str]:
    for host, neighbours in by_host(ranks):
        errors = [rank["read_error"] for rank in neighbours if rank.get("read_error")]
        if (
            errors
            and neighbours[0]["settings"].get(SINGLE_COPY) != "none"
            and "Open MPI" in neighbours[0].get("mpi", "")
        ):
            yield (
                f"The ranks on {host} may not read each other's memory ({errors[0]}), as often in containers. Open MPI tries "
                f"it for large messages: set {SINGLE_COPY}=none."
            )


def small_shared_memory(ranks: Ranks) -> Iterator[str]:
    for host, neighbours in by_host(ranks):
        size, needed = neighbours[0]["shared_memory"], SEGMENT * len(neighbours)
        if size is not None and len(neighbours) > 1 and size < needed:
            yield (
                f"/dev/shm on {host} has {size / 1e6:,.0f} MB, and the {len(neighbours)} ranks need {needed / 1e6:,.0f}: "
                "give a container --shm-size 1g, or remount it with a larger size."
            )


def few_open_files(ranks: Ranks) -> Iterator[str]:
    chief = ranks[0]
    needed = chief["size"] + limits.OTHER_FILES
    if 0 <= chief["open_files"] < needed:  # -1: no limit
        yield (
            f"The watchdog of {chief['size']} ranks needs {needed:,} open files on {chief['host']}, where rank 0 is, and "
            f"`ulimit -Hn` allows {chief['open_files']:,}. Let the administrator raise it (/etc/security/limits.conf, or "
            "LimitNOFILE of the batch system's daemon), or turn the watchdog off: --ranks.silence-seconds None."
        )


def loopback_addresses(ranks: Ranks) -> Iterator[str]:
    if len({rank["host"] for rank in ranks}) > 1:
        for host, neighbours in by_host(ranks):
            if _is_loopback(neighbours[0]["address"]):
                yield _loopback(host, neighbours[0]["address"])


def notes(ranks: Ranks) -> list[str]:
    """What does no harm to this job, but would to a larger one."""
    first = ranks[0]
    if len({rank["host"] for rank in ranks}) == 1 and first["address"] == "127.0.1.1":
        return [f"For jobs of several hosts: {_loopback(first['host'], first['address'])}"]
    return []


def _is_loopback(address: str | None) -> bool:
    return address is not None and ipaddress.ip_address(address).is_loopback


def _loopback(host: str, address: str) -> str:
    return (
        f"{host} knows itself as {address}, and other hosts that are told this address reach themselves. Remove the line "
        f"`{address} {host}` from its /etc/hosts (Debian writes one), or let it name the host's address in the network."
    )


HOST_CHECKS = (
    replaced_packages,
    other_mpi,
    unreadable_neighbours,
    small_shared_memory,
    few_open_files,
    loopback_addresses,
)


def told_limits(ranks: Ranks) -> list[str]:
    """In words: what the chief may use, and where another host allows less memory."""
    chief = ranks[0]
    least = min(ranks, key=lambda rank: float(rank["limits"]["memory"][0]))
    rows = [_told(chief["limits"])]
    if least["host"] != chief["host"] and least["limits"]["memory"][0] < 0.9 * chief["limits"]["memory"][0]:
        rows.append(f"on {least['host']}: {_told(least['limits'])}")
    return rows


def _told(found: Mapping[str, Any]) -> str:
    (cores, of_cores), (memory, of_memory) = found["cores"], found["memory"]
    return f"{cores:.4g} core{'s' * (cores != 1)} ({of_cores}), {memory / 1e9:,.1f} GB of memory ({of_memory})"


def show_host(as_json: bool) -> None:
    """Prints what can be told of this host without the libraries that do not load."""
    only = {
        "rank": 0, "size": launched_ranks(), "host": socket.gethostname(), "versions": versions(), "settings": {},
        "mpirun": mpirun_version(), **describe_host(),
    }  # fmt: skip
    problems = [complaint for check in HOST_CHECKS for complaint in check([only])]
    if as_json:
        print(json.dumps({"hvd_dqn": __version__, "ranks": [only], "problems": problems}))
        return
    print("versions ", ", ".join(f"{name} {version}" for name, version in only["versions"].items()))
    for row in told_limits([only]):
        print("limits   ", row)
    if only["mpirun"]:
        print("mpirun   ", only["mpirun"])
    for complaint in [*notes([only]), *problems]:
        print("!", complaint)
