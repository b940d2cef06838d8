"""What this rank has of its host: cores, threads and a GPU, as the launcher and the environment say."""

import os
import socket

from hvd_dqn.errors import InputError

# Set by mpirun, by horovodrun's Gloo launcher and by srun in every rank they start.
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK")
LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID")
LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def is_launched() -> bool:
    """Whether a launcher started this process as one rank, of one or of many."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def is_elastic() -> bool:
    """Whether horovodrun started this process with a host discovery script."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def set_communication_defaults() -> None:
    """Waiting that suits ranks which fill their cores; whatever the environment already says wins. Call before MPI starts."""
    # Open MPI spins while it waits, which takes the core from the rank that is still computing: let it yield.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # Horovod: every wait lasts a cycle of its background thread, in ms; its default of 1 is long against a small update.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.05")


def set_thread_defaults() -> int:
    """Gives this rank its share of the cores; whatever the environment already says wins. Call before TensorFlow starts."""
    threads = cores() if "SLURM_CPUS_PER_TASK" in os.environ or _is_bound() else max(1, cores() // _local_size())
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ.setdefault(name, str(threads))
    # A phase is one chain of operations: a second thread between them only costs (up to 1.6x on two ranks here).
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    # TensorFlow leaves oneDNN off on AMD: Nature CNN 69 -> 43 ms per update, MLP 256-256 979 -> 893 us.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # only errors: the CPU's features and the like are no news
    return threads


def cores() -> int:
    """How many cores this process may use."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0))


def _is_bound() -> bool:
    """Whether the launcher gave this rank cores of its own: its parent may use more of them."""
    try:
        return os.sched_getaffinity(0) < os.sched_getaffinity(os.getppid())
    except OSError:
        return False


def _local_rank() -> int:
    return _first(LOCAL_RANK_VARIABLES, 0)


def _local_size() -> int:
    return _first(LOCAL_SIZE_VARIABLES, 1)


def _first(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def pin_gpu() -> None:
    """Leaves this rank one GPU and lets its memory grow, whether it sees all GPUs of the host or only its own.

    Raises InputError where two ranks would share one GPU, which NCCL does not do.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return
    local_rank = _local_rank()
    # One visible GPU and several local ranks: the launcher already dealt them out, or there are too few.
    index = 0 if len(gpus) == 1 and "CUDA_VISIBLE_DEVICES" in os.environ else local_rank
    if index >= len(gpus):
        raise InputError(
            f"Local rank {local_rank} has no GPU of its own: {len(gpus)} are visible on {socket.gethostname()}. "
            "Start at most one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    tf.config.set_visible_devices(gpus[index], "GPU")
    tf.config.experimental.set_memory_growth(gpus[index], True)
