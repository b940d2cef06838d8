"""Schedules against values worked out by hand."""

import numpy as np
import pytest

from hvd_dqn.agent.schedules import epsilon_ladder, linear


def test_linear_goes_from_start_to_end_and_stays():
    #   step  duration  value
    for step, duration, value in [(-5, 10, 1.0), (0, 10, 1.0), (5, 10, 0.6), (10, 10, 0.2), (99, 10, 0.2), (0, 0, 0.2)]:
        assert linear(step, 1.0, 0.2, duration) == pytest.approx(value)


def test_the_ladder_without_exponent_is_flat():
    assert np.array_equal(epsilon_ladder(0.3, 0.0, 2, 3, 8), [0.3, 0.3, 0.3])


def test_the_ladder_has_the_papers_ends():
    ladder = epsilon_ladder(0.4, 7.0, 0, 8, 8)
    assert ladder[[0, -1]] == pytest.approx([0.4, 0.4**8])


def test_a_single_environment_has_the_first_rung():
    assert epsilon_ladder(0.4, 7.0, 0, 1, 1) == pytest.approx([0.4])
