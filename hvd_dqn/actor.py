"""Chooses actions: greedy in the network's values, random with a probability of its own in each environment."""

from collections.abc import Callable
from typing import Any

import numpy as np


class Actor:
    """Epsilon-greedy over `q_values`, a function from observations [E, ...] to values [E, A]."""

    def __init__(self, q_values: Callable[[np.ndarray], np.ndarray], actions: int, rng: np.random.Generator) -> None:
        self._q_values, self._actions, self._rng = q_values, actions, rng

    def act(self, observation: np.ndarray, epsilons: np.ndarray) -> np.ndarray:
        """Actions [E] for observations [E, ...], each random with its own probability in `epsilons` [E]."""
        explores = self._rng.random(len(epsilons)) < epsilons
        # Drawn in every step, needed or not: the stream then depends on the number of steps alone.
        action = self._rng.integers(self._actions, size=len(epsilons))
        if not explores.all():
            greedy = self._q_values(observation).argmax(axis=1)
            action = np.where(explores, action, greedy)
        return action

    def state(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state}

    def load_state(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
