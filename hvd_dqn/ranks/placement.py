"""Gives this rank its cores, threads and GPU, following the launcher and the environment variables."""

import contextlib
import ctypes
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from hvd_dqn.errors import InputError
from hvd_dqn.ranks import limits

# Set by mpirun, by horovodrun's Gloo launcher and by srun in every rank they start.
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK")
RANK_VARIABLES = (*LAUNCHER_VARIABLES, "SLURM_PROCID")
# In this order: mpirun may start ranks within a step of srun, and Slurm's own launcher may set no PMI_SIZE.
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID")
LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "MPI_LOCALNRANKS")
ORIGINAL_ENVIRONMENT = dict(os.environ)  # before this process set its own defaults
FUSED_FLOATS = 1 << 18  # 1 MB: a larger tensor is faster sent alone than copied into a message with others
BUSY_THREADS = 2  # of a rank: its own and Horovod's
UNKNOWN_GPU = "unknown"  # a GPU whose id CUDA does not report


def is_launched() -> bool:
    """Whether a launcher started this process as a rank, even as the only one."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def is_elastic() -> bool:
    """Whether horovodrun started this process with a host discovery script."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def set_communication_defaults() -> None:
    """Sets how ranks wait and communicate; variables that are already set win. Call it before MPI starts."""
    # A waiting Open MPI process spins and so takes the core from a rank that still computes. Make it yield.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # By default it asks before it sends over 4 KB to a rank of its host. Without, 18 KB (64-64) take half the time.
    os.environ.setdefault("OMPI_MCA_btl_vader_eager_limit", "32768")
    pause = _horovods_pause(limits.cpu_quota())
    if not (is_elastic() and "HOROVOD_FUSION_THRESHOLD" in os.environ):  # see check_restart
        os.environ.setdefault("HOROVOD_CYCLE_TIME", pause)


def _horovods_pause(quota: limits.Limit | None) -> str:
    """For how many ms Horovod's background thread sleeps between two looks for work."""
    # A thread that spins uses up a quota of CPU time, and then the whole rank has to stand still. With half a CPU per rank
    # over TCP `cartpole-16` makes 1,146 steps/s without sleep, 1,527 with 0.2 ms, 960 with 1 and 1,068 with 3.
    if quota is not None and quota.value < BUSY_THREADS * local_size():
        return "0.2"
    # The default, 1, is longer than a small update. Without sleep the threads of all ranks wait for each other inside MPI,
    # which yields the core to others. Gloo does not yield, so there the thread has to sleep.
    return "0.05" if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ else "0"


def check_restart() -> None:
    """Raises InputError if Horovod could not be started a second time in this process, as an elastic job needs.

    Every start first writes default values into Horovod's tuner. That crashes if both values are fixed already.
    """
    if {"HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD"} <= os.environ.keys():
        raise InputError(
            "Horovod 0.28 crashes when an elastic job starts it again while both HOROVOD_CYCLE_TIME and "
            "HOROVOD_FUSION_THRESHOLD are set in the environment: unset the second."
        )


def set_thread_defaults() -> int:
    """Gives this rank its share of the cores; variables that are already set win. Call it before NumPy is loaded."""
    quota = limits.cpu_quota()
    allowed = math.inf if quota is None else quota.value
    share = threads(len(os.sched_getaffinity(0)), os.cpu_count() or 1, _is_bound(), allowed)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(share))
    # For NumPy: it only evaluates a few observations, and more threads would compete with the learner for cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A phase is one chain of operations, so a second thread only slows it down (up to 1.6x on two ranks here).
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    # TensorFlow turns oneDNN off on AMD. With it: Nature CNN 69 -> 43 ms per update, MLP 256-256 979 -> 893 us.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # else a single process takes the memory of all GPUs
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only
    return share


@contextlib.contextmanager
def thread_defaults() -> Iterator[None]:
    """Sets the same variables, and restores the old values at exit: jobs started later must not inherit them.

    A library that is imported, or first computes, inside the block keeps its number of threads.
    """
    before = dict(os.environ)
    set_thread_defaults()
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(("TF_", "OMP_"))]:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def compute_alone() -> None:
    """Makes TensorFlow run each operation in one thread."""
    _set_threads("intra", 1)


def compute_concurrently() -> None:
    """Makes TensorFlow run two operations at a time, so that one can be called while a graph runs."""
    _set_threads("inter", 2)


def _set_threads(kind: str, count: int) -> None:
    """Sets a number of threads, unless an environment variable was set when this process began.

    Has no effect after TensorFlow has computed. Under Gloo it has computed by then: Horovod gathers with TensorFlow there.
    """
    name = f"TF_NUM_{kind.upper()}OP_THREADS"
    if name in ORIGINAL_ENVIRONMENT:
        return
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):
        getattr(tf.config.threading, f"set_{kind}_op_parallelism_threads")(count)
        os.environ[name] = str(count)  # the doctor and the benchmarks report it


def threads(usable: int, on_host: int, is_bound: bool, quota: float = math.inf) -> int:
    """This rank's share of its host's cores. This process may use `usable` of the `on_host` cores.

    A bound rank may still share its cores: Open MPI binds several ranks to all cores of a socket. All ranks of a host
    share the `quota` of CPU time: the container, or the job, is what has one.
    """
    of_job = min(int(os.environ.get("SLURM_CPUS_ON_NODE", on_host if is_bound else usable)), quota)
    wished = int(os.environ.get("SLURM_CPUS_PER_TASK", usable))
    return max(1, int(min(usable, wished, of_job // local_size())))


def cores() -> int:
    """How many cores this process may use, together with its neighbours of the same job."""
    return max(1, int(limits.cores().value))


def _is_bound() -> bool:
    """Whether the launcher bound this rank to cores: it says so, or the launcher may use more cores than this rank."""
    if "OMPI_MCA_orte_bound_at_launch" in os.environ:
        return True
    try:
        return os.sched_getaffinity(0) < os.sched_getaffinity(os.getppid())
    except OSError:
        return False


def local_rank() -> int:
    return next((int(os.environ[name]) for name in LOCAL_RANK_VARIABLES if name in os.environ), 0)


def local_size() -> int:
    """How many ranks the launcher started on this host."""
    for name in LOCAL_SIZE_VARIABLES:
        if name in os.environ:
            return int(os.environ[name])
    # srun lists tasks per node in the order of SLURM_NODEID: "4(x2),3" means 4, 4 and 3.
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    each = [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]
    return each[min(int(os.environ.get("SLURM_NODEID", 0)), len(each) - 1)]


def launched_ranks() -> int:
    """How many processes the launcher started, including this one, according to the environment; 1 without a launcher."""
    return _launched_ranks() or 1


def _launched_ranks() -> int | None:
    """None where the launcher does not say: PMIx alone gives only the rank."""
    return next((int(os.environ[name]) for name in SIZE_VARIABLES if name in os.environ), None)


def is_alone() -> bool:
    """Whether no launcher started this process, or as the only one: `srun --pty bash` sets a rank's variables too."""
    return not is_launched() or _launched_ranks() == 1


def launched_rank() -> int:
    """The number of this process among them."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def pin_gpu() -> str | None:
    """Restricts this rank to one GPU, with memory growth. Returns that GPU's id, or None if there is no GPU.

    If the ranks of a host see the same GPUs, the local rank selects one.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return None
    index = local_rank() % len(gpus)
    tf.config.set_visible_devices(gpus[index], "GPU")
    tf.config.experimental.set_memory_growth(gpus[index], True)
    return gpu_id(index)


def gpu_id(index: int, library: str = "libcuda.so.1") -> str:
    """The unique id of visible GPU number `index`.

    The number itself is not unique: if a launcher shows each rank only its own GPU, every rank sees it as number 0.
    """
    uuid, device = (ctypes.c_ubyte * 16)(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL(library)
        get_uuid = cuda.cuDeviceGetUuid_v2 if hasattr(cuda, "cuDeviceGetUuid_v2") else cuda.cuDeviceGetUuid
        failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index) or get_uuid(ctypes.byref(uuid), device)
    except (OSError, AttributeError):
        failed = True
    return UNKNOWN_GPU if failed else bytes(uuid).hex()


def gpu_conflict(places: Sequence[tuple[str, str | None]]) -> str | None:
    """Why NCCL cannot connect ranks with these (host, GPU id), one per rank, and the way out; None if it can."""
    bare = [rank for rank, (_, gpu) in enumerate(places) if gpu is None]
    if 0 < len(bare) < len(places):
        return (
            f"Rank {bare[0]} on {places[bare[0]][0]} sees no GPU, but others do ({len(places) - len(bare)} of "
            f"{len(places)} ranks): give every rank a GPU, or hide all GPUs with CUDA_VISIBLE_DEVICES= to train on CPUs."
        )
    owners: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for rank, place in enumerate(places):
        owners[place].append(str(rank))
    for (host, gpu), ranks in owners.items():
        if gpu not in (None, UNKNOWN_GPU) and len(ranks) > 1:
            return (
                f"Ranks {', '.join(ranks)} would share one GPU of {host}, which NCCL does not allow: start one rank per GPU "
                "and let each rank see all GPUs of its host or only its own (srun --gpus-per-task=1), or hide the GPUs "
                "with CUDA_VISIBLE_DEVICES= to train on CPUs."
            )
    return None
