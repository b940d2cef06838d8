"""From stored rewards to learned ones: divided by a running deviation, scaled and clipped."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hvd_dqn.agent.layout import single
from hvd_dqn.agent.preprocess import RunningStatistics


class Rewards:
    """Divides rewards by the running deviation of the discounted return, then scales and clips them.

    The discounted return of each of a rank's `envs` is R = gamma * R + r, and 0 before an episode begins. Its deviation is
    taken over all steps of all ranks (OpenAI Baselines, VecNormalize). The replay stores rewards as they came, because its
    transitions are sampled long after they were stored, and all rewards of a minibatch must have one unit.

    `merge` collects the sums of all ranks, as those of `RunningStatistics`. Until then the deviation is 1.
    """

    def __init__(self, envs: int, gamma: float, *, scale: float = 1.0, clip: float | None = None) -> None:
        self._gamma, self._scale, self._clip = gamma, scale, clip
        self._returns: np.ndarray = np.zeros(envs)  # [E] the discounted returns
        self._statistics = RunningStatistics(single((1,), np.float64))

    def observe(self, reward: np.ndarray, ended: np.ndarray, valid: np.ndarray) -> None:
        """The stored rewards of a step, whether it ended an episode, and whether it was one: [E] each."""
        self._returns[valid] = self._returns[valid] * self._gamma + reward[valid]
        if valid.any():
            self._statistics.observe(self._returns[valid, None])
        self.end_episodes(ended)

    def end_episodes(self, ended: np.ndarray) -> None:
        """[E] bool: which environments begin new episodes."""
        self._returns[ended] = 0

    def learned(self, reward: np.ndarray) -> np.ndarray:
        """What is learned from stored rewards: float64, of any shape."""
        learned = reward.astype(np.float64) * float(self._statistics.scale[0]) * self._scale
        return learned if self._clip is None else np.clip(learned, -self._clip, self._clip)

    def share_origin(self, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
        self._statistics.share_origin(add_up)

    def pending(self) -> np.ndarray:
        return self._statistics.pending()

    def take(self, reduced: np.ndarray) -> None:
        self._statistics.take(reduced)

    def shared(self) -> dict[str, np.ndarray]:
        """What must be equal on all ranks."""
        return self._statistics.shared()

    def state(self) -> dict[str, Any]:
        return self._statistics.state()

    def load_state(self, state: dict[str, Any]) -> None:
        if state:  # else a run without them gives its weights to this one
            self._statistics.load_state(state)

    def pending_state(self) -> dict[str, Any]:
        """This rank's own state."""
        return self._statistics.pending_state() | {"returns": self._returns.copy()}

    def load_pending_state(self, state: dict[str, Any]) -> None:
        self._statistics.load_pending_state(state)
        self._returns = np.array(state["returns"], np.float64)


class StoredRewards:
    """Stands in for `Rewards` if rewards are stored as they are learned."""

    def observe(self, reward: np.ndarray, ended: np.ndarray, valid: np.ndarray) -> None:
        pass

    def end_episodes(self, ended: np.ndarray) -> None:
        pass

    def learned(self, reward: np.ndarray) -> np.ndarray:
        return reward.astype(np.float64)

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
