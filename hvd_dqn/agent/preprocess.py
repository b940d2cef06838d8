"""From stored observations to network inputs, and the running statistics that normalise observations."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from hvd_dqn.agent.layout import Layout, Part, Shape
from hvd_dqn.graphs import Graph

# Added to the variance. Source: Stable-Baselines3, VecNormalize.
EPSILON = 1e-8


class Preprocess:
    """Turns observations [B, *layout.observation_shape], as the replay stores them, into network inputs [B, *input_shape].

    Training, acting, evaluation and export all call the same object. Each part of the layout becomes float32:

      - states become one-hot vectors, one for each element of each stacked frame;
      - a part that is `normalized` becomes (x - mean) / deviation, clipped to [-limit, limit], with the numbers given to
        `set_statistics`.
        Numbers that are stored as float64 or as integers are subtracted in float64: 1.7e9 + t has no t in float32;
      - a part with a divisor is divided by it (uint8 images by 255), and others are only cast.

    A single part keeps its shape. Several parts are flattened and joined in their order, which is Gymnasium's `flatten`;
    `image` tells where among them an image lies. `array` computes in NumPy what a call computes in a graph, bit by bit:
    an MLP acts in NumPy, where a small batch costs a twentieth of a TensorFlow call.
    """

    input_shape: Shape

    def __init__(self, layout: Layout, limit: float = 10.0) -> None:
        self.layout = layout
        self._parts = [_Inputs(part, layout.stack, limit) for part in layout.parts]
        self._normalized = [part for part in self._parts if part.variables]
        self._assign = Graph(self._take_statistics)
        if layout.is_packed:
            self.input_shape: Shape = (sum(math.prod(part.shape) for part in self._parts),)
        else:
            self.input_shape = self._parts[0].shape

    def image(self) -> tuple[int, Shape] | None:
        """The place of the only image among packed inputs: its first number, and its shape. None if there is not one."""
        sizes = [math.prod(part.shape) for part in self._parts]
        found = [
            (sum(sizes[:i]), part.shape)
            for i, part in enumerate(self._parts)
            if self.layout.is_packed and part.part.is_image
        ]
        return found[0] if len(found) == 1 else None

    def __call__(self, observation: tf.Tensor) -> tf.Tensor:
        if not self.layout.is_packed:
            return self._parts[0].tensor(observation)
        stacks = zip(self._parts, self._unpacked(observation), strict=True)
        return tf.concat([tf.reshape(part.tensor(x), [-1, math.prod(part.shape)]) for part, x in stacks], axis=1)

    def array(self, observation: np.ndarray) -> np.ndarray:
        if not self.layout.is_packed:
            return self._parts[0].array(observation)
        stacks = zip(self._parts, self.layout.stacks(observation), strict=True)
        return np.concatenate([part.array(x).reshape(len(x), -1) for part, x in stacks], axis=1)

    def _unpacked(self, observation: tf.Tensor) -> list[tf.Tensor]:
        """The same as `Layout.stacks` in a graph."""
        layout, found = self.layout, []
        rows = tf.reshape(observation, [-1, layout.stack, *layout.shape])  # [B, k, P]
        for part, place, shape in zip(layout.parts, layout.places, layout.stacked_shapes(), strict=True):
            x = rows[:, :, place]
            if part.dtype != layout.dtype:
                width = [part.dtype.itemsize] if part.dtype.itemsize > 1 else []
                x = tf.bitcast(tf.reshape(x, [-1, layout.stack, part.numbers, *width]), part.dtype)
            x = tf.reshape(x, [-1, layout.stack, *part.shape])
            found.append(tf.reshape(tf.concat(tf.unstack(x, axis=1), axis=-1), [-1, *shape]))
        return found

    def set_statistics(self, mean: np.ndarray, scale: np.ndarray) -> None:
        """Takes the mean and 1 / deviation of `layout.normalized` frames; each of stacked frames has the same."""
        if not self._normalized:
            return
        at, arrays = 0, []
        for inputs in self._normalized:
            size, shape = inputs.part.numbers, inputs.part.shape
            taken = (np.reshape(x, -1)[at : at + size].reshape(shape) for x in (mean, scale))
            arrays += inputs.take_statistics(*taken)
            at += size
        # A graph with the arrays as arguments: see `Graph` for why no eager tensor is made of them.
        self._assign(*arrays)

    def _take_statistics(self, *values: tf.Tensor) -> list[tf.Tensor]:
        variables = [variable for inputs in self._normalized for variable in inputs.variables]
        for variable, value in zip(variables, values, strict=True):
            variable.assign(tf.ensure_shape(value, variable.shape))
        return []


class _Inputs:
    """Turns one part of an observation, [B, D], [B, k * D] or [B, H, W, k * C], into inputs [B, *shape] float32."""

    def __init__(self, part: Part, stack: int, limit: float) -> None:
        self.part, self._stack, self._limit = part, stack, limit
        self.shape: Shape = (*part.shape[:-1], stack * part.shape[-1])
        self.variables: list[tf.Variable] = []
        categories = np.tile(part.categories, stack)
        self._alike = len(set(part.categories)) == 1
        if part.categories:
            self.shape = (int(categories.sum()),)
            self._element = np.repeat(np.arange(len(categories)), categories)  # of each number of the inputs
            self._state = np.concatenate([np.arange(n) for n in categories]).astype(np.int32)
        self._factor: np.ndarray | None = None
        if part.divisor is not None:
            self._factor = (
                self._stacked(1 / part.divisor) if part.divisor.ndim else np.asarray(1 / part.divisor, np.float32)
            )
        # float32 has 24 bits.
        self._type = np.dtype(np.float32 if part.dtype == np.float32 else np.float64)
        if part.normalized:
            self._mean, self._scale = np.zeros(self.shape, self._type), np.ones(self.shape, self._type)
            self.variables = [tf.Variable(self._mean, trainable=False), tf.Variable(self._scale, trainable=False)]

    def _stacked(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([values] * self._stack, axis=-1).astype(np.float32)

    def take_statistics(self, mean: np.ndarray, scale: np.ndarray) -> list[np.ndarray]:
        self._mean, self._scale = (np.concatenate([x.astype(self._type)] * self._stack, axis=-1) for x in (mean, scale))
        return [self._mean, self._scale]

    def tensor(self, x: tf.Tensor) -> tf.Tensor:
        part = self.part
        if part.categories:
            states = tf.cast(x, tf.int32)
            if self._alike:
                return tf.reshape(tf.one_hot(states, part.categories[0]), [-1, *self.shape])
            return tf.cast(tf.gather(states, self._element, axis=1) == self._state, tf.float32)
        if part.normalized:
            mean, scale = self.variables
            x = tf.clip_by_value((tf.cast(x, self._type) - mean) * scale, -self._limit, self._limit)
        inputs = tf.cast(x, tf.float32)
        return inputs if self._factor is None else inputs * self._factor

    def array(self, x: np.ndarray) -> np.ndarray:
        part = self.part
        if part.categories:
            if not self._alike:
                return (x[:, self._element] == self._state).astype(np.float32)
            inputs = np.zeros((x.size, part.categories[0]), np.float32)
            inputs[np.arange(x.size), x.reshape(-1)] = 1.0
            return inputs.reshape(-1, *self.shape)
        if part.normalized:
            x = (x.astype(self._type, copy=False) - self._mean) * self._scale
            x = np.minimum(np.maximum(x, -self._limit), self._limit)
        inputs = x.astype(np.float32, copy=False)
        return inputs if self._factor is None else inputs * self._factor


class RunningStatistics:
    """Mean and deviation of everything observed so far, one of each per number that `layout` normalises, in float64.

    Each rank collects its own sums (`observe`). In a learning cycle `statistics.merge(world.sum)` adds up the sums of
    all ranks and updates the statistics, which are then bit-equal on all ranks. Until the first merge the mean is 0 and
    the scale 1.
    """

    def __init__(self, layout: Layout) -> None:
        self.shape, self._numbers = layout.normalized_shape(), layout.normalized
        # Sums of squares of float32 numbers keep their variance in float64. Those of wider ones need a common origin.
        self._wide = any(part.normalized and part.dtype != np.float32 for part in layout.parts)
        self._count = 0.0
        self._mean = np.zeros(self.shape, dtype=np.float64)
        self._squares = np.zeros(self.shape, dtype=np.float64)  # sum of squared deviations from the mean
        self._start()

    def _start(self) -> None:
        self._new_count = 0
        self._new_sum = np.zeros(self.shape, dtype=np.float64)
        self._new_squares = np.zeros(self.shape, dtype=np.float64)
        self._origin = self._mean  # of this rank's sums
        self.mean = self._mean.copy()
        variance = self._squares / self._count if self._count else np.ones(self.shape)
        self.scale = 1 / np.sqrt(variance + EPSILON)

    def observe(self, frames: np.ndarray) -> None:
        """Adds frames [N, ...] of the layout to this rank's sums."""
        numbers = np.asarray(self._numbers(frames), dtype=np.float64)
        if self._wide and not self._count and not self._new_count and len(numbers):
            self._origin = numbers[0].copy()
        # Relative to the mean, which all ranks share between merges: a sum of plain squares would lose the variance of
        # values far from 0 (1e8 + noise).
        deviation = numbers - self._origin
        self._new_count += len(deviation)
        self._new_sum += deviation.sum(axis=0)
        self._new_squares += np.square(deviation).sum(axis=0)

    def merge(self, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
        """Adds the sums of all ranks and resets this rank's own. A collective: `add_up` is the world's `sum`.

        Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample variances", eq. 2.1.
        """
        self.share_origin(add_up)
        self.take(add_up(self.pending()))

    def share_origin(self, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
        """Moves the first sums of all ranks from their own first observations to the mean of all. A collective, if any."""
        if not self._wide or self._count:  # equal on all ranks
            return
        total = self._new_sum + self._new_count * self._origin
        count, *totals = add_up(np.concatenate(([self._new_count], total.ravel())))
        if count:
            self._mean = np.reshape(totals, self.shape) / count
            shift = self._origin - self._mean
            self._new_squares += 2 * shift * self._new_sum + self._new_count * shift**2
            self._new_sum += self._new_count * shift
            self._origin = self._mean

    def pending(self) -> np.ndarray:
        """This rank's sums, [1 + 2 * D], for a collective that carries other sums too. Call `share_origin` before."""
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
        return {
            "count": self._new_count,
            "sum": self._new_sum,
            "squares": self._new_squares,
            "origin": self._origin,
        }

    def load_pending_state(self, state: dict[str, Any]) -> None:
        self._new_count = int(state["count"])
        self._new_sum = np.array(state["sum"], np.float64).reshape(self.shape)
        self._new_squares = np.array(state["squares"], np.float64).reshape(self.shape)
        self._origin = np.array(state["origin"], np.float64).reshape(self.shape)

    def load_state(self, state: dict[str, Any]) -> None:
        self._count = float(state["count"])
        self._mean = np.array(state["mean"], dtype=np.float64).reshape(self.shape)
        self._squares = np.array(state["squares"], dtype=np.float64).reshape(self.shape)
        self._start()


class Mergeable(Protocol):
    def share_origin(self, add_up: Callable[[np.ndarray], np.ndarray]) -> None: ...
    def pending(self) -> np.ndarray: ...
    def take(self, reduced: np.ndarray) -> None: ...


def merge(statistics: Sequence[Mergeable], add_up: Callable[[np.ndarray], np.ndarray]) -> None:
    """`RunningStatistics.merge` of several in one collective; in none if there is nothing to merge."""
    for each in statistics:
        each.share_origin(add_up)
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

    def share_origin(self, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
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
