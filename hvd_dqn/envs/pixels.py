"""A very cheap environment with images of Atari's shape, for benchmarks."""

from typing import Any

import gymnasium
import numpy as np

FRAMES, LENGTH = 64, 200  # made once: each step returns the next of them


class Pixels(gymnasium.Env):
    """Random frames of 84 x 84 bytes, six actions, episodes of 200 steps. The step number tells the rewarded action."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 1), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(6)
        self._frames = np.random.default_rng(0).integers(256, size=(FRAMES, 84, 84, 1)).astype(np.uint8)
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._step = 0
        return self._frames[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._step += 1
        reward = float(action == self._step % 6)
        return self._frames[self._step % FRAMES], reward, self._step >= LENGTH, False, {}


gymnasium.register("Pixels-v0", "hvd_dqn.envs.pixels:Pixels")
