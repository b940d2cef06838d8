"""Targets and losses against tables worked out by hand."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_dqn.agent.losses import (
    by_dimension,
    double_q_target,
    greedy,
    huber,
    munchausen_bonus,
    q_of,
    q_target,
    row_of,
    soft_maximum,
    soft_target,
    squared,
)


def test_truncation_still_bootstraps_but_termination_does_not():
    #                          reward  discount  q_next        target
    for r, d, q, expected in [(1.0,    0.99,     [2.0, -1.0],  2.98),  # also at a truncation: the replay says 0.99
                              (1.0,    0.00,     [2.0, -1.0],  1.00),  # a terminal state
                              (-0.5,   0.81,     [-3.0, -1.0], -1.31)]:  # fmt: skip
        assert q_target(tf.constant([r]), tf.constant([d]), tf.constant([q])).numpy() == pytest.approx([expected])


def test_double_q_takes_the_online_action_at_the_target_networks_value():
    #                               online        target        q_of value
    for online, target, expected in [([5.0, 1.0], [1.0, 7.0], 1.0),
                                     ([0.0, 1.0], [1.0, 7.0], 7.0)]:  # fmt: skip
        result = double_q_target(tf.constant([0.0]), tf.constant([1.0]), tf.constant([online]), tf.constant([target]))
        assert result.numpy() == pytest.approx([expected])


def test_no_gradient_flows_through_a_target():
    q = tf.Variable([[1.0, 2.0]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(q_target(tf.constant([1.0]), tf.constant([0.9]), q))
        loss += tf.reduce_sum(double_q_target(tf.constant([1.0]), tf.constant([0.9]), q, q))
    assert tape.gradient(loss, q) is None


def test_q_of_picks_one_value_per_row():
    q = tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert q_of(q, tf.constant([2, 0])).numpy().tolist() == [3.0, 4.0]


def test_huber_is_quadratic_to_one_and_linear_beyond():
    #                  error  loss   gradient (the clipped error)
    for error, loss, gradient in [
        (0.0, 0.0, 0.0),
        (0.5, 0.125, 0.5),
        (-1.0, 0.5, -1.0),
        (3.0, 2.5, 1.0),
        (-3.0, 2.5, -1.0),
    ]:
        x = tf.Variable(error)
        with tf.GradientTape() as tape:
            y = huber(x)
        assert y.numpy() == pytest.approx(loss)
        assert tape.gradient(y, x).numpy() == pytest.approx(gradient)


def test_squared_has_the_error_as_its_gradient():
    for error, loss in [(0.5, 0.125), (-3.0, 4.5)]:
        x = tf.Variable(error)
        with tf.GradientTape() as tape:
            y = squared(x)
        assert y.numpy() == pytest.approx(loss)
        assert tape.gradient(y, x).numpy() == pytest.approx(error)


# Two dimensions of two and of three choices: the shorter one is padded.
FACTORED = (2, 3)


def test_a_factored_value_is_the_mean_over_dimensions_and_its_maximum_is_taken_in_each():
    q = by_dimension(tf.constant([[1.0, 3.0, 5.0, 9.0, 7.0]]), FACTORED, tf.float32.min)
    assert q.numpy()[0].tolist() == [[1.0, 3.0, tf.float32.min], [5.0, 9.0, 7.0]]
    for action, value in [((0, 0), 3.0), ((1, 0), 4.0), ((1, 2), 5.0)]:
        assert q_of(q, tf.constant([action])).numpy().tolist() == [value]
    target = q_target(tf.constant([1.0]), tf.constant([0.5]), q)
    assert target.numpy().tolist() == [1.0 + 0.5 * (3.0 + 9.0) / 2]


def test_a_factored_double_target_chooses_online_and_values_by_the_target_network_in_each_dimension():
    online = by_dimension(tf.constant([[-2.0, -1.0, -7.0, -9.0, -8.0]]), FACTORED, tf.float32.min)  # chooses 1 and 0
    target = by_dimension(tf.constant([[10.0, 4.0, 6.0, 20.0, 30.0]]), FACTORED, tf.float32.min)
    result = double_q_target(tf.constant([1.0]), tf.constant([0.5]), online, target)
    assert result.numpy().tolist() == [1.0 + 0.5 * (4.0 + 6.0) / 2]


def test_a_padded_choice_is_never_trained():
    out = tf.Variable([[1.0, 3.0, 5.0, 9.0, 7.0]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(q_of(by_dimension(out, FACTORED, tf.float32.min), tf.constant([[1, 2]])))
    assert tape.gradient(loss, out).numpy().tolist() == [[0.0, 0.5, 0.0, 0.0, 0.5]]


HUGE = 1e30


@pytest.mark.parametrize("double", [False, True])
def test_what_a_mask_forbids_is_never_bootstrapped_from(double):
    #    q of the next state                  its mask                                   value
    for q, mask, value in [
        ([[HUGE, 1.0, 2.0]],                  [[False, True, True]],                     2.0),
        ([[HUGE, 1.0, -2.0]],                 [[False, False, True]],                    -2.0),
        ([[HUGE, 1.0, 2.0]],                  [[False, False, False]],                   None),  # terminal
        ([[[HUGE, 4.0], [1.0, HUGE]]],        [[[False, True], [True, False]]],          2.5),
    ]:  # fmt: skip
        q, mask = tf.constant(q), tf.constant(mask)
        reward, discount = tf.constant([1.0]), tf.constant([0.0 if value is None else 0.5])
        function = double_q_target if double else q_target
        arguments = (q, q, mask) if double else (q, mask)
        expected = 1.0 if value is None else 1.0 + 0.5 * value
        assert function(reward, discount, *arguments).numpy().tolist() == [expected]


def test_the_soft_maximum_is_the_value_of_the_softmax_policy_with_its_entropy():
    for q, temperature in [([1.0, 2.0, -1.0], 1.0), ([1.0, 2.0, -1.0], 0.03), ([50.0, 50.0, -80.0], 0.03)]:
        scaled = np.array(q, np.float64) / temperature
        policy = np.exp(scaled - scaled.max())
        policy /= policy.sum()
        entropy = -np.sum(policy * np.log(np.maximum(policy, 1e-300)))
        expected = policy @ q + temperature * entropy
        assert soft_maximum(tf.constant([q]), temperature).numpy() == pytest.approx([expected], rel=1e-5)
        masked = soft_maximum(tf.constant([[*q, 99.0]]), temperature, tf.constant([[True, True, True, False]]))
        assert masked.numpy() == pytest.approx([expected], rel=1e-5)
    target = soft_target(tf.constant([1.0]), tf.constant([0.5]), tf.constant([[2.0, 2.0]]), 1.0)
    assert target.numpy() == pytest.approx([1 + 0.5 * (2 + np.log(2))])


def test_the_munchausen_bonus_is_the_scaled_log_policy_within_its_limits():
    #              q           action temperature lowest  bonus
    for q, action, temperature, lowest, expected in [
        ([0.0, 0.0], 0, 1.0, -1.0, -np.log(2)),
        ([0.0, 0.0], 1, 0.03, -1.0, -0.03 * np.log(2)),
        ([np.log(3), 0.0], 0, 1.0, -1.0, np.log(3 / 4)),
        ([np.log(3), 0.0], 1, 1.0, -9.0, np.log(1 / 4)),
        ([np.log(3), 0.0], 1, 1.0, -1.0, -1.0),
        ([5.0, 0.0], 1, 0.03, -1.0, -1.0),
    ]:
        bonus = munchausen_bonus(tf.constant([q], tf.float32), tf.constant([action]), temperature, lowest)
        assert bonus.numpy() == pytest.approx([expected], abs=1e-6)


def test_the_greedy_action_is_allowed_and_its_row_is_picked():
    q = tf.constant([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    assert greedy(q).numpy().tolist() == [1, 0]
    assert greedy(q, tf.constant([[True, False, True], [False, True, True]])).numpy().tolist() == [2, 1]
    rows = row_of(tf.reshape(tf.range(12.0), [2, 3, 2]), tf.constant([1, 2]))
    assert rows.numpy().tolist() == [[2, 3], [10, 11]]
