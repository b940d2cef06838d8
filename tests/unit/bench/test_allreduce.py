"""The benchmark of all-reduces, with ranks and clocks that are made up; test_scaling.py runs the real one."""

import pytest

from hvd_dqn.bench import allreduce as bench
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo


class Pair(Solo):
    """Two ranks that are equally fast."""

    size = 2


def test_one_rank_is_refused():
    with pytest.raises(InputError, match="needs at least two ranks: start it as `horovodrun -np 2"):
        bench.measure(Solo())


def test_the_time_of_a_call_is_divided_by_its_all_reduces(monkeypatch):
    seconds = iter([50.0, 100.0, 150.0])
    monkeypatch.setattr(bench, "seconds_of", lambda job, barrier: next(seconds))
    result = bench.measure(Pair(), (1_024,), rounds=3)
    (row,) = result["results"]
    assert row["bytes"] == 4_096
    assert row["horovod"]["seconds"] == pytest.approx({"low": 1.5, "median": 2, "high": 2.5})
    assert row["horovod"]["bytes_per_second"] == 2_048
    assert bench.render(result).row_count == 1


def test_a_graph_averages_as_often_as_it_is_divided_by():
    averaged = []

    class Counting(Pair):
        def average(self, tensors):
            import tensorflow as tf

            (tensor,) = tensors
            seen = tf.numpy_function(lambda values: averaged.append(values.nbytes) or values, [tensor], tf.float32)
            return [tf.ensure_shape(seen, tensor.shape)]

    bench.time_allreduce(Counting(), 16, rounds=1)
    assert averaged == [64] * 50 * 2  # once to trace it, once to measure it


def test_the_messages_are_those_of_the_networks():
    assert [4 * floats for floats in bench.FLOATS] == [4_096, 18_440, 271_368, 6_748_824, 67_108_864]
