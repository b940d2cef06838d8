"""The cost model: hand-computed tables, and that it finds again what it was given."""

import math

import numpy as np
import pytest

from hvd_dqn.bench import projection
from hvd_dqn.bench.projection import (
    Interconnect,
    Line,
    PhaseTime,
    at_batch,
    batch_for,
    cost,
    efficiency,
    expected_wait,
    fit_interconnect,
    fit_line,
    waiting,
)
from hvd_dqn.ranks.placement import FUSED_FLOATS

STEADY = PhaseTime(batch=64, updates=4, seconds=0.004, least=0.004, deviation=0.0, message=1000)
INTERCONNECT = Interconnect(latency=10e-6, seconds_per_byte=1e-9, overhead=20e-6)


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ([(1, 3), (2, 5), (10, 21)], (1, 2)),
        ([(64, 6.4), (64, 12.8)], (0, 0.15)),  # one batch: through the origin
        ([(1, 1), (2, 4)], (0, 1.2)),  # would begin below 0: minimises (1 - s)**2 + (1 - s / 2)**2
        ([(1, 4), (2, 2)], (2.4, 0)),  # would fall: minimises (1 - f / 4)**2 + (1 - f / 2)**2
    ],
)
def test_a_line_fits_relative_errors_and_nothing_takes_less_than_no_time(points, line):
    assert fit_line(points) == pytest.approx(line, abs=1e-9)


def test_a_short_message_is_doubled_and_a_long_one_goes_round_the_ring():
    #    ranks   bytes      microseconds: Horovod's 20 and two hops per doubling, then the cheaper
    for n, size, expected in [
        (1, 1000, 0),
        (2, 1000, 40 + (10 + 1)),  # one hop of all of it, against two of a half
        (2, 10**6, 40 + (10 + 1000)),  # the ring's two hops would take 10 more
        (8, 1000, 80 + 3 * (10 + 1)),
        (8, 10**6, 80 + 14 * (10 + 125)),
        (5, 1000, 80 + 3 * (10 + 1)),  # no power of two: rounded up
    ]:
        assert 1e6 * INTERCONNECT.allreduce(n, size) == pytest.approx(expected), (n, size)


def test_a_network_is_found_again_from_all_reduces():
    sizes = (4_096, 271_368, 67_108_864)
    horovod = {size: INTERCONNECT.allreduce(2, size) for size in sizes}
    assert fit_interconnect(2, horovod, {1_000: 11e-6, 2_000: 30e-6, 271_368: 2e-6}) == pytest.approx(
        INTERCONNECT, rel=1e-6
    )
    # Without MPI's own, half of the fixed 50 µs is the network's, for two agreements and the message.
    assert fit_interconnect(2, horovod, {}) == pytest.approx(Interconnect(25e-6 / 3, 1e-9, 25e-6), rel=1e-6)


def test_of_four_ranks_large_messages_count_as_the_rings():
    horovod = {size: 20e-6 + 40e-6 + 20e-6 + size * 1.5e-9 for size in (1_000, 10**8)}  # 2 * 3 / 4 of the bytes
    assert fit_interconnect(4, horovod, {1_000: 21.5e-6}) == pytest.approx(Interconnect(10e-6, 1e-9, 20e-6), rel=1e-3)


def test_the_longest_of_several_draws():
    assert expected_wait(np.array([1.0, 3.0]), 1) == 0
    # The longest of two is 1 in a quarter of all cases: 2.5, and the mean is 2. Of three, 2.75.
    assert expected_wait(np.array([3.0, 1.0]), 2) == pytest.approx(0.5)
    assert expected_wait(np.array([3.0, 1.0]), 3) == pytest.approx(0.75)


def test_many_small_delays_cost_more_the_more_often_ranks_wait_and_one_long_delay_does_not():
    # Shape 10,000: nearly normal, so that the longer of two is deviation / sqrt(pi) late, and K waits cost sqrt(K) as much.
    normal = STEADY._replace(seconds=1.1, least=0.1, deviation=0.01)
    assert waiting(normal, 2, 1) == pytest.approx(0.01 / math.sqrt(math.pi), rel=0.02)
    assert waiting(normal, 2, 16) == pytest.approx(0.04 / math.sqrt(math.pi), rel=0.02)
    # Shape 0.01: a delay of about 1 s in one of a hundred phases, which two ranks seldom meet together.
    rare = STEADY._replace(seconds=0.11, least=0.1, deviation=0.1)
    assert waiting(rare, 2, 16) == pytest.approx(waiting(rare, 2, 1), rel=0.25)
    assert waiting(rare, 2, 1) == pytest.approx(0.01, rel=0.1)
    assert waiting(STEADY, 512, 4) == 0


def test_gradients_are_sent_in_every_update_and_parameters_with_their_moments_once():
    gradients, parameters = (cost(STEADY, INTERCONNECT, 2, sync) for sync in ("gradients", "parameters"))
    assert gradients == pytest.approx({"work": 0.004, "waiting": 0, "talking": 4 * 51e-6})
    assert parameters == pytest.approx({"work": 0.004, "waiting": 0, "talking": 53e-6})
    assert efficiency(gradients) == pytest.approx(4000 / 4204)
    assert cost(STEADY._replace(deviation=1.0, least=0.0), INTERCONNECT, 1, "gradients")["waiting"] == 0
    uneven = STEADY._replace(least=0.003, deviation=0.0005)
    assert cost(uneven, INTERCONNECT, 8, "gradients")["waiting"] == pytest.approx(waiting(uneven, 8, 4))
    assert cost(uneven, INTERCONNECT, 8, "parameters")["waiting"] == pytest.approx(waiting(uneven, 8, 1))


def test_large_parameters_are_sent_as_three_messages():
    for size, messages in ((4 * FUSED_FLOATS, 1), (4 * FUSED_FLOATS + 4, 3)):
        talking = cost(STEADY._replace(message=size), INTERCONNECT, 64, "parameters")["talking"]
        assert talking == pytest.approx(messages * INTERCONNECT.allreduce(64, 3 * size / messages))


def test_another_batch_stretches_the_phase_and_what_is_late_in_it_evens_out():
    phase = STEADY._replace(least=0.003, deviation=0.0005)
    larger = at_batch(phase, Line(0.0004, 1e-5), 160)  # 4 * (0.0004 + 0.0016) = 0.008
    assert larger == pytest.approx(PhaseTime(160, 4, 0.008, 0.006, 0.0005 * 2**0.5, 1000))


def test_the_batch_for_an_efficiency(monkeypatch):
    # At 90 % an update takes 9 times its message's 51 µs: 459 µs = 79 µs + 3.8 µs * 100.
    assert batch_for(0.9, STEADY, Line(79e-6, 3.8e-6), INTERCONNECT, 2, "gradients") == pytest.approx(100, abs=1)
    assert batch_for(0.9, STEADY, Line(500e-6, 2e-6), INTERCONNECT, 2, "gradients") == 1
    late = STEADY._replace(least=0.0, deviation=0.004)
    enough = batch_for(0.9, late, Line(79e-6, 3.8e-6), INTERCONNECT, 2, "gradients")
    assert (enough or 0) > 1_000
    monkeypatch.setattr(projection, "MOST_BATCH", 1_000)
    assert batch_for(0.9, late, Line(79e-6, 3.8e-6), INTERCONNECT, 2, "gradients") is None
