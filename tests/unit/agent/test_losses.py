"""Targets and losses against tables worked out by hand."""

import pytest
import tensorflow as tf

from hvd_dqn.agent.losses import double_q_target, huber, q_of, q_target, squared


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
