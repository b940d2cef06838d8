"""The benchmark of all-reduces, with ranks and clocks that are made up; tests/parallel runs the real one."""

from contextlib import nullcontext

import numpy as np
import pytest
from rich.console import Console

from hvd_dqn.bench import allreduce as bench
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo


class Pair(Solo):
    """Two ranks of which the other is always the faster; counts what is asked of it."""

    size = 2

    def __init__(self):
        super().__init__()
        self.raw = []

    def raw_sum(self):
        return nullcontext(lambda values: self.raw.append(values.nbytes))


class GlooPair(Pair):
    def raw_sum(self):
        return nullcontext()


def test_one_rank_is_refused():
    with pytest.raises(InputError, match="One rank has nobody to talk to: start it as `horovodrun -np 2"):
        bench.allreduce(Solo())


def test_horovods_and_mpis_take_turns_and_are_divided_by_their_number(monkeypatch):
    seconds = iter([50.0, 5.0, 100.0, 10.0, 150.0, 15.0])
    monkeypatch.setattr(bench, "seconds_of", lambda job, barrier: next(seconds))
    world = Pair()
    (row,) = bench.allreduce(world, (1_024,), rounds=3)["results"]
    assert row["bytes"] == 4_096
    assert row["horovod"] == {
        "seconds": pytest.approx({"low": 1.5, "median": 2, "high": 2.5}),
        "bytes_per_second": 2_048,
    }
    assert row["mpi"] == {
        "seconds": pytest.approx({"low": 0.15, "median": 0.2, "high": 0.25}),
        "bytes_per_second": 20_480,
    }
    assert world.raw == [4_096] * 50 * 3  # to warm up: the clock above runs nothing


def test_a_graph_averages_as_often_as_it_is_divided_by(monkeypatch):
    averaged = []

    class Counting(Pair):
        def average(self, tensors):
            import tensorflow as tf

            (tensor,) = tensors
            seen = tf.numpy_function(lambda values: averaged.append(values.nbytes) or values, [tensor], tf.float32)
            return [tf.ensure_shape(seen, tensor.shape)]

    world = Counting()
    bench._horovods(world, 16, 7)()
    assert averaged == [64] * 7


def test_without_mpi_there_is_only_horovods():
    (row,) = bench.allreduce(GlooPair(), (16,), rounds=2)["results"]
    assert set(row) == {"bytes", "horovod"}
    assert 0 < row["horovod"]["seconds"]["median"] < 60


def test_people_see_what_horovod_adds_within_100_columns():
    def measured(seconds):
        spread = {"low": 0.9 * seconds, "median": seconds, "high": 1.1 * seconds}
        return {"seconds": spread, "bytes_per_second": 18_440 / seconds}

    result = {
        "machine": {"cpu": "a CPU", "cores": 2, "gpus": []}, "threads": 1, "ranks": 2, "rounds": 20,
        "commit": "0123456789", "command": "hvd-dqn bench allreduce",
        "results": [
            {"bytes": 18_440, "horovod": measured(200e-6), "mpi": measured(50e-6)},
            {"bytes": 67_108_864, "horovod": measured(0.1)},
        ],
    }  # fmt: skip
    console = Console(width=100)
    with console.capture() as capture:
        console.print(bench.table(result))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capture.get().splitlines() if "│" in line]
    assert rows == [
        ["18,440", "200 ± 10 %", "92", "50 ± 10 %", "369", "4.0"],
        ["67,108,864", "100,000 ± 10 %", "0", "none", "", ""],
    ]


def test_the_messages_are_those_of_the_networks():
    assert [4 * floats for floats in bench.FLOATS] == [4_096, 18_440, 271_368, 6_748_824, 67_108_864]
    assert np.all(np.diff(bench.FLOATS) > 0)
