"""An environment that is learned within seconds, to check that training works at all."""

from typing import Any

import gymnasium
from gymnasium import spaces


class Identity(gymnasium.Env[Any, Any]):
    """The right action is the number of the state, and the next state is random.

    After Stable-Baselines3's IdentityEnv. The best return is `length`; random actions get `length / n`. Episodes end by
    termination.
    """

    def __init__(self, n: int = 4, length: int = 10) -> None:
        self.observation_space = spaces.Discrete(n)
        self.action_space = spaces.Discrete(n)
        self._n = n
        self._length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        self._state = int(self.np_random.integers(self._n))
        return self._state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        reward = float(action == self._state)
        self._steps += 1
        self._state = int(self.np_random.integers(self._n))
        return self._state, reward, self._steps >= self._length, False, {}


gymnasium.register("Identity-v0", "hvd_dqn.envs.identity:Identity")
