"""The temporal-difference targets and losses of Q-learning, as pure functions.

Values of actions are q [B, A] and actions [B]; for actions of D dimensions with at most A choices each, q is [B, D, A] and
actions are [B, D]. Then the value of an action is the mean over its dimensions, and the greedy action maximises in each
dimension (Seyde et al. 2023, arXiv:2210.12566, equation 2). `next_mask`, of q's shape, is True for the actions that
the next state allows; None allows all.
"""

from collections.abc import Sequence

import tensorflow as tf


def q_target(
    reward: tf.Tensor, discount: tf.Tensor, q_next_target: tf.Tensor, next_mask: tf.Tensor | None = None
) -> tf.Tensor:
    """Bootstraps with the target network's own maximum (Mnih et al. 2015, Algorithm 1).

    `reward` and `discount` are [B]; `discount` is 0 at terminal states and gamma**n elsewhere. Returns [B], gradients
    stopped.
    """
    highest = tf.reduce_max(_allowed(q_next_target, next_mask), axis=-1)  # [B] or [B, D]
    return tf.stop_gradient(reward + discount * _over_dimensions(highest))


def double_q_target(
    reward: tf.Tensor,
    discount: tf.Tensor,
    q_next_online: tf.Tensor,
    q_next_target: tf.Tensor,
    next_mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """Bootstraps with the online argmax, valued by the target network (van Hasselt et al. 2016, arXiv:1509.06461).

    `reward` and `discount` are [B]; `discount` is 0 at terminal states and gamma**n elsewhere. Returns [B], gradients
    stopped.
    """
    best = tf.argmax(_allowed(q_next_online, next_mask), axis=-1)
    return tf.stop_gradient(reward + discount * q_of(q_next_target, best))


def q_of(q: tf.Tensor, action: tf.Tensor) -> tf.Tensor:
    """The values [B] of the actions taken, among those of all actions."""
    # A product with a one-hot mask: on CPU several times faster than tf.gather and its gradient for a few actions.
    return _over_dimensions(tf.reduce_sum(q * tf.one_hot(action, q.shape[-1], dtype=q.dtype), axis=-1))


def by_dimension(values: tf.Tensor, sizes: Sequence[int], fill: float | bool) -> tf.Tensor:
    """[B, D, A] of [B, n_1 + ... + n_D], where `sizes` is (n_1, ..., n_D). Shorter dimensions end with `fill`."""
    widest = max(sizes)
    if min(sizes) == widest:
        return tf.reshape(values, [-1, len(sizes), widest])
    parts = tf.split(values, list(sizes), axis=1)
    filled = [tf.pad(x, [[0, 0], [0, widest - n]], constant_values=fill) for x, n in zip(parts, sizes, strict=True)]
    return tf.stack(filled, axis=1)


def _allowed(q: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    # The lowest finite number: 0 * -inf would be NaN.
    return q if mask is None else tf.where(mask, q, q.dtype.min)


def _over_dimensions(values: tf.Tensor) -> tf.Tensor:
    """[B] the means of values [B, D]; values [B] as they are."""
    return values if len(values.shape) == 1 else tf.reduce_mean(values, axis=1)


def huber(error: tf.Tensor) -> tf.Tensor:
    """0.5 error**2 up to |error| = 1 and |error| - 0.5 beyond, elementwise: the error clipping of Mnih et al. 2015."""
    size = tf.abs(error)
    return tf.where(size <= 1.0, 0.5 * tf.square(error), size - 0.5)


def squared(error: tf.Tensor) -> tf.Tensor:
    """0.5 error**2, elementwise. Its gradient is the error itself, as huber's is near zero."""
    return 0.5 * tf.square(error)
