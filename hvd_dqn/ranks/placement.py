"""Gives this rank its cores, threads and GPU, as the launcher and the environment variables say."""

import contextlib
import ctypes
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from hvd_dqn.errors import InputError

# Set by mpirun, by horovodrun's Gloo launcher and by srun in every rank they start.
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK")
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE")
LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID")
LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "MPI_LOCALNRANKS")
ORIGINAL_ENVIRONMENT = dict(os.environ)  # before this process set its own defaults
FUSED_FLOATS = 1 << 18  # 1 MB: copying more into one message with others takes longer than sending it by itself
UNKNOWN_GPU = "unknown"  # a GPU whose id CUDA does not tell


def is_launched() -> bool:
    """Whether a launcher started this process as one rank, of one or of many."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def is_elastic() -> bool:
    """Whether horovodrun started this process with a host discovery script."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def set_communication_defaults() -> None:
    """Sets how ranks wait and communicate; variables that are already set win. Call it before MPI starts."""
    # Open MPI spins while it waits, which takes the core from the rank that is still computing: let it yield.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # It also asks before it sends more than 4 KB to a rank of the same host: the gradient of 64-64, 18 KB, takes half the time.
    os.environ.setdefault("OMPI_MCA_btl_vader_eager_limit", "32768")
    # Horovod: its background thread looks for work once in so many ms, 1 by default, which is long against a small update.
    # Without a pause the threads of all ranks wait for each other inside MPI, which yields the core to whoever computes. Gloo
    # does not, so there the thread has to sleep.
    pause = "0.05" if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ else "0"
    if not (is_elastic() and "HOROVOD_FUSION_THRESHOLD" in os.environ):  # see check_restart
        os.environ.setdefault("HOROVOD_CYCLE_TIME", pause)


def check_restart() -> None:
    """Raises InputError if Horovod could not be started a second time in this process, as an elastic job needs.

    Its tuner, once both values are fixed, has no place left for the defaults that every start writes first.
    """
    if {"HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD"} <= os.environ.keys():
        raise InputError(
            "Horovod 0.28 crashes when an elastic job starts it again while both HOROVOD_CYCLE_TIME and "
            "HOROVOD_FUSION_THRESHOLD are in the environment: unset the second."
        )


def set_thread_defaults() -> int:
    """Gives this rank its share of the cores; variables that are already set win. Call it before NumPy is loaded."""
    share = threads(len(os.sched_getaffinity(0)), os.cpu_count() or 1, _is_bound())
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(share))
    # NumPy's: it only evaluates a few observations, and its threads would wait for the cores that the learner uses.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A phase is one chain of operations: a second thread between them only costs (up to 1.6x on two ranks here).
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    # TensorFlow leaves oneDNN off on AMD: Nature CNN 69 -> 43 ms per update, MLP 256-256 979 -> 893 us.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # a process alone would else take the memory of all GPUs
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # only errors: the CPU's features and the like are no news
    return share


@contextlib.contextmanager
def thread_defaults() -> Iterator[None]:
    """The same while it is open: a job that a notebook starts later shall not inherit them.

    What is imported, or first computes, meanwhile keeps the numbers of threads that it found.
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
    """One thread for each of TensorFlow's operations."""
    _set_threads("intra", 1)


def compute_concurrently() -> None:
    """Two threads for TensorFlow's operations, so that one can be called while another, or a graph of them, goes on."""
    _set_threads("inter", 2)


def _set_threads(kind: str, count: int) -> None:
    """Sets it unless an environment variable did when this process began.

    Without effect once TensorFlow has computed, as it has under Gloo, where Horovod gathers by TensorFlow.
    """
    name = f"TF_NUM_{kind.upper()}OP_THREADS"
    if name in ORIGINAL_ENVIRONMENT:
        return
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):
        getattr(tf.config.threading, f"set_{kind}_op_parallelism_threads")(count)
        os.environ[name] = str(count)  # for the doctor and the benchmarks, which report it


def threads(usable: int, on_host: int, is_bound: bool) -> int:
    """This rank's share of its host's cores: `usable` by this process, `on_host` altogether.

    A rank that is bound may still share its cores: Open MPI binds several ranks to all cores of a socket.
    """
    of_job = int(os.environ.get("SLURM_CPUS_ON_NODE", on_host if is_bound else usable))
    wished = int(os.environ.get("SLURM_CPUS_PER_TASK", usable))
    return max(1, min(usable, wished, of_job // local_size()))


def cores() -> int:
    """How many cores this process may use."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0))


def _is_bound() -> bool:
    """Whether the launcher gave this rank cores of its own: it says so, or its own process may use more of them."""
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
    # srun counts node by node, "4(x2),3" for 4, 4 and 3, in the order of SLURM_NODEID.
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    each = [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]
    return each[min(int(os.environ.get("SLURM_NODEID", 0)), len(each) - 1)]


def srun_tasks() -> int:
    """How many tasks srun started, this one among them; 1 where something else started this process."""
    if "OMPI_COMM_WORLD_RANK" in os.environ or "HOROVOD_RANK" in os.environ:
        return 1  # mpirun starts its daemons by srun
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def launched_ranks() -> int:
    """How many processes a launcher started, this one among them, as far as the environment tells."""
    return max(srun_tasks(), *(int(os.environ.get(name, 1)) for name in SIZE_VARIABLES))


def pin_gpu() -> str | None:
    """Leaves this rank one GPU and lets its memory grow. Returns that GPU's id, or None if there is no GPU.

    Ranks that see the same GPUs take them in turn; a rank that sees only one takes that one.
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
    """The unique id of the visible GPU of this number.

    The number is not unique: if a launcher shows each rank only its own GPU, every rank calls it 0.
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
    """Why NCCL cannot join ranks with these (host, GPU id), in the order of the ranks, and the cure; None if it can."""
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
