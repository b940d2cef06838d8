"""Running mean and deviation of observations, summed over all ranks, and what is made of an observation with them."""

from collections.abc import Callable
from typing import Any

import numpy as np

# Added to the variance. Source: Stable-Baselines3, VecNormalize.
EPSILON = 1e-8
# Normalised values end here, in deviations. Source: OpenAI Baselines, VecNormalize.
LIMIT = 10.0


class Normalizer:
    """The statistics of everything observed so far, one mean and one deviation per element of `shape`.

    Each rank collects sums of its own (`observe`). At a learning cycle all ranks add theirs up and take in the result:
    `normalizer.merge(world.sum)`. Ranks that merged the same sums hold bit-equal statistics.
    Until the first merge the mean is 0 and the scale 1.
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

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Observations [..., *shape], or stacks of them along the last axis, in deviations from the mean.

        float32, and never further from 0 than LIMIT.
        """
        stack = observation.shape[-1] // self.shape[-1]
        mean, scale = (np.concatenate([x] * stack, axis=-1) for x in (self.mean, self.scale))
        deviation = ((observation - mean) * scale).astype(np.float32, copy=False)
        return np.minimum(np.maximum(deviation, -LIMIT), LIMIT)

    def observe(self, frames: np.ndarray) -> None:
        """Adds [N, *shape] to this rank's sums."""
        # Relative to the mean, which all ranks share between merges: a sum of plain squares would lose the variance of
        # values that lie far from 0 (1e8 + noise).
        deviation = np.asarray(frames, dtype=np.float64) - self._mean
        self._new_count += len(deviation)
        self._new_sum += deviation.sum(axis=0)
        self._new_squares += np.square(deviation).sum(axis=0)

    def merge(self, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
        """Takes in the sums of all ranks; this rank's own start again. A collective: `add_up` is the world's `sum`.

        Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample variances", eq. 2.1.
        """
        pending = np.concatenate(([self._new_count], self._new_sum.ravel(), self._new_squares.ravel()))  # [1 + 2 * D]
        reduced = add_up(pending)
        count = float(reduced[0])
        total, squares = reduced[1:].reshape(2, *self.shape)
        if count:
            shift = total / count  # of the new mean against the old one
            both = self._count + count
            self._squares += np.maximum(squares - count * shift**2, 0) + shift**2 * (self._count * count / both)
            self._mean += shift * (count / both)
            self._count = both
        self._start()

    def state(self) -> dict[str, Any]:
        """What all ranks share; sums not yet merged are left out."""
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


class NullNormalizer:
    """Leaves observations as they are."""

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        return observation

    def observe(self, frames: np.ndarray) -> None:
        pass

    def merge(self, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def pending_state(self) -> dict[str, Any]:
        return {}

    def load_pending_state(self, state: dict[str, Any]) -> None:
        pass
