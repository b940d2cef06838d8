"""Chooses actions: greedy, or random with a probability that each environment has of its own."""

from collections.abc import Callable
from typing import Any

import numpy as np

# The longest repetition of a random action, in steps. Source: Dabney et al. 2021, arXiv:2006.01782, section 5.
LONGEST = 10_000


class Actor:
    """Epsilon-greedy over `q_values`, a function from observations [E, ...] to values [E, A].

    With `zeta` a random action is repeated for n steps with a probability proportional to n**-zeta. This reaches states
    that single random steps never reach (epsilon-z-greedy, Dabney et al. 2021, arXiv:2006.01782).
    """

    def __init__(
        self,
        q_values: Callable[[np.ndarray], np.ndarray],
        actions: int,
        rng: np.random.Generator,
        zeta: float | None = None,
    ) -> None:
        self._q_values, self._actions, self._rng, self._zeta = q_values, actions, rng, zeta
        self._held: np.ndarray | None = None  # [E] the random action that is being repeated
        self._left: np.ndarray | None = None  # [E] for how many more steps

    def act(self, observation: np.ndarray, epsilons: np.ndarray) -> np.ndarray:
        """Actions [E] for observations [E, ...]; each turns random with its own probability in `epsilons` [E]."""
        envs = len(epsilons)
        # Draw in every step, needed or not, so that the random stream depends on the number of steps alone.
        starts = self._rng.random(envs) < epsilons
        action = self._rng.integers(self._actions, size=envs)
        if self._zeta is None:
            explores = starts
        else:
            length = np.minimum(self._rng.zipf(self._zeta, envs), LONGEST)
            if self._held is None or self._left is None:
                self._held, self._left = action, np.zeros(envs, np.int64)
            starts &= self._left == 0
            self._held = action = np.where(starts, action, self._held)
            left = np.where(starts, length, self._left)
            explores, self._left = left > 0, np.maximum(left - 1, 0)
        if not explores.all():
            action = np.where(explores, action, self._q_values(observation).argmax(axis=1))
        return action

    def end_episodes(self, ended: np.ndarray) -> None:
        """[E] bool: where an episode has ended. An action that is being repeated ends with its episode."""
        if self._left is not None:
            self._left[ended] = 0

    def state(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state, "held": self._held, "left": self._left}

    def load_state(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        held, left = state["held"], state["left"]
        self._held, self._left = (None if x is None else np.array(x, np.int64) for x in (held, left))
