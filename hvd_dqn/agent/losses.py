"""The temporal-difference targets and losses of Q-learning, as pure functions."""

import tensorflow as tf


def q_target(reward: tf.Tensor, discount: tf.Tensor, q_next_target: tf.Tensor) -> tf.Tensor:
    """Bootstraps with the target network's own maximum (Mnih et al. 2015, Algorithm 1).

    `reward` and `discount` are [B], `q_next_target` is [B, A]; `discount` is 0 at terminal states and gamma**n elsewhere.
    Returns [B], gradients stopped.
    """
    return tf.stop_gradient(reward + discount * tf.reduce_max(q_next_target, axis=-1))


def double_q_target(
    reward: tf.Tensor, discount: tf.Tensor, q_next_online: tf.Tensor, q_next_target: tf.Tensor
) -> tf.Tensor:
    """Bootstraps with the online argmax, valued by the target network (van Hasselt et al. 2016, arXiv:1509.06461).

    `reward` and `discount` are [B], both q are [B, A]; `discount` is 0 at terminal states and gamma**n elsewhere.
    Returns [B], gradients stopped.
    """
    return tf.stop_gradient(reward + discount * q_of(q_next_target, tf.argmax(q_next_online, axis=-1)))


def q_of(q: tf.Tensor, action: tf.Tensor) -> tf.Tensor:
    """The values [B] of the actions [B] taken, among those of all actions [B, A]."""
    # A product with a one-hot mask: on CPU several times faster than tf.gather and its gradient for a few actions.
    return tf.reduce_sum(q * tf.one_hot(action, q.shape[-1], dtype=q.dtype), axis=-1)


def huber(error: tf.Tensor) -> tf.Tensor:
    """0.5 error**2 up to |error| = 1 and |error| - 0.5 beyond, elementwise: the error clipping of Mnih et al. 2015."""
    size = tf.abs(error)
    return tf.where(size <= 1.0, 0.5 * tf.square(error), size - 0.5)


def squared(error: tf.Tensor) -> tf.Tensor:
    """0.5 error**2, elementwise. Its gradient is the error itself, as huber's is near zero."""
    return 0.5 * tf.square(error)
