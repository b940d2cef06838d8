"""Turns the outputs of networks into a loss. This is what distinguishes the algorithms of the DQN family.

To add one, write a class with the members of `Objective`, return it from `hvd_dqn.training.build.make_objective`, and
add its settings to the section `agent` of `hvd_dqn/config.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import tensorflow as tf

from hvd_dqn.agent.distributions import (
    categorical_target,
    cross_entropy,
    entropy,
    midpoints,
    quantile_huber,
    quantile_target,
)
from hvd_dqn.agent.losses import (
    by_dimension,
    double_q_target,
    greedy,
    huber,
    munchausen_bonus,
    q_of,
    q_target,
    row_of,
    soft_target,
    squared,
)
from hvd_dqn.agent.transition import Batch

LOSSES = {"huber": huber, "squared": squared}


class LossTerms(NamedTuple):
    """Loss terms of a minibatch, [B] each."""

    loss: tf.Tensor
    priority: tf.Tensor  # at least 0: for example the absolute error of each transition
    q: tf.Tensor  # values of the actions taken, for logging


class Outputs(Protocol):
    """A network as an objective sees it: inputs [B, ...] to outputs [B, A], or [B, A, N] if N > 1."""

    def __call__(self, inputs: tf.Tensor, /) -> tf.Tensor: ...


class Objective(Protocol):
    """An algorithm of the DQN family."""

    outputs: int  # N, numbers per action: 1, atoms or quantiles

    def q(self, out: tf.Tensor) -> tf.Tensor:
        """The values [B, A] in a network's outputs, used to choose actions; of each choice if there are dimensions."""

    def target(self, minibatch: Batch, online: Outputs, target_network: Outputs) -> tf.Tensor:
        """The target for the outputs of the actions taken, gradients stopped.

        `minibatch` has tensors [B, ...], observations preprocessed. Either network may be called on either observation;
        `target_network(minibatch.next_observation)` costs nothing, because it has been computed before.
        """

    def loss(self, out: tf.Tensor, action: tf.Tensor, target: tf.Tensor) -> LossTerms:
        """Compares the online network's outputs for `minibatch.observation` with what `target` returned."""


class Dqn:
    """Q-learning by temporal differences (Mnih et al. 2015), double (van Hasselt et al. 2016, arXiv:1509.06461) or not.

    If there are several `sizes`, outputs are values of choices in that many dimensions, one dimension after another, and
    the value of an action is the mean of those chosen (decoupled Q-networks, Seyde et al. 2023, arXiv:2210.12566).
    """

    outputs = 1

    def __init__(self, *, double: bool, loss: str, sizes: Sequence[int] = ()) -> None:
        self._double, self._loss = double, LOSSES[loss]
        self._sizes = sizes if len(sizes) > 1 else ()

    def q(self, out: tf.Tensor) -> tf.Tensor:
        return out

    def target(self, minibatch: Batch, online: Outputs, target_network: Outputs) -> tf.Tensor:
        next_mask = minibatch.next_mask
        if next_mask is not None:
            next_mask = self._by_dimension(next_mask, False)
        q_next_target = self._by_dimension(target_network(minibatch.next_observation))  # [B, A] or [B, D, A]
        if not self._double:
            return q_target(minibatch.reward, minibatch.discount, q_next_target, next_mask)
        q_next_online = self._by_dimension(online(minibatch.next_observation))
        return double_q_target(minibatch.reward, minibatch.discount, q_next_online, q_next_target, next_mask)

    def loss(self, out: tf.Tensor, action: tf.Tensor, target: tf.Tensor) -> LossTerms:
        q = q_of(self._by_dimension(out), action)  # [B]
        error = q - target
        return LossTerms(self._loss(error), tf.abs(error), q)

    def _by_dimension(self, values: tf.Tensor, fill: float | bool = tf.float32.min) -> tf.Tensor:
        return by_dimension(values, self._sizes, fill) if self._sizes else values


class Munchausen(Dqn):
    """DQN whose reward has a bonus of alpha * log pi(a|s), and whose target is soft (Vieillard et al. 2020, arXiv:2007.14430).

    pi is the softmax policy of the target network. It has no double variant: nothing is maximised.
    """

    # The paper's, its table 2: alpha, the temperature tau, and the bonus's lower limit l0.
    ALPHA, TEMPERATURE, LOWEST = 0.9, 0.03, -1.0

    def __init__(self, *, loss: str) -> None:
        super().__init__(double=False, loss=loss)

    def target(self, minibatch: Batch, online: Outputs, target_network: Outputs) -> tf.Tensor:
        q_target = target_network(minibatch.observation)  # [B, A]
        bonus = munchausen_bonus(q_target, minibatch.action, self.TEMPERATURE, self.LOWEST)
        return soft_target(
            minibatch.reward + self.ALPHA * bonus,
            minibatch.discount,
            target_network(minibatch.next_observation),
            self.TEMPERATURE,
            minibatch.next_mask,
        )


class Categorical:
    """C51: each action has a distribution over fixed returns (Bellemare et al. 2017, arXiv:1707.06887), double or not.

    Double: the online network's means choose the next action, as in Rainbow (Hessel et al. 2018, arXiv:1710.02298).
    """

    def __init__(self, *, double: bool, support: Sequence[float]) -> None:
        self.outputs = len(support)
        self._double, self._support = double, tf.constant(support, tf.float32)

    def q(self, out: tf.Tensor) -> tf.Tensor:
        return tf.linalg.matvec(tf.nn.softmax(out), self._support)

    def target(self, minibatch: Batch, online: Outputs, target_network: Outputs) -> tf.Tensor:
        next_out = target_network(minibatch.next_observation)  # [B, A, N]
        chooser = online(minibatch.next_observation) if self._double else next_out
        best = greedy(self.q(chooser), minibatch.next_mask)
        probabilities = tf.nn.softmax(row_of(next_out, best))
        return categorical_target(minibatch.reward, minibatch.discount, probabilities, self._support)

    def loss(self, out: tf.Tensor, action: tf.Tensor, target: tf.Tensor) -> LossTerms:
        """The priority is the Kullback-Leibler divergence, as in Rainbow: cross entropy without the target's own."""
        logits = row_of(out, action)
        loss = cross_entropy(logits, target)
        return LossTerms(loss, tf.maximum(loss - entropy(target), 0.0), self.q(logits))


class Quantile:
    """QR-DQN: each action has N quantiles of its return (Dabney et al. 2018, arXiv:1710.10044), double or not."""

    def __init__(self, *, double: bool, quantiles: int) -> None:
        self.outputs, self._double = quantiles, double

    def q(self, out: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(out, axis=-1)

    def target(self, minibatch: Batch, online: Outputs, target_network: Outputs) -> tf.Tensor:
        next_out = target_network(minibatch.next_observation)  # [B, A, N]
        chooser = online(minibatch.next_observation) if self._double else next_out
        best = greedy(self.q(chooser), minibatch.next_mask)
        return quantile_target(minibatch.reward, minibatch.discount, row_of(next_out, best))

    def loss(self, out: tf.Tensor, action: tf.Tensor, target: tf.Tensor) -> LossTerms:
        quantiles = row_of(out, action)
        loss = quantile_huber(quantiles, midpoints(self.outputs), target)
        return LossTerms(loss, loss, tf.reduce_mean(quantiles, axis=1))
