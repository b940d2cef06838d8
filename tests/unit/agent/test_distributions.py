"""Distributional targets and losses against tables worked out by hand, and against loops over single numbers."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_dqn.agent.distributions import (
    categorical_target,
    cross_entropy,
    entropy,
    midpoints,
    quantile_huber,
    quantile_target,
)

RNG = np.random.default_rng(0)
SUPPORT = [-1.0, 0.0, 1.0, 2.0]


def test_a_return_between_two_atoms_is_divided_and_one_beyond_the_support_goes_to_its_end():
    #                  reward discount probabilities          projected
    for r, d, p, expected in [
        (0.0, 1.0, [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),  # nothing moves
        (0.0, 0.0, [0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0]),  # terminal: all at the reward
        (0.25, 0.0, [0.1, 0.2, 0.3, 0.4], [0.0, 0.75, 0.25, 0.0]),
        (0.0, 0.5, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]),  # -0.5
        (0.0, 0.5, [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]),  # 1, an atom itself
        (5.0, 1.0, [0.5, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 1.0]),
        (-9.0, 0.9, [0.5, 0.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0]),
    ]:
        result = categorical_target(tf.constant([r]), tf.constant([d]), tf.constant([p]), tf.constant(SUPPORT))
        assert result.numpy()[0] == pytest.approx(expected, abs=1e-6)


def test_the_projection_is_that_of_a_loop_over_atoms_and_keeps_probability_and_mean():
    support = np.linspace(-10, 10, 51).astype(np.float32)
    reward, discount = RNG.uniform(-2, 2, 20).astype(np.float32), RNG.uniform(0, 0.8, 20).astype(np.float32)
    p = RNG.dirichlet(np.ones(51), 20).astype(np.float32)
    expected = np.zeros((20, 51))
    for b in range(20):  # Bellemare et al. 2017, Algorithm 1
        for j in range(51):
            place = (np.clip(reward[b] + discount[b] * support[j], -10, 10) + 10) / 0.4
            low = int(np.floor(place))
            high = min(low + 1, 50)
            expected[b, low] += p[b, j] * (1 - (place - low))
            expected[b, high] += p[b, j] * (place - low)
    result = categorical_target(*map(tf.constant, (reward, discount, p, support))).numpy()
    np.testing.assert_allclose(result, expected, atol=5e-5)  # float32
    np.testing.assert_allclose(result.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(result @ support, reward + discount * (p @ support), atol=1e-4)


def test_cross_entropy_and_entropy_by_hand():
    even, sure = [0.5, 0.5], [1.0, 0.0]
    #                 logits      target  cross entropy       entropy of the target
    for logits, p, crossed, own in [
        ([0.0, 0.0], even, np.log(2), np.log(2)),
        ([0.0, 0.0], sure, np.log(2), 0.0),
        ([np.log(3), 0.0], sure, np.log(4 / 3), 0.0),
        ([np.log(3), 0.0], even, np.log(4) - 0.5 * np.log(3), np.log(2)),
    ]:
        assert cross_entropy(tf.constant([logits], tf.float32), tf.constant([p])).numpy() == pytest.approx([crossed])
        assert entropy(tf.constant([p])).numpy() == pytest.approx([own], abs=1e-7)


def test_quantiles_of_the_target_are_moved_and_discounted():
    moved = quantile_target(tf.constant([1.0, 1.0]), tf.constant([0.5, 0.0]), tf.constant([[2.0, 4.0], [2.0, 4.0]]))
    assert moved.numpy().tolist() == [[2, 3], [1, 1]]


def test_quantile_huber_by_hand():
    #                quantiles  fractions   target       loss
    for theta, tau, target, expected in [
        ([0.0], [0.5], [0.0], 0.0),
        ([0.0], [0.25], [0.5], 0.25 * 0.125),  # the target lies above: the fraction
        ([0.0], [0.25], [-0.5], 0.75 * 0.125),
        ([0.0], [0.25], [3.0], 0.25 * 2.5),  # linear beyond 1
        ([0.0], [0.25], [3.0, -0.5], (0.25 * 2.5 + 0.75 * 0.125) / 2),  # the mean over targets
        ([0.0, 1.0], [0.25, 0.75], [3.0], 0.25 * 2.5 + 0.75 * 1.5),  # the sum over quantiles
    ]:
        loss = quantile_huber(*(tf.constant(x)[None] for x in (theta, tau)), tf.constant([target]))
        assert loss.numpy() == pytest.approx([expected])
        assert quantile_huber(tf.constant([theta]), tf.constant(tau), tf.constant([target])).numpy() == pytest.approx(
            [expected]
        )


def test_the_loss_is_least_at_the_true_quantiles():
    target = np.sort(RNG.uniform(-100, 100, 4001)).astype(np.float32)  # so wide that nearly all errors are linear
    theta, rate = tf.Variable(np.zeros((1, 4), np.float32)), 20.0
    for _ in range(400):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(quantile_huber(theta, midpoints(4), tf.constant(target[None])))
        theta.assign_sub(rate * tape.gradient(loss, theta))
    expected = np.quantile(target, [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(theta.numpy()[0], expected, atol=0.5)


def test_midpoints_divide_the_interval_evenly():
    assert midpoints(4).numpy().tolist() == [0.125, 0.375, 0.625, 0.875]


def test_no_gradient_flows_through_targets():
    p, theta = tf.Variable([[0.2, 0.3, 0.1, 0.4]]), tf.Variable([[1.0, 2.0]])
    one = tf.constant([1.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(categorical_target(one, 0.5 * one, p, tf.constant(SUPPORT)))
        loss += tf.reduce_sum(quantile_target(one, 0.5 * one, theta))
    assert tape.gradient(loss, [p, theta]) == [None, None]
