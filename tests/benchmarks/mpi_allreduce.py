"""What MPI's own all-reduce takes, without Horovod: added to a result of `hvd-dqn bench allreduce`.

    horovodrun -np 2 hvd-dqn bench allreduce --json > allreduce.json
    mpirun -np 2 .venv/bin/python -m tests.benchmarks.mpi_allreduce allreduce.json

Prints the result with MPI's seconds beside Horovod's, in messages of the same sizes. `hvd-dqn bench project` takes both.
Horovod must not run meanwhile: its thread looks for work all the time, and a rank that waits for MPI yields its core to it.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # as in training; before MPI starts

import numpy as np
from mpi4py import MPI

from hvd_dqn.bench.allreduce import PER_CALL
from hvd_dqn.bench.results import seconds_of, spread
from tests.benchmarks.pictures import read


def seconds(size: int, rounds: int) -> dict[str, float]:
    """Of one all-reduce of `size` bytes, over rounds of which the slowest rank counts. A collective."""
    comm, values = MPI.COMM_WORLD, np.zeros(size // 4, np.float32)
    per_call = next(count for limit, count in PER_CALL if size < limit)

    def job() -> None:
        for _ in range(per_call):
            comm.Allreduce(MPI.IN_PLACE, values)

    job()  # meets the memory for the first time
    slowest = [comm.allreduce(seconds_of(job, comm.Barrier), MPI.MAX) for _ in range(rounds)]
    return spread(np.array(slowest) / per_call)


def main() -> None:
    result = read(Path(sys.argv[1]))
    for row in result["results"]:
        found = seconds(row["bytes"], result["rounds"])
        row["mpi"] = {"seconds": found, "bytes_per_second": row["bytes"] / found["median"]}
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
