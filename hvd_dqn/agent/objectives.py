"""What turns the outputs of networks into a loss: the only place where the kind of an algorithm is known."""

from typing import NamedTuple, Protocol

import tensorflow as tf

from hvd_dqn.agent.losses import double_q_target, huber, q_of, q_target, squared
from hvd_dqn.agent.transition import Batch

LOSSES = {"huber": huber, "squared": squared}


class Evaluated(NamedTuple):
    """What an objective says of a minibatch, [B] each."""

    loss: tf.Tensor
    priority: tf.Tensor  # at least 0: how much each transition surprised
    q: tf.Tensor  # the values of the actions taken, for people to see


class Outputs(Protocol):
    """A network as an objective sees it: from inputs [B, ...] to outputs [B, A], or [B, A, N] with N > 1 numbers per action."""

    def __call__(self, inputs: tf.Tensor, /) -> tf.Tensor: ...


class Objective(Protocol):
    """An algorithm of the DQN family."""

    outputs: int  # N, numbers per action: 1, atoms or quantiles

    def q(self, out: tf.Tensor) -> tf.Tensor:
        """The values [B, A] in a network's outputs, to act by."""
        ...

    def target(self, minibatch: Batch, online: Outputs, target: Outputs) -> tf.Tensor:
        """What the outputs for the actions taken are fitted to, gradients stopped.

        `minibatch` has tensors [B, ...], observations preprocessed. Either network may be called on either observation; the
        target network's outputs for `minibatch.next_observation` cost nothing, for they are there already.
        """
        ...

    def loss(self, out: tf.Tensor, action: tf.Tensor, target: tf.Tensor) -> Evaluated:
        """Compares the online network's outputs for `minibatch.observation` with what `target` returned."""
        ...


class Dqn:
    """Q-learning by temporal differences (Mnih et al. 2015), double (van Hasselt et al. 2016, arXiv:1509.06461) or not."""

    outputs = 1

    def __init__(self, *, double: bool, loss: str) -> None:
        self._double, self._loss = double, LOSSES[loss]

    def q(self, out: tf.Tensor) -> tf.Tensor:
        return out

    def target(self, minibatch: Batch, online: Outputs, target: Outputs) -> tf.Tensor:
        q_next_target = target(minibatch.next_observation)  # [B, A]
        if not self._double:
            return q_target(minibatch.reward, minibatch.discount, q_next_target)
        q_next_online = online(minibatch.next_observation)  # [B, A]
        return double_q_target(minibatch.reward, minibatch.discount, q_next_online, q_next_target)

    def loss(self, out: tf.Tensor, action: tf.Tensor, target: tf.Tensor) -> Evaluated:
        q = q_of(out, action)  # [B]
        error = q - target
        return Evaluated(self._loss(error), tf.abs(error), q)
