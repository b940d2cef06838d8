"""What observations become before a network sees them, and the statistics by which they are normalised."""

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import tensorflow as tf

from hvd_dqn.agent.layout import Layout, Part, single
from hvd_dqn.agent.preprocess import NoStatistics, Preprocess, RunningStatistics

RNG = np.random.default_rng(0)
# Elements of very different place and width; the last one never changes.
DATA = RNG.normal([0, 5, -300, 1e4, 7], [1, 0.1, 40, 2, 0], size=(1200, 5)).astype(np.float32)


def numbers(shape, dtype=np.float32, stack=1) -> Layout:
    """One array of numbers that are normalised."""
    return Layout([Part(shape, np.dtype(dtype), normalized=True)], stack)


def states(number, stack=1) -> Layout:
    return Layout([Part((1,), np.dtype(np.int32), categories=(number,))], stack)


def alone(pending: np.ndarray) -> np.ndarray:
    """The sum over one rank."""
    return pending


def pending(normalizer: RunningStatistics) -> np.ndarray:
    """What this rank would add to the sum."""
    sent = []
    deepcopy(normalizer).merge(lambda values: sent.append(values) or values)
    return sent[0]


def merge_together(ranks: list[RunningStatistics]) -> None:
    """Merges as ranks do, each in a thread of its own: a merge may be more than one collective."""
    barrier, sent = threading.Barrier(len(ranks)), {}

    def add_up(number: int, values: np.ndarray) -> np.ndarray:
        sent[number] = values
        barrier.wait(10)
        total = np.sum([sent[i] for i in range(len(ranks))], axis=0)
        barrier.wait(10)
        return total

    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(lambda i: ranks[i].merge(lambda values: add_up(i, values)), range(len(ranks))))


def merge_all(ranks: list[RunningStatistics]) -> None:
    reduced = sum(pending(rank) for rank in ranks)
    for rank in ranks:
        rank.merge(lambda _: reduced)


@pytest.mark.parametrize("pieces", [1, 2, 7, 1200])
def test_the_statistics_are_those_of_all_data_at_once_however_it_arrives(pieces):
    normalizer = RunningStatistics(numbers((5,)))
    for piece in np.array_split(DATA, pieces):
        normalizer.observe(piece)
        normalizer.merge(alone)
    data = DATA.astype(np.float64)
    np.testing.assert_allclose(normalizer.mean, data.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(normalizer.scale[:4], 1 / data.std(0)[:4], rtol=1e-5)
    assert np.isfinite(normalizer.scale).all()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_that_share_the_data_hold_the_statistics_of_one_rank_bit_equal_among_themselves(size):
    one = RunningStatistics(numbers((5,)))
    ranks = [RunningStatistics(numbers((5,))) for _ in range(size)]
    for cycle in np.array_split(DATA, 10):
        one.observe(cycle)
        one.merge(alone)
        # Unequal parts, and none for the second of several: ranks do not see equally many valid steps.
        for rank, part in zip(ranks, np.split(cycle, [7, 7, 30][: size - 1]), strict=True):
            rank.observe(part)
        merge_all(ranks)
    for rank in ranks:
        np.testing.assert_allclose(rank.mean, one.mean, rtol=1e-6)
        np.testing.assert_allclose(rank.scale[:4], one.scale[:4], rtol=1e-6)
        for key, value in rank.state().items():
            np.testing.assert_array_equal(value, ranks[0].state()[key])


def test_several_observations_between_two_merges_count_once_each():
    normalizer = RunningStatistics(numbers((1,)))
    for value in (1.0, 2.0, 6.0):
        normalizer.observe(np.array([[value]]))
    # count, sum, sum of squares, against the first mean, which is 0
    np.testing.assert_array_equal(pending(normalizer), [3, 9, 41])
    normalizer.merge(alone)
    np.testing.assert_array_equal(pending(normalizer), [0, 0, 0])
    assert normalizer.mean[0] == 3
    assert normalizer.scale[0] == pytest.approx(1 / np.sqrt(14 / 3))


def test_a_small_deviation_far_from_zero_is_not_lost():
    normalizer = RunningStatistics(numbers((1,)))
    data = 1e8 + RNG.normal(size=(2000, 1))
    for piece in np.array_split(data, 20):
        normalizer.observe(piece)
        normalizer.merge(alone)
    # Only the first piece is summed against 0, where float64 resolves 1e16 to about 1.
    assert normalizer.scale[0] == pytest.approx(1 / data.std(), rel=0.05)


def test_merging_nothing_changes_nothing_and_before_any_merge_observations_stay_as_they_are():
    frames = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    normalizer = RunningStatistics(numbers((2, 3)))
    normalizer.merge(alone)
    preprocess = Preprocess(numbers((2, 3)))
    preprocess.set_statistics(normalizer.mean, normalizer.scale)
    np.testing.assert_allclose(preprocess.array(frames), frames, rtol=1e-6)
    assert Preprocess(single((2, 3))).array(frames) is frames
    Preprocess(single((2, 3))).set_statistics(NoStatistics.mean, NoStatistics.scale)  # of nobody's use, and of no harm


def known(stack: int = 1) -> Preprocess:
    """Mean 2 and 10, deviation 2 and 1, of each of stacked frames."""
    preprocess = Preprocess(numbers((2,), stack=stack))
    preprocess.set_statistics(np.float32([2, 10]), np.float32([0.5, 1]))
    return preprocess


def test_normalised_values_are_float32_and_end_at_ten_deviations():
    for dtype in (np.float32, np.float64, np.int32):
        result = known().array(np.array([[0, 10], [6, 200]], dtype=dtype))
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, [[-1, 0], [2, 10]], rtol=1e-6)
    np.testing.assert_array_equal(known().array(np.float32([[-1e6, 1e6]])), [[-10, 10]])


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_a_time_stamp_keeps_its_last_digits(dtype):
    """float32 resolves 128 at 1.7e9."""
    preprocess = Preprocess(numbers((1,), dtype))
    preprocess.set_statistics(np.array([1.7e9]), np.array([0.5]))
    stamps = np.array([[1.7e9 - 3], [1.7e9], [1.7e9 + 8]], dtype)
    for inputs in (preprocess.array(stamps), preprocess(tf.constant(stamps)).numpy()):
        assert inputs.ravel().tolist() == [-1.5, 0, 4]


def test_each_frame_of_a_stack_is_normalised_like_a_single_one():
    frames = RNG.normal(size=(3, 4, 2)).astype(np.float32)  # [stack, batch, element]
    single = [known().array(frame) for frame in frames]
    np.testing.assert_array_equal(known(3).array(np.concatenate(frames, axis=-1)), np.concatenate(single, axis=-1))


@pytest.mark.parametrize("kind", ["float", "normalised", "normalised images", "states", "stacked states", "bytes"])
def test_the_graph_and_numpy_make_the_same_inputs_to_the_bit(kind):
    preprocess, observation = {
        "float": (Preprocess(single((4,))), RNG.normal(size=(7, 4)).astype(np.float32)),
        "normalised": (known(2), RNG.normal(0, 30, size=(7, 4)).astype(np.float32)),
        "normalised images": (
            Preprocess(numbers((3, 3, 1), stack=2)),
            RNG.normal(size=(7, 3, 3, 2)).astype(np.float32),
        ),
        "states": (Preprocess(states(5)), RNG.integers(5, size=(7, 1)).astype(np.int32)),
        "stacked states": (Preprocess(states(5, stack=3)), RNG.integers(5, size=(7, 3)).astype(np.int32)),
        "bytes": (Preprocess(single((4,), np.uint8, divisor=255)), RNG.integers(256, size=(7, 4)).astype(np.uint8)),
    }[kind]
    if kind == "normalised images":
        preprocess.set_statistics(RNG.normal(size=(3, 3, 1)).astype(np.float32), np.full((3, 3, 1), 0.7, np.float32))
    inputs = preprocess.array(observation)
    assert inputs.shape == (7, *preprocess.input_shape)
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(preprocess(tf.constant(observation)).numpy(), inputs)


def test_a_restored_normalizer_continues_like_the_one_that_was_saved():
    one, other = RunningStatistics(numbers((5,))), RunningStatistics(numbers((5,)))
    one.observe(DATA[:500])
    one.merge(alone)
    other.observe(DATA[:3])  # forgotten by load_state
    other.load_state(one.state())
    np.testing.assert_array_equal(other.mean, one.mean)
    np.testing.assert_array_equal(other.scale, one.scale)
    for normalizer in (one, other):
        normalizer.observe(DATA[500:])
        normalizer.merge(alone)
    for key, value in one.state().items():
        np.testing.assert_array_equal(value, other.state()[key])
    np.testing.assert_allclose(one.mean, DATA.astype(np.float64).mean(0), rtol=1e-6, atol=1e-6)


TIMES = 1.7e9 + np.random.default_rng(2).integers(20, size=(600, 1))


@pytest.mark.parametrize("size", [1, 3])
def test_the_variance_of_time_stamps_is_right_from_the_first_merge_on(size):
    """1.7e9**2 is 2.9e18, where float64 resolves 512."""
    ranks = [RunningStatistics(numbers((1,), np.float64)) for _ in range(size)]
    data = np.array_split(TIMES, 3 * size)
    for cycle in range(3):
        for rank, part in zip(ranks, data[cycle * size :], strict=False):
            rank.observe(part)
        if size == 3 and cycle == 0:  # one rank saw nothing, and has no origin of its own
            ranks[1] = RunningStatistics(numbers((1,), np.float64))
            seen = np.concatenate([data[0], data[2]])
        else:
            seen = np.concatenate([seen, *data[cycle * size : (cycle + 1) * size]]) if cycle else data[0]
        merge_together(ranks)
        for rank in ranks:
            assert rank.mean[0] == pytest.approx(seen.mean(), abs=1e-3)
            assert rank.scale[0] == pytest.approx(1 / seen.std(), rel=1e-5)
            assert rank.state() == ranks[0].state()


def test_a_time_stamp_that_waits_for_its_first_merge_is_part_of_a_checkpoint():
    one, other = RunningStatistics(numbers((1,), np.float64)), RunningStatistics(numbers((1,), np.float64))
    one.observe(TIMES[:50])
    other.load_state(one.state())
    other.load_pending_state(one.pending_state())
    for statistics in (one, other):
        statistics.observe(TIMES[50:100])
        statistics.merge(alone)
    assert one.state() == other.state()
    assert one.scale[0] == pytest.approx(1 / TIMES[:100].std(), rel=1e-5)
