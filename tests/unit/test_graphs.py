"""Graphs between NumPy arrays: the same numbers as eagerly, and no memory lost."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf

from hvd_dqn.graphs import DenseTape, Graph, global_norm


@pytest.mark.parametrize("compiled", [False, True])
def test_arrays_go_in_and_come_out_whatever_their_leading_dimension(compiled):
    graph = Graph(lambda x, y, scale: [scale * x, tf.reduce_sum(y, axis=1)], compiled=compiled)
    for n in (3, 5):
        x, y = np.arange(n, dtype=np.float32), np.arange(4 * n).reshape(n, 4)
        scaled, sums = graph(x, y, np.float32(2))
        np.testing.assert_array_equal(scaled, 2 * x)
        np.testing.assert_array_equal(sums, y.sum(axis=1))
        assert (scaled.dtype, sums.dtype) == (np.float32, np.int64)


def test_xla_compiles_what_is_to_be_compiled():
    def asks_python(x):
        return [tf.numpy_function(lambda x: x, [x], tf.float32)]

    assert Graph(asks_python)(np.ones(2, np.float32))[0].tolist() == [1, 1]
    with pytest.raises(tf.errors.InvalidArgumentError, match="XLA"):  # which cannot
        Graph(asks_python, compiled=True)(np.ones(2, np.float32))


def test_a_result_is_not_overwritten_by_the_next_call():
    variable = tf.Variable([1.0, 2.0])
    graph = Graph(lambda: [variable])
    before = graph()[0]
    variable.assign([3.0, 4.0])
    assert before.tolist() == [1, 2]
    assert graph()[0].tolist() == [3, 4]


def test_calls_lose_no_memory():
    # In a process of its own: what other tests leave behind grows and shrinks, too.
    program = """
import numpy as np, psutil, tensorflow as tf
from hvd_dqn.graphs import Graph

graph = Graph(lambda *arrays: [tf.add_n(arrays)])
arrays = [np.full(8, i, np.float32) for i in range(8)]
for _ in range(500):
    graph(*arrays)
before = psutil.Process().memory_info().rss
for _ in range(30_000):
    graph(*arrays)
print(psutil.Process().memory_info().rss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    # With an eager tensor for each argument, 48 bytes each: 12 MB. The allocator takes up to three.
    assert int(done.stdout) < 6e6


def test_an_error_in_the_graph_is_raised():
    graph = Graph(lambda x: [tf.debugging.check_numerics(x, "here")])
    with pytest.raises(tf.errors.InvalidArgumentError):
        graph(np.array([np.nan]))


def test_many_graphs_are_no_reason_for_a_warning(caplog):
    graphs = [Graph(lambda x, i=i: [x + i]) for i in range(12)]
    assert [int(graph(np.int64(1))[0]) for graph in graphs] == list(range(1, 13))
    assert "retracing" not in caplog.text


def test_the_norm_is_that_of_all_numbers_together():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in [(), (3, 5), (400_003,), (4_096 * 50,)]]
    (norm,) = Graph(lambda: [global_norm([tf.constant(array) for array in arrays])])()
    assert norm == pytest.approx(
        np.linalg.norm(np.concatenate([array.ravel() for array in arrays]).astype(float)), rel=1e-5
    )


NORMS = """
import numpy as np, tensorflow as tf
from hvd_dqn.graphs import Graph, global_norm
norm = Graph(lambda x: [global_norm([tf.reshape(x, [200_000])])])
rng = np.random.default_rng(0)
print("norms", *(norm(rng.normal(size=200_000).astype(np.float32))[0].tobytes().hex() for _ in range(30)))
"""


def test_the_norm_does_not_depend_on_the_number_of_threads():
    def on(threads):
        environment = os.environ | {"TF_NUM_INTRAOP_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, "-c", NORMS], env=environment, capture_output=True, text=True, timeout=300
        )
        return done.stdout.split("norms ")[1]

    assert on(1) == on(3) == on(8)


def test_gradients_are_tensors_also_of_rows_and_of_what_does_not_count():
    table, unused = tf.Variable(tf.ones([4, 2])), tf.Variable([1.0, 2.0])
    with DenseTape() as tape:
        total = tf.reduce_sum(tf.gather(table, [1, 1, 3]))
    rows, none = tape.gradient(total, [table, unused])
    assert rows.numpy().tolist() == [[0, 0], [2, 2], [0, 0], [1, 1]]
    assert none.numpy().tolist() == [0, 0]


def test_several_threads_get_the_results_of_their_own_arguments():
    graph = Graph(lambda x: [x + 1.0])

    def ask(number):
        return all(
            np.array_equal(graph(np.full(number, float(number)))[0], np.full(number, number + 1.0)) for _ in range(200)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(1, 9)))
