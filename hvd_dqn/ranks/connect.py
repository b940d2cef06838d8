"""Connects this process to the other ranks of its job, and refuses jobs whose ranks cannot work together."""

import importlib.util
import os
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
from hvd_dqn.ranks.world import HorovodWorld, Solo, World, horovod_misfit, mpi_rank_and_size


def connect() -> World:
    """The ranks of this job. A single process imports neither Horovod nor mpi4py nor TensorFlow."""
    if not is_launched():
        _refuse_unconnected_tasks()
        return Solo()
    set_communication_defaults()
    if is_elastic():
        check_restart()
        _check_horovod(int(os.environ["HOROVOD_RANK"]))
        # Other ranks may be training already, and a collective would mix with theirs. So work alone until then.
        return Solo(int(os.environ["HOROVOD_RANK"]))
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    else:
        rank, size = mpi_rank_and_size()
    if size == 1:
        _refuse_unconnected_tasks()
        return Solo()
    _check_horovod(rank)
    world = HorovodWorld()
    # Every rank asks: hosts may have different builds of Horovod, but all ranks must decide alike.
    places = world.gather((world.describe()["nccl_built"], world.hostname, world.gpu))
    if all(has_nccl for has_nccl, *_ in places):
        conflict = gpu_conflict([(host, gpu) for _, host, gpu in places])
        if conflict:
            _refuse(conflict, world.rank)
    return world


def _check_horovod(rank: int) -> None:
    if importlib.util.find_spec("horovod") is None:
        _refuse("Several ranks need Horovod, which is not installed: run launch/setup.sh, or start one process.", rank)
    load_tensorflow()
    misfit = horovod_misfit()
    if misfit is not None:
        _refuse(f"Horovod does not fit this TensorFlow: {misfit}. Run launch/setup.sh again.", rank)


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
