"""Connects this process to the other ranks of its job, and refuses jobs whose ranks cannot work together."""

import importlib.util
import os
import socket
import sys
from typing import NoReturn

from hvd_dqn.errors import InputError
from hvd_dqn.loading import load_tensorflow
from hvd_dqn.ranks.placement import (
    check_restart,
    gpu_conflict,
    is_alone,
    is_elastic,
    launched_rank,
    launched_ranks,
    set_communication_defaults,
)
from hvd_dqn.ranks.world import HorovodWorld, Solo, World, horovod_misfit, mpi_in_step, mpi_library, mpi_size


def connect(examines: bool = False) -> World:
    """The ranks of this job. A single process imports neither Horovod nor mpi4py nor TensorFlow.

    Several processes of a launcher that are not connected to each other are refused. If `examines`, the first one goes on
    alone, to tell why, and the others end.
    """
    if not is_elastic() and is_alone():
        return _solo(examines)
    set_communication_defaults()
    if is_elastic():
        check_restart()
        _check_horovod()
        # Other ranks may be training already, and a collective would mix with theirs. So work alone until then.
        return Solo(int(os.environ["HOROVOD_RANK"]))
    under_gloo = "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ
    size = int(os.environ["HOROVOD_SIZE"]) if under_gloo else mpi_size()
    if size == 1:
        return _solo(examines)
    if under_gloo:
        _check_horovod()
    else:
        mpi_in_step(_check_horovod)
    world = HorovodWorld()
    # Every rank asks: hosts may have different builds of Horovod, but all ranks must decide alike.
    places = world.gather((world.describe()["nccl_built"], world.hostname, world.gpu))
    if all(has_nccl for has_nccl, *_ in places):
        conflict = gpu_conflict([(host, gpu) for _, host, gpu in places])
        if conflict:
            _refuse(conflict, world.rank)
    return world


def _check_horovod() -> None:
    """Raises InputError if this rank cannot use Horovod: it may be installed differently on each host."""
    if importlib.util.find_spec("horovod") is None:
        raise InputError(
            "Several ranks need Horovod, which is not installed: run launch/setup.sh, or start one process."
        )
    load_tensorflow()
    misfit = horovod_misfit()
    if misfit is not None:
        raise InputError(
            f"Horovod on {socket.gethostname()} does not fit this TensorFlow: {misfit}. Run launch/setup.sh again."
        )


def _solo(examines: bool) -> Solo:
    """Without a common MPI, launchers start unconnected processes. Each would run the same training alone."""
    if launched_ranks() > 1 and examines and launched_rank() > 0:
        sys.exit(0)
    if launched_ranks() > 1 and not examines:
        _refuse(unconnected_ranks(), launched_rank())
    return Solo()


def unconnected_ranks() -> str:
    """Why the launcher's processes are not connected, and the way out."""
    if "OMPI_COMM_WORLD_RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        return (
            f"srun started {launched_ranks()} tasks that are not connected to each other: use `srun --mpi=pmix`, or mpirun "
            "inside the job if `srun --mpi=list` shows no pmix."
        )
    return (
        f"The launcher started {launched_ranks()} ranks that are not connected to each other: mpi4py uses another MPI "
        f"({mpi_library()}) than this launcher's. Start them with that MPI's own mpirun, or run launch/setup.sh "
        "with this launcher's MPI first on PATH."
    )


def _refuse(complaint: str, rank: int) -> NoReturn:
    """Ends this rank because of bad input that every rank sees. Only rank 0 prints the reason."""
    if rank == 0:
        raise InputError(complaint)
    sys.exit(2)
