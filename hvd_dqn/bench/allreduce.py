"""What an all-reduce takes: Horovod's inside a graph, as the learner's updates make it, beside MPI's own."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import tensorflow as tf
from rich.table import Table

from hvd_dqn.bench.results import made_table, provenance, seconds_of, spread, with_spread
from hvd_dqn.errors import InputError
from hvd_dqn.graphs import Graph, fold
from hvd_dqn.ranks.world import World

# Floats: 4 KB; the gradients of the MLPs 64-64 (4 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2) and 256-256, and of the Nature
# CNN; 64 MB.
FLOATS = (1_024, 4_610, 67_842, 1_687_206, 1 << 24)
# All-reduces in one graph, as the updates of a phase follow each other: as many as make the ranks' late starts weigh little.
PER_CALL = ((1 << 20, 50), (1 << 24, 10), (1 << 62, 2))  # below so many bytes


def allreduce(world: World, floats: tuple[int, ...] = FLOATS, rounds: int = 20) -> dict[str, Any]:
    """Seconds of one all-reduce of each size, as medians over rounds. All ranks call it; of every round the slowest counts.

    Horovod's and MPI's take turns; Horovod is shut down while MPI is measured. Under Gloo there is nothing of MPI's.
    """
    if world.size == 1:
        raise InputError(
            "One rank has nobody to talk to: start it as `horovodrun -np 2 hvd-dqn bench allreduce`. Received: 1 rank."
        )
    return {
        "benchmark": "allreduce",
        **provenance(),
        "ranks": world.size,
        "rounds": rounds,
        "results": [measure(world, number, rounds) for number in floats],
    }


def measure(world: World, floats: int, rounds: int, *, beside_mpi: bool = True) -> dict[str, Any]:
    """Horovod's and MPI's seconds per all-reduce of so many floats, and the bytes per second that this makes."""
    size = 4 * floats
    per_call = next(count for limit, count in PER_CALL if size < limit)
    horovods, values = _horovods(world, floats, per_call), np.zeros(floats, np.float32)
    rows: list[list[float]] = []
    for _ in range(rounds):
        horovods()  # traces, and lets Horovod meet the tensor's name
        rows.append([seconds_of(horovods, world.barrier)])
        with world.raw_sum() if beside_mpi else nullcontext() as raw:
            if raw is not None:
                mpis = functools.partial(_repeat, raw, values, per_call)
                mpis()
                rows[-1].append(seconds_of(mpis, functools.partial(raw, np.zeros(1))))
    result: dict[str, Any] = {"bytes": size}
    for name, measured in zip(("horovod", "mpi"), world.max(np.array(rows) / per_call).T, strict=False):
        found = spread(measured)
        result[name] = {"seconds": found, "bytes_per_second": size / found["median"]}
    return result


def _horovods(world: World, floats: int, per_call: int) -> Callable[[], Any]:
    def several() -> list[tf.Tensor]:
        return [fold(lambda _, values: world.average([values])[0], tf.zeros([floats]), 0, per_call)[:1]]

    return Graph(several)


def _repeat(raw: Callable[[np.ndarray], None], values: np.ndarray, count: int) -> None:
    for _ in range(count):
        raw(values)


def table(result: dict[str, Any]) -> Table:
    """The result of `allreduce` for people."""
    made = made_table(
        result, f"median of {result['rounds']} rounds, the slowest rank's, and half the interquartile range"
    )
    made.add_column("bytes", justify="right")
    for heading in ("Horovod, µs", "MB/s", "MPI alone, µs", "MB/s", "Horovod / MPI"):
        made.add_column(heading, justify="right")
    for row in result["results"]:
        cells = []
        for name in ("horovod", "mpi"):
            if name in row:
                microseconds = {key: 1e6 * value for key, value in row[name]["seconds"].items()}
                cells += [with_spread(microseconds), f"{row[name]['bytes_per_second'] / 1e6:,.0f}"]
            else:
                cells += ["none", ""]
        ratio = ""
        if "mpi" in row:
            ratio = f"{row['horovod']['seconds']['median'] / row['mpi']['seconds']['median']:.1f}"
        made.add_row(f"{row['bytes']:,}", *cells, ratio)
    return made
