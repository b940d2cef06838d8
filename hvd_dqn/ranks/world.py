"""Collectives by Horovod and MPI, or no-ops in a single process. No other module calls either library."""

import functools
import importlib
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from hvd_dqn.errors import InputError, RunError
from hvd_dqn.ranks.placement import FUSED_FLOATS, pin_gpu

LARGEST_FP16 = 65_504.0


def predivision(size: int, elastic: bool = False) -> int:
    """What gradients are divided by before ranks sum them as 16-bit floats; the sum is divided by the rest of `size`.

    Without it a sum overflows where gradients are above 65,504 / size. Divided by all of `size`, most of DQN's gradients
    would be rounded to zero on many ranks: half of the bits to either side, by a power of two, which is exact. 1 in an
    elastic job, whose size may change while Horovod keeps the factor.
    """
    return 1 if elastic else 1 << (((size - 1).bit_length() + 1) // 2)


def largest_gradient(size: int, elastic: bool = False) -> float:
    """Gradients up to this can be averaged by `size` ranks as 16-bit floats."""
    return LARGEST_FP16 * min(1.0, predivision(size, elastic) / size)


class World(Protocol):
    """All ranks of a job, as one of them sees them.

    `broadcast`, `average`, `sum`, `max`, `any`, `gather` and `barrier` are collectives: all ranks call one or none.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    hostname: str
    elastic: bool  # the ranks may become fewer or more while the job runs
    changed: bool  # this rank knows that they will

    def wrap(self, optimizer: Any, compression: str) -> Any:
        """Returns the `tf.compat.v1.train.Optimizer` so that its `compute_gradients` averages over ranks."""

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Overwrites the variables of all ranks with the chief's."""

    def average(self, tensors: Sequence[Any]) -> list[Any]:
        """The mean over ranks of each tensor; inside a tf.function."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The elementwise sum over ranks, in float64. `max` works alike, and `any` for one flag."""

    def max(self, values: np.ndarray) -> np.ndarray: ...

    def any(self, flag: bool) -> bool: ...

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in the order of the ranks, on every rank."""

    def barrier(self) -> None: ...

    def timeline(self, path: Path) -> AbstractContextManager[None]:
        """Inside the block, Horovod writes its collectives to `path` on the chief, in the format of chrome://tracing.

        Not a collective. HOROVOD_TIMELINE must have been DYNAMIC before the world was made.
        """

    def describe(self) -> dict[str, Any]:
        """What Horovod and MPI say about themselves on this rank, for the doctor; empty without them."""

    def abort(self, reason: str) -> NoReturn:
        """Ends every rank of the job at once with exit code 1, after printing `reason` with this rank's name."""


class Solo:
    """A single process: every collective is the identity, and only the standard library is needed."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    elastic = changed = False

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank  # above 0 only in an elastic job, before its ranks are connected
        self.hostname = socket.gethostname()

    def wrap(self, optimizer: Any, compression: str) -> Any:
        return optimizer

    def broadcast(self, variables: Sequence[Any]) -> None:
        pass

    def average(self, tensors: Sequence[Any]) -> list[Any]:
        return list(tensors)

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float64)

    def max(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float64)

    def any(self, flag: bool) -> bool:
        return bool(flag)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass

    def timeline(self, path: Path) -> AbstractContextManager[None]:
        return nullcontext()

    def describe(self) -> dict[str, Any]:
        return _horovod_build()

    def abort(self, reason: str) -> NoReturn:
        print(f"hvd-dqn: {reason}", file=sys.stderr, flush=True)
        sys.exit(1)


class HorovodWorld:
    """Several ranks. Horovod sends tensors. mpi4py sends objects; under Gloo Horovod sends them too.

    Raises RunError if mpi4py and Horovod do not see the same job.
    """

    elastic = changed = False

    def __init__(self) -> None:
        self.gpu = pin_gpu()  # before Horovod starts: it must not see the other ranks' devices
        import horovod.tensorflow as hvd

        from hvd_dqn.graphs import Graph

        self._hvd, self._graph = hvd, Graph
        self._reductions: dict[str, Graph] = {}
        self._comm: Any = None  # mpi4py's communicator; None under Gloo
        if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
            hvd.init()
        else:
            from mpi4py import MPI

            self._comm = MPI.COMM_WORLD
            # Horovod: joining mpi4py's communicator makes the two one job by construction.
            hvd.init(comm=self._comm)
        self._read_ranks()
        self.hostname = socket.gethostname()
        if self._comm is not None:
            self._check_mpi()
        self._abort_on_uncaught_exceptions()

    def _read_ranks(self) -> None:
        hvd = self._hvd
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()

    def _check_mpi(self) -> None:
        from mpi4py import MPI

        seen, expected = (self._comm.rank, self._comm.size), (self.rank, self.size)
        if seen != expected:
            raise RunError(
                f"mpi4py and Horovod disagree about this job: (rank, size) is {seen} for mpi4py and {expected} for "
                "Horovod. They were built against different MPIs: run launch/setup.sh again with one mpirun on PATH."
            )
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise RunError(
                "This MPI cannot be called by several threads (MPI_THREAD_MULTIPLE), which Horovod's background thread "
                "needs. Use an Open MPI built with --enable-mpi-thread-multiple (4.0 and later always are)."
            )

    def _abort_on_uncaught_exceptions(self) -> None:
        """A rank must never wait for a dead one, so an uncaught exception in any thread ends the job."""

        def die(kind: type[BaseException], error: BaseException | None, trace: Any) -> NoReturn:
            if issubclass(kind, RunError):
                self.abort(str(error))
            if issubclass(kind, KeyboardInterrupt):
                self.abort("interrupted")
            self.abort("".join(traceback.format_exception(kind, error, trace)).rstrip())

        sys.excepthook = die
        threading.excepthook = lambda args: die(args.exc_type, args.exc_value, args.exc_traceback)

    def wrap(self, optimizer: Any, compression: str) -> Any:
        kind = self._hvd.Compression.fp16 if compression == "fp16" else self._hvd.Compression.none
        # Horovod: `groups=1` sends all gradients of an update as one message. It is divided before it is summed.
        wrapped = self._hvd.DistributedOptimizer(
            optimizer,
            groups=1,
            compression=kind,
            op=self._hvd.Average,
            gradient_predivide_factor=float(predivision(self.size, self.elastic)) if compression == "fp16" else 1.0,
        )
        # Horovod: it makes a tf.function of the averaging, and autograph reads its source: seconds of every start.
        # Generic names: tensor names depend on how often a rank has traced, and ranks that join have traced less often.
        average = wrapped._allreduce_grads.python_function
        wrapped._allreduce_grads = functools.partial(average, use_generic_names=True)
        return wrapped

    def broadcast(self, variables: Sequence[Any]) -> None:
        self._hvd.broadcast_variables(variables, root_rank=0)

    def average(self, tensors: Sequence[Any]) -> list[Any]:
        import tensorflow as tf

        # Horovod copies tensors into one message and back. A large tensor is faster in a message of its own.
        large = [index for index, tensor in enumerate(tensors) if tensor.shape.num_elements() > FUSED_FLOATS]
        small = [index for index in range(len(tensors)) if index not in large]
        means: dict[int, Any] = {}
        for indices in filter(None, [*([index] for index in large), small]):
            with tf.control_dependencies(list(means.values())):
                sent = [tensors[index] for index in indices]
                averaged = self._hvd.grouped_allreduce(sent, op=self._hvd.Average, name=f"average.{indices[0]}")
            means |= zip(indices, averaged, strict=True)
        return [means[index] for index in range(len(tensors))]

    def sum(self, values: np.ndarray) -> np.ndarray:
        return self._reduce(values, self._hvd.Sum, "sum")

    def max(self, values: np.ndarray) -> np.ndarray:
        return self._reduce(values, self._hvd.Max, "max")

    def _reduce(self, values: np.ndarray, op: Any, name: str) -> np.ndarray:
        values = np.asarray(values, np.float64)
        # Horovod: one shape per name, so that its response cache keeps the negotiation short.
        name = f"{name}.{'x'.join(map(str, values.shape))}"
        if name not in self._reductions:
            self._reductions[name] = self._graph(lambda tensor: [self._hvd.allreduce(tensor, op=op, name=name)])
        return self._reductions[name](values)[0]

    def any(self, flag: bool) -> bool:
        return bool(self.max(np.array([float(flag)]))[0])

    def gather(self, value: Any) -> list[Any]:
        if self._comm is not None:
            return self._comm.allgather(value)
        return self._hvd.allgather_object(value)

    def barrier(self) -> None:
        self.sum(np.zeros(1))  # horovod.tensorflow has no barrier of its own

    @contextmanager
    def timeline(self, path: Path) -> Iterator[None]:
        if self.rank != 0:  # only the chief writes
            yield
            return
        self._hvd.start_timeline(str(path))
        try:
            yield
        finally:
            self._hvd.stop_timeline()

    def describe(self) -> dict[str, Any]:
        found = _horovod_build() | {"mpi_enabled": self._hvd.mpi_enabled(), "gloo_enabled": self._hvd.gloo_enabled()}
        if self._comm is not None:
            from mpi4py import MPI

            levels = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
            found["mpi_library"] = MPI.Get_library_version().split(",")[0].strip()
            found["mpi_thread_level"] = levels[MPI.Query_thread()]
        return found

    def abort(self, reason: str) -> NoReturn:
        name = f"[rank {self.rank}/{self.size} {self.hostname}]"
        print("\n".join(f"{name} {line}" for line in reason.splitlines()), file=sys.stderr, flush=True)
        if self._comm is not None:
            self._comm.Abort(1)
        os._exit(1)  # Gloo: its launcher ends the others; an elastic job continues without this rank


def _horovod_build() -> dict[str, Any]:
    """How Horovod was built; the reason if it is installed but cannot be used."""
    if importlib.util.find_spec("horovod") is None:
        return {}
    misfit = horovod_misfit()
    if misfit is not None:
        return {"horovod_error": misfit}
    import horovod.tensorflow as hvd

    return {name: bool(getattr(hvd, name)()) for name in ("mpi_built", "gloo_built", "nccl_built", "cuda_built")}


def horovod_misfit() -> str | None:
    """Why the installed Horovod cannot be used, in one line; None if it can. It fits the TensorFlow it was built with."""
    package = importlib.util.find_spec("horovod")
    assert package is not None
    assert package.origin
    try:
        import tensorflow as tf

        metadata = Path(package.origin).with_name("metadata.json")  # written by Horovod's own build
        built = json.loads(metadata.read_text())["tensorflow"] if metadata.exists() else tf.__version__
        if built.split(".")[:2] != tf.__version__.split(".")[:2]:
            return f"it was built with TensorFlow {built}, but TensorFlow {tf.__version__} is installed"
        importlib.import_module("horovod.tensorflow")
        if len(libraries := loaded_mpis()) > 1:
            return f"it was built with another MPI than mpi4py uses: {' and '.join(libraries)} are loaded"
    except Exception as error:  # a library that no longer fits raises errors of any kind, and no rank may leave alone
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def loaded_mpis(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The MPI libraries in this process: of mpi4py, and of Horovod. Two of them do not know of each other."""
    try:
        files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/libmpi" in line}
    except OSError:
        return []
    # libmpi.so.40 is Open MPI, libmpi.so.12 or libmpich.so.12 MPICH and Intel MPI. Not libmpi_cxx.so and the like.
    return sorted(file for file in files if re.fullmatch(r"libmpi(ch)?\.so[.\d]*", file.rpartition("/")[2]))


def mpi_size() -> int:
    """The number of ranks of the MPI job this process belongs to; starts MPI. Raises InputError without mpi4py."""
    if importlib.util.find_spec("mpi4py") is None:
        raise InputError("A job of several ranks needs mpi4py, which is not installed: run launch/setup.sh.")
    try:
        from mpi4py import MPI
    except Exception as error:  # its wheel raises RuntimeError where it finds no MPI
        raise InputError(
            f"mpi4py finds no MPI ({type(error).__name__}: {' '.join(str(error).split())}): load the module of the MPI that "
            "launch/setup.sh was run with, or run it again with an mpirun on PATH."
        ) from None
    return MPI.COMM_WORLD.size


def mpi_library() -> str:
    """The MPI that mpi4py uses, or why there is none. Starts no MPI: a process alone needs none."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI

        return " ".join(MPI.Get_library_version().split(",")[0].split())
    except Exception as error:
        return f"none: {type(error).__name__}: {' '.join(str(error).split())}"


def mpi_in_step(check: Callable[[], None]) -> None:
    """Runs `check` on every rank before there is a world. If some raise InputError, all end; rank 0 says the first reason."""
    from mpi4py import MPI

    complaint = None
    try:
        check()
    except InputError as error:
        complaint = str(error)
    complaints = [each for each in MPI.COMM_WORLD.allgather(complaint) if each is not None]
    if complaints and MPI.COMM_WORLD.rank == 0:
        raise InputError(complaints[0])
    if complaints:
        sys.exit(2)
