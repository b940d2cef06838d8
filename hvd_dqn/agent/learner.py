"""The network, its target and its optimizer: everything that changes when the agent learns."""

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvd_dqn.agent.networks import Network, NumpyMlp
from hvd_dqn.agent.objectives import LossTerms, Objective
from hvd_dqn.agent.optimizer import Adam
from hvd_dqn.agent.preprocess import Preprocess
from hvd_dqn.agent.transition import Batch
from hvd_dqn.graphs import DenseTape, Graph, StampedTape, fold, global_norm, time_after
from hvd_dqn.ranks.world import World

# Next observations that the target network values in one go: of small ones a product of many rows is the faster one (an
# update at 64-64 takes 165 us instead of 187), of images each minibatch is large enough.
AHEAD_BYTES = 1 << 16
# Where XLA pays: it takes over a second to compile each number of updates per phase, then 64-64 takes 100 us instead of 165,
# but 256-256 (67,842 parameters) 860 instead of 610, for oneDNN multiplies large matrices faster.
XLA_PARAMETERS = 30_000
XLA_UPDATES = 50_000

# Of the updates so far: their sums as one vector and, of a weighted batch, an array of priorities.
Results = tuple[Any, ...]


class Sums(NamedTuple):
    """What a phase adds up over its updates inside the graph, [] float32 each.

    An update that is skipped adds no loss, q or norm.
    """

    loss: tf.Tensor
    mean_q: tf.Tensor
    gradient_norm: tf.Tensor
    skipped: tf.Tensor
    nonfinite: tf.Tensor  # skipped updates whose loss on this rank was not finite
    allreduce_seconds: tf.Tensor


class Phase(NamedTuple):
    """What happened in one phase, summed over its updates.

    Loss and q are of this rank's minibatches; the gradient's norm is that of the gradient averaged over ranks.

    Updates whose averaged gradient is not finite are skipped and only counted. `nonfinite` counts those whose loss was not
    finite on this rank; `any_skipped` says whether any rank skipped one. `allreduce_seconds` is the part of `seconds` that
    went into averaging over ranks, waiting for them included. `priority` [K, B] is what the objective says of each
    transition of a weighted batch, None of others.
    """

    updates: int
    loss: float
    mean_q: float
    gradient_norm: float
    skipped: int
    nonfinite: int
    any_skipped: bool
    seconds: float
    allreduce_seconds: float
    priority: np.ndarray | None


class Learner:
    """Fits `online` to the targets of an objective by phases of K updates per call.

    With `sync` "gradients" every update averages the gradient over the ranks of `world`; with "parameters" each rank takes
    the phase's updates alone and then parameters and optimizer slots are averaged (McMahan et al. 2017, arXiv:1602.05629),
    which is another algorithm (local SGD); on one rank both are the same. `passes` minibatches make one update (gradient
    accumulation). With an `xla` of None phases are compiled if that pays for `planned` updates. With `overlap` there is a
    third network, `acting`, to choose actions by while a phase runs.
    """

    def __init__(
        self,
        make_network: Callable[[], Network],
        preprocess: Preprocess,
        objective: Objective,
        world: World,
        *,
        sync: str = "gradients",
        compression: str = "none",
        passes: int = 1,
        adam_epsilon: float = 1e-7,
        max_gradient_norm: float | None = None,
        xla: bool | None = False,
        planned: int = 0,
        overlap: bool = False,
    ) -> None:
        self._preprocess, self._objective = preprocess, objective
        self.online, self.target = make_network(), make_network()
        self._copy_target()
        self.acting = make_network() if overlap else self.online
        self._sync_acting = Graph(lambda: [*_copy(self.online, self.acting), *self.acting.numpy_weights()])
        if overlap:
            self.sync_acting_weights()
        self._world, self._passes = world, passes
        self._averages_parameters = sync == "parameters"
        self._max_gradient_norm = max_gradient_norm
        optimizer = Adam(epsilon=adam_epsilon, jit_compile=False)
        # Horovod: the wrapper makes a new optimizer, so wrap first and build then; slots exist before they are broadcast.
        self.optimizer = optimizer if self._averages_parameters else world.wrap(optimizer, compression)
        self.optimizer.build(self.online.variables)
        if xla is None:
            parameters = sum(math.prod(variable.shape) for variable in self.online.variables)
            xla = isinstance(self.online, NumpyMlp) and parameters <= XLA_PARAMETERS and planned >= XLA_UPDATES
        # Horovod: XLA cannot compile a phase inside which ranks talk, or may do so when others have joined.
        self.compiled = xla and (self._averages_parameters or (world.size == 1 and not world.elastic))
        self._is_timed = not self._averages_parameters and (world.size > 1 or world.elastic)
        # K may differ from phase to phase: one graph serves them all. Weighted batches, which have a field more, have another.
        self._updates = {weighted: Graph(self._run_phase, compiled=self.compiled) for weighted in (False, True)}
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
        """Takes K updates from a batch of leading dimensions [K, passes * B]; `target_copies` is [K] bool.

        Observations are those of the replay, not preprocessed.
        """
        began = perf_counter()
        # Parameters are averaged after the phase, and only then may they become the target of all ranks.
        copies = np.zeros_like(target_copies) if self._averages_parameters else target_copies
        # XLA compiles anew for every number of them, and has no use for any.
        ends = np.zeros(0, np.int32) if self.compiled else _ends(copies, batch.next_observation[0].nbytes)
        is_weighted = batch.weight is not None
        arrays = [array for array in batch if array is not None]
        results = self._updates[is_weighted](np.float32(learning_rate), copies, ends, *arrays)
        sums, priority = Sums(*results[0]), results[1] if is_weighted else None
        numpy_weights = results[1 + is_weighted :]
        allreduce_seconds, any_skipped = float(sums.allreduce_seconds), bool(sums.skipped > 0)
        if self._averages_parameters:
            learned = perf_counter()
            mean_skipped, *numpy_weights = self._average(sums.skipped)
            any_skipped = bool(mean_skipped > 0)  # ranks that average gradients skip the same updates
            allreduce_seconds = perf_counter() - learned
            if target_copies.any():
                self._copy_target()
        self.online.refresh(numpy_weights)
        self.target.refresh()
        skipped = round(float(sums.skipped))
        return Phase(
            updates=len(target_copies) - skipped,
            loss=float(sums.loss),
            mean_q=float(sums.mean_q),
            gradient_norm=float(sums.gradient_norm),
            skipped=skipped,
            nonfinite=round(float(sums.nonfinite)),
            any_skipped=any_skipped,
            seconds=perf_counter() - began,
            allreduce_seconds=allreduce_seconds,
            priority=priority,
        )

    def sync_acting_weights(self) -> None:
        """From now on `acting` has the weights that `online` has now."""
        self.acting.refresh(self._sync_acting())

    def _run_phase(
        self,
        learning_rate: tf.Tensor,  # []
        copies: tf.Tensor,  # [K]
        ends: tf.Tensor,  # [S]
        *fields: tf.Tensor,  # of the batch, [K, P * B, ...] each
    ) -> list[tf.Tensor]:
        """The phase in the graph. Returns sums, priorities [K, P * B] if the batch is weighted, and weights for NumPy."""
        self.optimizer.learning_rate.assign(learning_rate)
        batch = Batch(*fields)
        results: Results = (tf.zeros([len(Sums._fields)]),)
        if batch.weight is not None:
            results += (tf.TensorArray(tf.float32, tf.shape(copies)[0], element_shape=[batch.weight.shape[1]]),)

        def update(k: tf.Tensor, results: Results, next_inputs: tf.Tensor, next_outputs: tf.Tensor) -> Results:
            minibatch = Batch(*(field[k] for field in fields))
            minibatch = minibatch._replace(
                observation=self._preprocess(minibatch.observation), next_observation=next_inputs
            )
            sums, priority = self._update(minibatch, next_outputs)
            total, *priorities = results
            return (total + sums, *(written.write(k, priority) for written in priorities))

        def update_each(k: tf.Tensor, results: Results) -> Results:
            next_inputs = self._preprocess(batch.next_observation[k])
            results = update(k, results, next_inputs, self.target(next_inputs))
            tf.cond(copies[k], self._copy_target, list)
            return results

        def update_group(s: tf.Tensor, results: Results) -> Results:
            begin, end = begins[s], ends[s]
            next_inputs, next_outputs = self._look_ahead(batch.next_observation[begin:end])
            results = fold(
                lambda k, results: update(k, results, next_inputs[k - begin], next_outputs[k - begin]),
                results,
                begin,
                end,
            )
            tf.cond(copies[end - 1], self._copy_target, list)
            return results

        # Two loops around one update. The second has the target network value the next observations of many updates in
        # one product (an update at 64-64 takes 165 us instead of 187), whose number XLA would have to know beforehand.
        if self.compiled:
            results = fold(update_each, results, 0, tf.shape(copies)[0])
        else:
            begins = tf.concat([[0], ends[:-1]], axis=0)
            results = fold(update_group, results, 0, tf.shape(ends)[0])
        total, *priorities = results
        return [total, *(written.stack() for written in priorities), *self.online.numpy_weights()]

    def _look_ahead(self, next_observation: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The inputs [S, B, ...] and the target network's outputs [S, B, ...] for several minibatches [S, B, ...]."""
        _, size, *shape = next_observation.shape
        inputs = self._preprocess(tf.reshape(next_observation, [-1, *shape]))
        outputs = self.target(inputs)
        return tuple(tf.reshape(x, [-1, size, *x.shape[1:]]) for x in (inputs, outputs))

    def _update(self, minibatch: Batch, next_outputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """One update; `next_outputs` [B, ...] are the target network's. Returns its `Sums` as a vector, and priorities [B]."""
        variables = self.online.variables
        if self._passes == 1:
            target = self._td_target(minibatch, next_outputs)
            with self._tape() as tape:
                loss, mean_q, priority = self._loss(minibatch, target)
                scalar = _nan_unless_finite(loss)
        else:
            means, loss, mean_q, priority = self._accumulate(minibatch, next_outputs)
            with self._tape() as tape:
                # The gradient of sum(g * v) by v is g: so the mean of the passes goes the way of any other gradient.
                scalar = tf.add_n([tf.reduce_sum(g * v) for g, v in zip(means, variables, strict=True)])
        # These two calls are the body of `minimize`. Horovod: the first one averages. `tape.gradient` followed by
        # `apply_gradients` would average nothing, silently.
        averaged = self.optimizer.compute_gradients(scalar, variables, tape)
        gradients = [gradient for gradient, _ in averaged]
        # From this rank's gradient to the average of all.
        seconds = tf.cast(time_after(gradients) - tape.ready, tf.float32) if isinstance(tape, StampedTape) else 0.0
        norm = global_norm(gradients)
        if self._max_gradient_norm is not None:
            # Average first, then clip: only so are N ranks x batch b one rank x batch N * b.
            shrink = self._max_gradient_norm / tf.maximum(norm, self._max_gradient_norm)
            averaged = [(gradient * shrink, variable) for gradient, variable in averaged]
        # Horovod: the average has the same norm on all ranks, so all of them apply it or none does: no vote is needed.

        def sums(**values: tf.Tensor | float) -> tf.Tensor:
            # As one vector: every value that a branch or a loop hands on costs about a microsecond.
            return tf.stack(Sums(*(0.0,) * len(Sums._fields))._replace(allreduce_seconds=seconds, **values))

        def apply() -> tf.Tensor:
            self.optimizer.apply_gradients(averaged)
            return sums(loss=loss, mean_q=mean_q, gradient_norm=norm)

        def skip() -> tf.Tensor:
            if self._averages_parameters:
                # Horovod: here each rank skips for itself, and the number of steps, which is not averaged, must stay equal.
                self.optimizer.iterations.assign_add(1)
            return sums(skipped=1.0, nonfinite=tf.cast(~tf.math.is_finite(loss), tf.float32))

        return tf.cond(tf.math.is_finite(norm), apply, skip), priority

    def _tape(self) -> tf.GradientTape:
        return StampedTape() if self._is_timed else DenseTape()

    def _accumulate(
        self, minibatch: Batch, next_outputs: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor, tf.Tensor]:
        """The mean gradient, loss and q of `passes` minibatches, one after the other to save memory, and their priorities.

        Horovod's own accumulation is not used: it counts every pass as a step of Adam, which weakens the bias correction.
        """
        variables, share = self.online.variables, 1.0 / self._passes
        fields = [field for field in minibatch if field is not None]
        *parts, outputs = (tf.stack(tf.split(x, self._passes)) for x in (*fields, next_outputs))

        def add(p: tf.Tensor, means: tuple[Any, ...]) -> tuple[Any, ...]:
            gradients, loss, mean_q, priorities = means
            part = Batch(*(x[p] for x in parts))
            target = self._td_target(part, outputs[p])
            with DenseTape() as tape:
                part_loss, part_q, priority = self._loss(part, target)
                part_scalar = _nan_unless_finite(part_loss)
            part_gradients = tape.gradient(part_scalar, variables)
            gradients = [total + share * g for total, g in zip(gradients, part_gradients, strict=True)]
            return gradients, loss + share * part_loss, mean_q + share * part_q, priorities.write(p, priority)

        priorities = tf.TensorArray(tf.float32, self._passes, element_shape=[minibatch.action.shape[0] // self._passes])
        zeros = [tf.zeros_like(v) for v in variables], tf.constant(0.0), tf.constant(0.0), priorities
        gradients, loss, mean_q, priorities = fold(add, zeros, 0, self._passes)
        return gradients, loss, mean_q, priorities.concat()

    def _td_target(self, minibatch: Batch, next_outputs: tf.Tensor) -> tf.Tensor:
        def target_network(inputs: tf.Tensor) -> tf.Tensor:
            return next_outputs if inputs is minibatch.next_observation else self.target(inputs)

        return self._objective.target(minibatch, self.online, target_network)

    def _loss(self, minibatch: Batch, target: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The mean loss [], the mean value of the actions taken [], and the priorities [B]."""
        terms: LossTerms = self._objective.loss(self.online(minibatch.observation), minibatch.action, target)
        loss = terms.loss if minibatch.weight is None else minibatch.weight * terms.loss
        return tf.reduce_mean(loss), tf.reduce_mean(terms.q), terms.priority

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
        return [mean_skipped, *self.online.numpy_weights()]

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
    """[S]: where the groups of updates end that share one call of the target network.

    A group ends at a copy of the target network, or when its observations reach AHEAD_BYTES.
    """
    at_once = max(1, AHEAD_BYTES // minibatch_bytes)
    updates = np.arange(1, len(copies) + 1)
    since_copy = updates - np.maximum.accumulate(np.where(np.concatenate(([False], copies[:-1])), updates - 1, 0))
    return updates[copies | (since_copy % at_once == 0) | (updates == len(copies))].astype(np.int32)


def _nan_unless_finite(loss: tf.Tensor) -> tf.Tensor:
    """The loss, or NaN if it is not finite, so that its gradient is NaN too: an infinite Huber loss has a finite one."""
    return loss * tf.where(tf.math.is_finite(loss), 1.0, math.nan)
