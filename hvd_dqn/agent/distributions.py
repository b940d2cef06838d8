"""Targets and losses of distributional Q-learning, as pure functions.

A distribution of returns is a row of N probabilities of fixed returns, the `support`, or a row of N quantiles.
"""

import tensorflow as tf


def categorical_target(
    reward: tf.Tensor, discount: tf.Tensor, probabilities: tf.Tensor, support: tf.Tensor
) -> tf.Tensor:
    """The distribution of reward + discount * Z, projected onto the support (Bellemare et al. 2017, arXiv:1707.06887, eq. 7).

    `reward` and `discount` are [B]; `discount` is 0 at terminal states and gamma**n elsewhere. `probabilities` are those
    of Z, [B, N], on the equally distant returns `support`, [N]. A return between two atoms is divided among them, and one
    beyond the support goes to its end. Returns [B, N], gradients stopped.
    """
    width = support[1] - support[0]
    moved = reward[:, None] + discount[:, None] * support  # [B, N]
    place = (tf.clip_by_value(moved, support[0], support[-1]) - support[0]) / width  # of each moved atom, in atoms
    atoms = tf.range(support.shape[0], dtype=place.dtype)
    share = tf.maximum(1.0 - tf.abs(place[:, :, None] - atoms), 0.0)  # [B, from, to]
    return tf.stop_gradient(tf.einsum("bf,bft->bt", probabilities, share))


def cross_entropy(logits: tf.Tensor, probabilities: tf.Tensor) -> tf.Tensor:
    """-sum(p * log softmax(logits)), [B], of rows [B, N]."""
    return tf.nn.softmax_cross_entropy_with_logits(probabilities, logits)


def entropy(probabilities: tf.Tensor) -> tf.Tensor:
    """-sum(p * log p), [B], of rows [B, N]; a term is 0 where p is."""
    return -tf.reduce_sum(tf.math.xlogy(probabilities, probabilities), axis=1)


def quantile_target(reward: tf.Tensor, discount: tf.Tensor, quantiles: tf.Tensor) -> tf.Tensor:
    """The quantiles of reward + discount * Z for those of Z, [B, N] (Dabney et al. 2018, arXiv:1710.10044, eq. 12)."""
    return tf.stop_gradient(reward[:, None] + discount[:, None] * quantiles)


def quantile_huber(quantiles: tf.Tensor, fractions: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """The quantile regression loss with Huber's, kappa = 1 (Dabney et al. 2018, arXiv:1710.10044, eq. 10).

    `quantiles` [B, N] are the values at `fractions`, [N] or [B, N], and `target` [B, M] are samples of the distribution
    that they shall have. Returns [B]: the sum over the quantiles of the mean over the targets.
    """
    error = target[:, None, :] - quantiles[:, :, None]  # [B, N, M]
    size = tf.abs(error)
    huber = tf.where(size <= 1.0, 0.5 * tf.square(error), size - 0.5)
    # The slope is the fraction below the target and 1 - fraction above it.
    weight = tf.abs(fractions[..., None] - tf.cast(error < 0, error.dtype))
    return tf.reduce_sum(tf.reduce_mean(weight * huber, axis=2), axis=1)


def midpoints(count: int) -> tf.Tensor:
    """[N]: the middles of N equal intervals of [0, 1] (Dabney et al. 2018, lemma 2)."""
    return (tf.range(count, dtype=tf.float32) + 0.5) / count
