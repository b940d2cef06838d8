"""Measures how long Horovod's all-reduce takes inside a graph, as the learner's updates use it."""

from typing import Any

import numpy as np
import tensorflow as tf
from rich.table import Table

from hvd_dqn.bench.results import provenance, result_table, seconds_of, spread, with_spread
from hvd_dqn.errors import InputError
from hvd_dqn.graphs import Graph, fold
from hvd_dqn.ranks.world import World

# Floats: 4 KB; the gradients of the MLPs 64-64 (4 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2) and 256-256, and of the Nature
# CNN; 64 MB.
FLOATS = (1_024, 4_610, 67_842, 1_687_206, 1 << 24)
# All-reduces in one graph, like the updates of a phase: enough that a rank's late start hardly counts.
PER_CALL = ((1 << 20, 50), (1 << 24, 10), (1 << 62, 2))  # below this many bytes


def measure(world: World, floats: tuple[int, ...] = FLOATS, rounds: int = 20) -> dict[str, Any]:
    """Times all-reduces of each size. All ranks call it."""
    if world.size == 1:
        raise InputError(
            "An all-reduce needs at least two ranks: start it as `horovodrun -np 2 hvd-dqn bench allreduce`. "
            "Received: 1 rank."
        )
    rows = [{"bytes": 4 * number, "horovod": time_allreduce(world, number, rounds)} for number in floats]
    return {"benchmark": "allreduce", **provenance(), "ranks": world.size, "rounds": rounds, "results": rows}


def time_allreduce(world: World, floats: int, rounds: int) -> dict[str, Any]:
    """Seconds of one all-reduce, for the slowest rank of each round, and bytes per second. A collective."""
    size = 4 * floats
    per_call = next(count for limit, count in PER_CALL if size < limit)
    # `per_call` all-reduces, one after the other.
    job = Graph(lambda: [fold(lambda _, values: world.average([values])[0], tf.zeros([floats]), 0, per_call)[:1]])
    job()  # traces, and registers the tensor's name with Horovod
    seconds = spread(world.max(np.array([seconds_of(job, world.barrier) for _ in range(rounds)]) / per_call))
    return {"seconds": seconds, "bytes_per_second": size / seconds["median"]}


def render(result: dict[str, Any]) -> Table:
    measured = f"median of {result['rounds']} rounds, the slowest rank's, and half the interquartile range"
    table = result_table(result, measured, "bytes", "µs", "MB/s")
    for row in result["results"]:
        microseconds = {key: 1e6 * value for key, value in row["horovod"]["seconds"].items()}
        rate = f"{row['horovod']['bytes_per_second'] / 1e6:,.0f}"
        table.add_row(f"{row['bytes']:,}", with_spread(microseconds), rate)
    return table
