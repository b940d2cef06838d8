"""From stored observations to network inputs, and the running statistics that normalise observations."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from hvd_dqn.graphs import Graph

# Added to the variance. Source: Stable-Baselines3, VecNormalize.
EPSILON = 1e-8
BYTE = np.float32(1 / 255)


class Preprocess:
    """Turns observations [B, *shape], as the replay stores them, into network inputs [B, *input_shape] float32.

    Training, acting, evaluation and export all call the same object. Discrete states become one-hot vectors of
    `categories` numbers, one vector per stacked frame. Bytes are scaled to [0, 1]. If it `normalizes`, observations
    become (x - mean) / deviation, clipped to [-limit, limit], with the numbers given to `set_statistics`. `array`
    computes in NumPy what a call computes in a graph, bit by bit: an MLP acts in NumPy, where a small batch costs a
    twentieth of a TensorFlow call.
    """

    def __init__(
        self, shape: tuple[int, ...], *, categories: int | None = None, normalizes: bool = False, limit: float = 10.0
    ) -> None:
        self._limit = limit
        self.shape, self._categories, self._normalizes = shape, categories, normalizes
        self.input_shape = shape if categories is None else (int(np.prod(shape)) * categories,)
        if normalizes:
            self._mean, self._scale = np.zeros(shape, np.float32), np.ones(shape, np.float32)
            self._variables = tf.Variable(self._mean, trainable=False), tf.Variable(self._scale, trainable=False)
            self._assign = Graph(self._take_statistics)

    def __call__(self, observation: tf.Tensor) -> tf.Tensor:
        if self._categories is not None:
            return tf.reshape(tf.one_hot(observation, self._categories), [-1, *self.input_shape])
        if observation.dtype == tf.uint8:
            return tf.cast(observation, tf.float32) * BYTE
        inputs = tf.cast(observation, tf.float32)
        if self._normalizes:
            mean, scale = self._variables
            inputs = tf.clip_by_value((inputs - mean) * scale, -self._limit, self._limit)
        return inputs

    def array(self, observation: np.ndarray) -> np.ndarray:
        if self._categories is not None:
            inputs = np.zeros((observation.size, self._categories), np.float32)
            inputs[np.arange(observation.size), observation.reshape(-1)] = 1.0
            return inputs.reshape(-1, *self.input_shape)
        if observation.dtype == np.uint8:
            return observation * BYTE
        inputs = observation.astype(np.float32, copy=False)
        if self._normalizes:
            inputs = np.minimum(np.maximum((inputs - self._mean) * self._scale, -self._limit), self._limit)
        return inputs

    def set_statistics(self, mean: np.ndarray, scale: np.ndarray) -> None:
        """Takes the mean and 1 / deviation of single frames; those of stacked frames are repeated along the last axis."""
        if self._normalizes:
            stack = self.shape[-1] // mean.shape[-1]
            self._mean, self._scale = (np.concatenate([x] * stack, axis=-1) for x in (mean, scale))
            # A graph with the arrays as arguments: see `Graph` for why no eager tensor is made of them.
            self._assign(self._mean, self._scale)

    def _take_statistics(self, mean: tf.Tensor, scale: tf.Tensor) -> list[tf.Tensor]:
        for variable, value in zip(self._variables, (mean, scale), strict=True):
            variable.assign(tf.ensure_shape(value, variable.shape))
        return []


class RunningStatistics:
    """Mean and deviation of everything observed so far, one of each per element of `shape`.

    Each rank collects its own sums (`observe`). In a learning cycle `statistics.merge(world.sum)` adds up the sums of
    all ranks and updates the statistics, which are then bit-equal on all ranks. Until the first merge the mean is 0 and
    the scale 1.
    """

    mean: np.ndarray  # [*shape] float32
    scale: np.ndarray  # [*shape] float32: 1 / deviation

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._count = 0.0
        self._mean = np.zeros(shape, dtype=np.float64)
        self._squares = np.zeros(shape, dtype=np.float64)  # sum of squared deviations from the mean
        self._start()

    def _start(self) -> None:
        self._new_count = 0
        self._new_sum = np.zeros(self.shape, dtype=np.float64)
        self._new_squares = np.zeros(self.shape, dtype=np.float64)
        self.mean = self._mean.astype(np.float32)
        variance = self._squares / self._count if self._count else np.ones(self.shape)
        self.scale = (1 / np.sqrt(variance + EPSILON)).astype(np.float32)

    def observe(self, frames: np.ndarray) -> None:
        """Adds [N, *shape] to this rank's sums."""
        # Relative to the mean, which all ranks share between merges: a sum of plain squares would lose the variance of
        # values far from 0 (1e8 + noise).
        deviation = np.asarray(frames, dtype=np.float64) - self._mean
        self._new_count += len(deviation)
        self._new_sum += deviation.sum(axis=0)
        self._new_squares += np.square(deviation).sum(axis=0)

    def merge(self, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
        """Adds the sums of all ranks and resets this rank's own. A collective: `add_up` is the world's `sum`.

        Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample variances", eq. 2.1.
        """
        self.take(add_up(self.pending()))

    def pending(self) -> np.ndarray:
        """This rank's sums, [1 + 2 * D], for a collective that carries other sums too."""
        return np.concatenate(([self._new_count], self._new_sum.ravel(), self._new_squares.ravel()))

    def take(self, reduced: np.ndarray) -> None:
        """The rest of `merge`: the sums of all ranks, [1 + 2 * D]."""
        count = float(reduced[0])
        total, squares = reduced[1:].reshape(2, *self.shape)
        if count:
            shift = total / count  # of the new mean against the old one
            both = self._count + count
            self._squares += np.maximum(squares - count * shift**2, 0) + shift**2 * (self._count * count / both)
            self._mean += shift * (count / both)
            self._count = both
        self._start()

    def shared(self) -> dict[str, np.ndarray]:
        """What must be equal on all ranks: it becomes part of what they learn from."""
        return {"count": np.array(self._count), "mean": self.mean, "scale": self.scale}

    def state(self) -> dict[str, Any]:
        """What all ranks share, without sums that are not yet merged."""
        return {"count": self._count, "mean": self._mean.ravel().tolist(), "squares": self._squares.ravel().tolist()}

    def pending_state(self) -> dict[str, Any]:
        """This rank's sums that are not yet merged."""
        return {"count": self._new_count, "sum": self._new_sum, "squares": self._new_squares}

    def load_pending_state(self, state: dict[str, Any]) -> None:
        self._new_count = int(state["count"])
        self._new_sum = np.array(state["sum"], np.float64).reshape(self.shape)
        self._new_squares = np.array(state["squares"], np.float64).reshape(self.shape)

    def load_state(self, state: dict[str, Any]) -> None:
        self._count = float(state["count"])
        self._mean = np.array(state["mean"], dtype=np.float64).reshape(self.shape)
        self._squares = np.array(state["squares"], dtype=np.float64).reshape(self.shape)
        self._start()


class Mergeable(Protocol):
    def pending(self) -> np.ndarray: ...
    def take(self, reduced: np.ndarray) -> None: ...


def merge(statistics: Sequence[Mergeable], add_up: Callable[[np.ndarray], np.ndarray]) -> None:
    """`RunningStatistics.merge` of several in one collective; in none if there is nothing to merge."""
    pending = [each.pending() for each in statistics]
    if sum(map(len, pending)) == 0:
        return
    reduced = np.split(add_up(np.concatenate(pending)), np.cumsum([len(each) for each in pending])[:-1])
    for each, values in zip(statistics, reduced, strict=True):
        each.take(values)


class NoStatistics:
    """Stands in for `RunningStatistics` if observations are not normalised."""

    mean, scale = np.zeros(1, np.float32), np.ones(1, np.float32)

    def observe(self, frames: np.ndarray) -> None:
        pass

    def pending(self) -> np.ndarray:
        return np.empty(0)

    def take(self, reduced: np.ndarray) -> None:
        pass

    def shared(self) -> dict[str, np.ndarray]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def pending_state(self) -> dict[str, Any]:
        return {}

    def load_pending_state(self, state: dict[str, Any]) -> None:
        pass
