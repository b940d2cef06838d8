"""The ledger's sums over ranks."""

import math
import threading
import time

import numpy as np
import pytest

from hvd_dqn.training.ledger import COLUMNS, TIMED, Ledger


class Solo:
    size = 1

    def sum(self, values):
        return values

    max = sum


class Threads:
    """One world for N ranks, each a thread; remembers the shape of every vector that came by."""

    def __init__(self, size):
        self.size = size
        self.tapes = [[] for _ in range(size)]
        self._barrier = threading.Barrier(size, timeout=10)
        self._values = [None] * size

    def rank(self, rank):
        world = self

        class Rank:
            size = world.size

            def sum(self, values):
                return world._reduce(rank, "sum", values)

            def max(self, values):
                return world._reduce(rank, "max", values)

        return Rank()

    def _reduce(self, rank, name, values):
        assert values.dtype == np.float64
        self.tapes[rank].append((name, values.shape))
        self._values[rank] = values
        self._barrier.wait()
        result = getattr(np, name)(np.stack(self._values), axis=0)
        self._barrier.wait()
        return result

    def run(self, *mains):
        """What `main(world)` returned on each rank."""
        results = [None] * self.size

        def call(rank):
            results[rank] = mains[rank](self.rank(rank))

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        return results


def report(ledger, total_steps=100, updates=10, replay_size=50, **others):
    values = {"cycle": 9, "epsilon": 0.5, "learning_rate": 1e-3, **others}
    return ledger.report(total_steps=total_steps, updates=updates, replay_size=replay_size, **values)


def same(row, other):
    return list(row) == list(other) and np.array_equal(list(row.values()), list(other.values()), equal_nan=True)


def test_a_row_has_exactly_the_designs_columns_in_order():
    expected = (
        "total_steps cycle updates seconds steps_per_second updates_per_second epsilon learning_rate loss "
        "mean_q gradient_norm episodes return_mean return_max length_mean replay_size skipped_updates "
        "time_act time_env time_sample time_update time_communicate time_idle time_evaluate time_save"
    )
    assert list(report(Ledger(Solo()))) == list(COLUMNS) == expected.split()


def test_ranks_are_reduced_as_sum_and_count_not_as_a_mean_of_means():
    def first(world):  # three episodes, in two cycles
        ledger = Ledger(world)
        ledger.episodes(np.array([10.0, 20.0]), np.array([1, 2]))
        ledger.episodes(np.array([]), np.array([]))
        ledger.episodes(np.array([30.0]), np.array([6]))
        ledger.phase(4, loss_sum=8.0, q_sum=4.0, gradient_norm_sum=2.0)
        return report(ledger, replay_size=50)

    def second(world):  # one episode, fewer updates
        ledger = Ledger(world)
        ledger.episodes(np.array([100.0]), np.array([11]))
        ledger.phase(1, loss_sum=1.0, q_sum=6.0, gradient_norm_sum=0.5)
        ledger.phase(1, loss_sum=3.0, q_sum=2.0, gradient_norm_sum=0.5)
        return report(ledger, replay_size=40)

    row, other = Threads(2).run(first, second)
    assert same(row, other)
    for name, expected in [
        ("episodes", 4),
        ("return_mean", 160 / 4),  # a mean of means would be (20 + 100) / 2 = 60
        ("return_max", 100.0),
        ("length_mean", 20 / 4),  # not (3 + 11) / 2 = 7
        ("loss", 12 / 6),
        ("mean_q", 12 / 6),  # not (1 + 4) / 2 = 2.5
        ("gradient_norm", 3 / 6),
        ("replay_size", 90),
        ("total_steps", 100),
        ("updates", 10),
    ]:
        assert row[name] == pytest.approx(expected), name


def test_every_rank_makes_the_same_collectives_whatever_happened_on_it():
    def busy(world):
        ledger = Ledger(world)
        ledger.episodes(np.arange(5.0), np.arange(5))
        ledger.phase(3, 1.0, 1.0, 1.0)
        with ledger.timed("act"):
            report(ledger)
        report(ledger)

    def idle(world):
        ledger = Ledger(world)
        report(ledger)
        report(ledger)

    world = Threads(3)
    world.run(busy, idle, idle)
    assert world.tapes[0] == world.tapes[1] == world.tapes[2]
    assert [name for name, _ in world.tapes[0]] == ["sum", "max"] * 2


def test_a_window_in_which_nothing_happened_has_nan_for_every_mean():
    row = report(Ledger(Solo()))
    assert {name for name, value in row.items() if math.isnan(value)} == {
        "loss", "mean_q", "gradient_norm", "return_mean", "return_max", "length_mean"
    }  # fmt: skip
    assert row["episodes"] == 0


def test_return_max_is_right_where_all_returns_are_negative_and_one_rank_has_none():
    def some(world):
        ledger = Ledger(world)
        ledger.episodes(np.array([-200.0, -110.0]), np.array([200, 110]))
        ledger.episodes(np.array([-500.0]), np.array([500]))
        return report(ledger)

    row, _ = Threads(2).run(some, lambda world: report(Ledger(world)))
    assert (row["return_max"], row["return_mean"]) == (-110.0, -270.0)


def test_a_report_starts_the_next_window():
    ledger = Ledger(Solo())
    ledger.episodes(np.array([7.0]), np.array([3]))
    ledger.phase(2, 2.0, 2.0, 2.0)
    with ledger.timed("env"):
        time.sleep(0.01)
    report(ledger)
    row = report(ledger, total_steps=200)
    assert (row["episodes"], row["time_env"]) == (0, 0.0)
    assert math.isnan(row["loss"])
    assert math.isnan(row["return_max"])


def test_times_are_the_mean_of_the_ranks_and_rates_count_all_steps_of_the_window():
    def slow(world):
        ledger = Ledger(world)
        report(ledger, total_steps=1000, updates=100)
        for _ in range(2):
            with ledger.timed("sample"):
                time.sleep(0.05)
        return report(ledger, total_steps=1500, updates=110)

    def fast(world):
        ledger = Ledger(world)
        report(ledger, total_steps=1000, updates=100)
        return report(ledger, total_steps=1500, updates=110)

    row, other = Threads(2).run(slow, fast)
    assert same(row, other)
    window = 500 / row["steps_per_second"]
    # Two times 50 ms on one rank of two, so at most half of the window; their sum would fill it.
    assert 0.05 <= row["time_sample"] <= window / 2
    assert row["time_act"] == 0.0
    assert row["updates_per_second"] == pytest.approx(10 / window)
    assert row["seconds"] >= window


def test_exchanges_are_split_into_communication_and_waiting_for_the_others():
    def rank(seconds, allreduce_seconds):
        def main(world):
            ledger = Ledger(world)
            ledger.phase(1, 0.0, 0.0, 0.0, seconds=seconds, allreduce_seconds=allreduce_seconds)
            return report(ledger), ledger.spent

        return main

    # The slow rank is the one that finds the others ready: all that it spends is communication.
    (row, fast), (other, slow) = Threads(2).run(rank(8.0, 5.0), rank(8.0, 1.0))
    assert same(row, other)
    expected = {"time_update": (3 + 7) / 2, "time_communicate": 1.0, "time_idle": 4.0 / 2}
    assert {name: row[name] for name in expected} == expected
    for spent, (update, communicate, idle) in ((fast, (3.0, 1.0, 4.0)), (slow, (7.0, 1.0, 0.0))):
        assert (spent["update"], spent["communicate"], spent["idle"]) == (update, communicate, idle)


def test_a_resumed_run_goes_on_counting_seconds_steps_and_updates():
    ledger = Ledger(Solo())
    before = dict.fromkeys(TIMED, 1.0) | {"update": 400.0}
    ledger.load_state({"seconds": 1000.0, "total_steps": 5000, "updates": 500, "spent": before})
    with ledger.timed("update"):
        time.sleep(0.02)
    assert ledger.spent | {"update": 400.0} == before
    assert ledger.spent["update"] >= 400.02
    row = report(ledger, total_steps=5100, updates=500)
    assert 1000.02 <= row["seconds"] < 1001
    assert row["steps_per_second"] <= 100 / 0.02  # not 5100 steps in 20 ms
    assert row["updates_per_second"] == 0
    state = ledger.state()
    assert (state["total_steps"], state["updates"]) == (5100, 500)
    assert state["spent"] == ledger.spent
    assert state["seconds"] >= row["seconds"]
