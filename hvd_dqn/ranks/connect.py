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
    is_elastic,
    is_launched,
    set_communication_defaults,
    srun_tasks,
)
from hvd_dqn.ranks.world import HorovodWorld, Solo, World, horovod_misfit, mpi_in_step, mpi_size


def connect() -> World:
    """The ranks of this job. A single process imports neither Horovod nor mpi4py nor TensorFlow."""
    if not is_launched():
        _refuse_unconnected_tasks()
        return Solo()
    set_communication_defaults()
    if is_elastic():
        check_restart()
        _check_horovod()
        # Other ranks may be training already, and a collective would mix with theirs. So work alone until then.
        return Solo(int(os.environ["HOROVOD_RANK"]))
    under_gloo = "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ
    size = int(os.environ["HOROVOD_SIZE"]) if under_gloo else mpi_size()
    if size == 1:
        _refuse_unconnected_tasks()
        return Solo()
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


def _refuse_unconnected_tasks() -> None:
    """Without MPI, srun starts unconnected processes. Each would run the same training alone."""
    if srun_tasks() > 1:
        _refuse(
            f"srun started {srun_tasks()} tasks that are not connected to each other: use `srun --mpi=pmix`, or mpirun "
            "inside the job if `srun --mpi=list` shows no pmix.",
            int(os.environ.get("SLURM_PROCID", 0)),
        )


def _refuse(complaint: str, rank: int) -> NoReturn:
    """Ends this rank because of bad input that every rank sees. Only rank 0 prints the reason."""
    if rank == 0:
        raise InputError(complaint)
    sys.exit(2)
