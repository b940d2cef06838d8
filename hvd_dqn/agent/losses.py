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
    return tf.stop_gradient(reward + discount * q_of(q_next_target, greedy(q_next_online, next_mask)))


def greedy(q: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """The actions [B] or [B, D] of the highest values, among those that `mask` allows."""
    return tf.argmax(_allowed(q, mask), axis=-1)


def soft_target(
    reward: tf.Tensor,
    discount: tf.Tensor,
    q_next_target: tf.Tensor,
    temperature: float,
    next_mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """Bootstraps with the soft maximum, temperature * logsumexp(q / temperature) (Vieillard et al. 2020, arXiv:2007.14430).

    That is the value of the softmax policy pi plus temperature * its entropy, equation 1 there: sum(pi * (q - temperature *
    log pi)). `reward` and `discount` are [B]. Returns [B], gradients stopped.
    """
    soft = soft_maximum(q_next_target, temperature, next_mask)
    return tf.stop_gradient(reward + discount * soft)


def soft_maximum(q: tf.Tensor, temperature: float, mask: tf.Tensor | None = None) -> tf.Tensor:
    """[B] of q [B, A]. It tends to the maximum as the temperature tends to 0."""
    highest = tf.reduce_max(_allowed(q, mask), axis=-1, keepdims=True)
    # Relative to the maximum: exp(q / 0.03) overflows float32 at q = 2.7.
    return highest[..., 0] + temperature * tf.reduce_logsumexp((_allowed(q, mask) - highest) / temperature, axis=-1)


def munchausen_bonus(q_target: tf.Tensor, action: tf.Tensor, temperature: float, lowest: float) -> tf.Tensor:
    """temperature * log pi(a|s), clipped to [lowest, 0], for the softmax policy of q [B, A] (Vieillard et al. 2020, section 3).

    Returns [B]. The caller scales it by alpha and adds it to the reward.
    """
    log_policy = q_of(q_target, action) - soft_maximum(q_target, temperature)
    return tf.stop_gradient(tf.clip_by_value(log_policy, lowest, 0.0))


def q_of(q: tf.Tensor, action: tf.Tensor) -> tf.Tensor:
    """The values [B] of the actions taken, among those of all actions."""
    # A product with a one-hot mask: on CPU several times faster than tf.gather and its gradient for a few actions.
    return _over_dimensions(tf.reduce_sum(q * tf.one_hot(action, q.shape[-1], dtype=q.dtype), axis=-1))


def row_of(out: tf.Tensor, action: tf.Tensor) -> tf.Tensor:
    """[B, N]: the outputs of the actions [B] taken, among those of all actions, [B, A, N]."""
    return tf.reduce_sum(out * tf.one_hot(action, out.shape[1], dtype=out.dtype)[..., None], axis=1)


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
