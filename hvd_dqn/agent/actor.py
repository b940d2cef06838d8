"""Chooses actions: greedy, or random with a probability that each environment has of its own."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hvd_dqn.agent.choices import Choices

# The longest repetition of a random action, in steps. Source: Dabney et al. 2021, arXiv:2006.01782, section 5.
LONGEST = 10_000


class Actor:
    """Epsilon-greedy over `q_values`, a function from observations [E, ...] to values [E, S] of `choices`.

    An environment that explores draws all dimensions of its action at random together. (In the code of Seyde et al. 2023
    each dimension explores by itself, with about epsilon / D.) A mask restricts greedy and random actions alike.

    With `zeta` a random action is repeated for n steps with a probability proportional to n**-zeta. This reaches states
    that single random steps never reach (epsilon-z-greedy, Dabney et al. 2021, arXiv:2006.01782).
    """

    def __init__(
        self,
        q_values: Callable[[np.ndarray], np.ndarray],
        choices: Choices,
        rng: np.random.Generator,
        zeta: float | None = None,
    ) -> None:
        self._q_values, self._choices, self._rng, self._zeta = q_values, choices, rng, zeta
        self._held: np.ndarray | None = None  # [E] or [E, D] the random action that is being repeated
        self._left: np.ndarray | None = None  # [E] for how many more steps

    def act(self, observation: np.ndarray, epsilons: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Actions [E] or [E, D] for observations [E, ...], among those that `mask` [E, S] allows.

        Each turns random with its own probability in `epsilons` [E].
        """
        envs = len(epsilons)
        # Draw in every step, needed or not, so that the random stream depends on the number of steps alone.
        starts = self._rng.random(envs) < epsilons
        action = self._choices.random(self._rng, envs, mask)
        if self._zeta is None:
            explores = starts
        else:
            length = np.minimum(self._rng.zipf(self._zeta, envs), LONGEST)
            if self._held is None or self._left is None:
                self._held, self._left = action, np.zeros(envs, np.int64)
            starts &= self._left == 0
            draws = starts if mask is None else starts | ~self._choices.allows(mask, self._held)
            self._held = action = self._where(draws, action, self._held)
            left = np.where(starts, length, self._left)
            explores, self._left = left > 0, np.maximum(left - 1, 0)
        if not explores.all():
            action = self._where(explores, action, self._choices.greedy(self._q_values(observation), mask))
        return action

    def end_episodes(self, ended: np.ndarray) -> None:
        """[E] bool: where an episode has ended. An action that is being repeated ends with its episode."""
        if self._left is not None:
            self._left[ended] = 0

    def _where(self, which: np.ndarray, action: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.where(which[:, None] if self._choices.factored else which, action, other)

    def state(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state, "held": self._held, "left": self._left}

    def load_state(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        held, left = state["held"], state["left"]
        self._held, self._left = (None if x is None else np.array(x, np.int64) for x in (held, left))
