"""The network, its target and its optimizer: everything that changes when the agent learns."""

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvd_dqn.agent.losses import chosen, double_q_target, huber, q_target, squared
from hvd_dqn.agent.networks import Mlp, Network
from hvd_dqn.agent.optimizer import Adam
from hvd_dqn.agent.transition import Batch
from hvd_dqn.graphs import DenseTape, Graph, StampedTape, fold, global_norm, time_after
from hvd_dqn.ranks.world import World

LOSSES = {"huber": huber, "squared": squared}
# Next observations that the target network values in one go: of small ones a product of many rows is the faster one (an
# update at 64-64 takes 165 us instead of 187), of images each minibatch is large enough.
AHEAD_BYTES = 1 << 16
# Where XLA pays: it takes over a second to compile each number of updates per phase, then 64-64 takes 100 us instead of 165,
# but 256-256 (67,842 parameters) 860 instead of 610, for oneDNN multiplies large matrices faster.
XLA_PARAMETERS = 30_000
XLA_UPDATES = 50_000


class Phase(NamedTuple):
    """Sums over the updates of one phase, of this rank's minibatches; the gradient's is of the averaged gradient.

    Updates whose averaged gradient is not finite are skipped, and only counted; `culprits` of them had a loss
    on this rank that was not finite. `spoilt` says whether any rank skipped one. `exchange` is the part of its `seconds`
    that went into averaging over ranks, waiting for them included.
    """

    updates: int
    loss: float
    mean_q: float
    gradient_norm: float
    skipped: int
    culprits: int
    spoilt: bool
    seconds: float
    exchange: float


class Learner:
    """Fits `online` to bootstrapped targets by phases of K updates per call.

    With `sync` "gradients" every update averages the gradient over the ranks of `world`; with "parameters" each rank takes
    the phase's updates alone and then parameters and optimizer slots are averaged (McMahan et al. 2017, arXiv:1602.05629),
    which is another algorithm: for one rank both are the same. `passes` minibatches make one update. With an `xla` of None
    phases are compiled where that pays for `planned` updates. With `overlap` there is a third network, `acting`, to choose
    actions by while a phase goes on.
    """

    def __init__(
        self,
        make_network: Callable[[], Network],
        world: World,
        *,
        double: bool,
        loss: str,
        sync: str = "gradients",
        compression: str = "none",
        passes: int = 1,
        adam_epsilon: float = 1e-7,
        max_gradient_norm: float | None = None,
        xla: bool | None = False,
        planned: int = 0,
        overlap: bool = False,
    ) -> None:
        self.online, self.target = make_network(), make_network()
        self._copy_target()
        self.acting = make_network() if overlap else self.online
        self._freeze = Graph(lambda: [*_copy(self.online, self.acting), *self.acting.kept()])
        if overlap:
            self.freeze()
        self._world, self._double, self._loss, self._passes = world, double, LOSSES[loss], passes
        self._averages_parameters = sync == "parameters"
        self._max_gradient_norm = max_gradient_norm
        optimizer = Adam(epsilon=adam_epsilon, jit_compile=False)
        # Horovod: the wrapper makes a new optimizer, so wrap first and build then; slots exist before they are broadcast.
        self.optimizer = optimizer if self._averages_parameters else world.wrap(optimizer, compression)
        self.optimizer.build(self.online.variables)
        if xla is None:
            parameters = sum(math.prod(variable.shape) for variable in self.online.variables)
            xla = isinstance(self.online, Mlp) and parameters <= XLA_PARAMETERS and planned >= XLA_UPDATES
        # Horovod: XLA cannot compile a phase inside which ranks talk, or may do so when others have joined.
        self.compiled = xla and (self._averages_parameters or (world.size == 1 and not world.elastic))
        self._is_timed = not self._averages_parameters and (world.size > 1 or world.elastic)
        # K may differ from phase to phase: one graph serves them all.
        self._updates = Graph(self._take_updates, compiled=self.compiled)
        self._average = Graph(self._average_parameters)

    @property
    def variables(self) -> dict[str, tf.Variable]:
        """All that must be equal on all ranks, by names that do not depend on Keras's: `online/0`, ..., `optimizer/0`."""
        parts = {
            "online": self.online.variables,
            "target": self.target.variables,
            "optimizer": self.optimizer.variables,
        }
        if self.acting is not self.online:
            parts["acting"] = self.acting.variables
        return {f"{part}/{i}": variable for part, variables in parts.items() for i, variable in enumerate(variables)}

    def update(self, batch: Batch, learning_rate: float, target_copies: np.ndarray) -> Phase:
        """Takes K updates from a batch of leading dimensions [K, passes * B]; `target_copies` is [K] bool."""
        began = perf_counter()
        # Parameters are averaged after the phase, and only then may they become the target of all ranks.
        copies = np.zeros_like(target_copies) if self._averages_parameters else target_copies
        # XLA compiles anew for every number of them, and has no use for any.
        ends = np.zeros(0, np.int32) if self.compiled else _ends(copies, batch.next_observation[0].nbytes)
        sums, *kept = self._updates(*batch, np.float32(learning_rate), copies, ends)
        loss, mean_q, gradient_norm, skipped, culprits, exchange = sums.tolist()
        spoilt = skipped > 0  # ranks that average gradients skip the same updates
        if self._averages_parameters:
            learned = perf_counter()
            mean_skipped, *kept = self._average(sums[3])
            spoilt = bool(mean_skipped > 0)
            exchange = perf_counter() - learned
            if target_copies.any():
                self._copy_target()
        self.online.refresh(kept)
        self.target.refresh()
        updates, seconds = len(target_copies) - round(skipped), perf_counter() - began
        return Phase(updates, loss, mean_q, gradient_norm, round(skipped), round(culprits), spoilt, seconds, exchange)

    def freeze(self) -> None:
        """From now on `acting` has the weights that `online` has now."""
        self.acting.refresh(self._freeze())

    def _take_updates(
        self,
        observation: tf.Tensor,  # [K, P * B, ...]
        action: tf.Tensor,  # [K, P * B]
        reward: tf.Tensor,
        discount: tf.Tensor,
        next_observation: tf.Tensor,
        learning_rate: tf.Tensor,  # []
        copies: tf.Tensor,  # [K]
        ends: tf.Tensor,  # [S]
    ) -> list[tf.Tensor]:
        self.optimizer.learning_rate.assign(learning_rate)
        batch = Batch(observation, action, reward, discount, next_observation)

        def update(k: tf.Tensor, sums: tf.Tensor) -> tf.Tensor:
            minibatch = Batch(*(x[k] for x in batch))
            sums += self._take_update(minibatch, self.target(minibatch.next_observation))
            tf.cond(copies[k], self._copy_target, list)
            return sums

        def updates_ahead(s: tf.Tensor, sums: tf.Tensor) -> tf.Tensor:
            begin, end = begins[s], ends[s]
            q_next_target = self._values_ahead(next_observation[begin:end])
            sums = fold(
                lambda k, sums: sums + self._take_update(Batch(*(x[k] for x in batch)), q_next_target[k - begin]),
                sums, begin, end,
            )  # fmt: skip
            tf.cond(copies[end - 1], self._copy_target, list)
            return sums

        if self.compiled:  # XLA wants all shapes beforehand, and has nothing to gain from larger ones
            return [fold(update, tf.zeros([6]), 0, tf.shape(action)[0]), *self.online.kept()]
        begins = tf.concat([[0], ends[:-1]], axis=0)
        return [fold(updates_ahead, tf.zeros([6]), 0, tf.shape(ends)[0]), *self.online.kept()]

    def _values_ahead(self, next_observation: tf.Tensor) -> tf.Tensor:
        """The target network's values [S, B, A] of several minibatches [S, B, ...]."""
        _, size, *shape = next_observation.shape
        values = self.target(tf.reshape(next_observation, [-1, *shape]))
        return tf.reshape(values, [-1, size, values.shape[-1]])

    def _take_update(self, minibatch: Batch, q_next_target: tf.Tensor) -> tf.Tensor:
        """Returns [loss, mean q, gradient norm, whether it was skipped, whether this rank was the reason, exchange]."""
        variables = self.online.variables
        if self._passes == 1:
            target = self._bootstrap(minibatch, q_next_target)
            with self._tape() as tape:
                loss, mean_q = self._evaluate(minibatch, target)
                objective = _spoilt_unless_finite(loss)
        else:
            gradients, loss, mean_q = self._accumulate(minibatch, q_next_target)
            with self._tape() as tape:
                # The gradient of sum(g * v) by v is g: so the mean of the passes goes the way of any other gradient.
                objective = tf.add_n([tf.reduce_sum(g * v) for g, v in zip(gradients, variables, strict=True)])
        # These two calls are the body of `minimize`. Horovod: the first one averages. `tape.gradient` followed by
        # `apply_gradients` would average nothing, silently.
        averaged = self.optimizer.compute_gradients(objective, variables, tape)
        exchange = self._exchange(tape, [gradient for gradient, _ in averaged])
        norm = global_norm([gradient for gradient, _ in averaged])
        if self._max_gradient_norm is not None:
            # Average first, then clip: only so are N ranks x batch b one rank x batch N * b.
            shrink = self._max_gradient_norm / tf.maximum(norm, self._max_gradient_norm)
            averaged = [(gradient * shrink, variable) for gradient, variable in averaged]
        # Horovod: the average has the same norm on all ranks, so all of them apply it or none does: no vote is needed.

        def apply() -> tf.Tensor:
            self.optimizer.apply_gradients(averaged)
            return tf.stack([loss, mean_q, norm, 0.0, 0.0, exchange])

        def skip() -> tf.Tensor:
            if self._averages_parameters:
                # Horovod: here each rank skips for itself, and the number of steps, which is not averaged, must stay equal.
                self.optimizer.iterations.assign_add(1)
            return tf.stack([0.0, 0.0, 0.0, 1.0, tf.cast(~tf.math.is_finite(loss), tf.float32), exchange])

        return tf.cond(tf.math.is_finite(norm), apply, skip)

    def _tape(self) -> tf.GradientTape:
        return StampedTape() if self._is_timed else DenseTape()

    def _exchange(self, tape: tf.GradientTape, averaged: list[tf.Tensor]) -> tf.Tensor:
        """Seconds [] from this rank's gradient to the average of all."""
        if not isinstance(tape, StampedTape):
            return tf.constant(0.0)
        return tf.cast(time_after(averaged) - tape.ready, tf.float32)

    def _accumulate(self, minibatch: Batch, q_next_target: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """The mean gradient, loss and q of `passes` minibatches, one after the other to save memory.

        Horovod's own accumulation is not used: it counts every pass as a step of Adam, which weakens the bias correction.
        """
        variables, share = self.online.variables, 1.0 / self._passes
        *parts, values = (tf.stack(tf.split(x, self._passes)) for x in (*minibatch, q_next_target))

        def add(p: tf.Tensor, means: tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]) -> Any:
            gradients, loss, mean_q = means
            part = Batch(*(x[p] for x in parts))
            target = self._bootstrap(part, values[p])
            with DenseTape() as tape:
                part_loss, part_q = self._evaluate(part, target)
                part_objective = _spoilt_unless_finite(part_loss)
            part_gradients = tape.gradient(part_objective, variables)
            gradients = [total + share * g for total, g in zip(gradients, part_gradients, strict=True)]
            return gradients, loss + share * part_loss, mean_q + share * part_q

        zeros = [tf.zeros_like(v) for v in variables], tf.constant(0.0), tf.constant(0.0)
        return fold(add, zeros, 0, self._passes)

    def _bootstrap(self, minibatch: Batch, q_next_target: tf.Tensor) -> tf.Tensor:
        """The targets [B] of the temporal-difference errors; `q_next_target` is [B, A]."""
        if not self._double:
            return q_target(minibatch.reward, minibatch.discount, q_next_target)
        q_next_online = self.online(minibatch.next_observation)  # [B, A]
        return double_q_target(minibatch.reward, minibatch.discount, q_next_online, q_next_target)

    def _evaluate(self, minibatch: Batch, target: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The mean loss and the mean value of the actions taken."""
        q = chosen(self.online(minibatch.observation), minibatch.action)  # [B]
        return tf.reduce_mean(self._loss(q - target)), tf.reduce_mean(q)

    def _copy_target(self) -> list[tf.Tensor]:
        return _copy(self.online, self.target)

    def refresh(self) -> None:
        """To be called when anybody else has changed the variables."""
        for network in (self.online, self.target, self.acting):
            network.refresh()

    def _average_parameters(self, skipped: tf.Tensor) -> list[tf.Tensor]:
        """Takes the number `skipped` [] along, so that its mean needs no message of its own."""
        slots = [v for v in self.optimizer.variables if v.dtype.is_floating]
        variables = [*self.online.variables, *slots]
        mean_skipped, *means = self._world.average([skipped, *variables])
        for variable, mean in zip(variables, means, strict=True):
            variable.assign(mean)
        return [mean_skipped, *self.online.kept()]

    def state(self) -> dict[str, np.ndarray]:
        return {name: variable.numpy() for name, variable in self.variables.items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Raises ValueError where the arrays do not fit, after which nothing has been changed.

        `overlap` may have changed: `acting` then starts from `online`, or is forgotten.
        """
        learned = {name: array for name, array in state.items() if not name.startswith("acting/")}
        acting = {name.replace("online/", "acting/"): learned[name] for name in learned if name.startswith("online/")}
        state = {**acting, **state} if self.acting is not self.online else learned
        expected = {name: tuple(variable.shape) for name, variable in self.variables.items()}
        received = {name: array.shape for name, array in state.items()}
        if expected != received:
            raise ValueError(f"expected arrays of shapes {expected}, received {received}")
        for name, variable in self.variables.items():
            variable.assign(state[name])
        self.refresh()


def _copy(source: Network, to: Network) -> list[tf.Tensor]:
    for variable, value in zip(to.variables, source.variables, strict=True):
        variable.assign(value)
    return []


def _ends(copies: np.ndarray, minibatch_bytes: int) -> np.ndarray:
    """[S]: after how many updates the target network changes, or enough have been valued in one go."""
    at_once = max(1, AHEAD_BYTES // minibatch_bytes)
    updates = np.arange(1, len(copies) + 1)
    since_copy = updates - np.maximum.accumulate(np.where(np.concatenate(([False], copies[:-1])), updates - 1, 0))
    return updates[copies | (since_copy % at_once == 0) | (updates == len(copies))].astype(np.int32)


def _spoilt_unless_finite(loss: tf.Tensor) -> tf.Tensor:
    """The loss, such that its gradient is not finite either where it is not: an infinite Huber loss has a finite one."""
    return loss * tf.where(tf.math.is_finite(loss), 1.0, math.nan)
