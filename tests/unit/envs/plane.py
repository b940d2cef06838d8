"""A small environment with dictionaries. Worker processes import it, so it imports no TensorFlow."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode


class Plane(gymnasium.Env):
    """Observes the step in a Dict whose arrays it always reuses; in step 2 of `bad` copies a number that is too large."""

    observation_space = Dict({"far": Box(-np.inf, np.inf, (2,), np.float64), "turn": Discrete(9)})
    action_space = Discrete(2)

    def __init__(self, bad="", length=3):
        self.bad, self.length, self.seen = bad, length, {"far": np.zeros(2), "turn": 0}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.seen["far"][:] = self.seen["turn"] = 0
        return self.seen, {}

    def step(self, action):
        self.t += 1
        self.seen["far"][:] = self.t, {"large": 1e39, "infinite": np.inf}.get(self.bad, 0) if self.t == 2 else 0
        self.seen["turn"] = self.t
        return self.seen, 1.0, self.t >= self.length, False, {}


class PlaneVector(gymnasium.vector.VectorEnv):
    """Two of them, with a class that returns the last observations as a dictionary of arrays."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    single_observation_space, single_action_space = Plane.observation_space, Plane.action_space

    def __init__(self, num_envs, **_):
        self.num_envs = num_envs

    def reset(self, *, seed=None, options=None):
        self.t = np.zeros(self.num_envs, np.int64)
        return self._seen(), {}

    def _seen(self):
        return {"far": np.stack([self.t, 0 * self.t], axis=1).astype(np.float64), "turn": self.t.copy()}

    def step(self, actions):
        self.t = self.t + 1
        last, ended = self._seen(), self.t >= 3
        self.t = np.where(ended, 0, self.t)
        last["turn"][~ended] = 99  # nobody's
        return self._seen(), np.ones(self.num_envs), ended, ended & False, {"final_obs": last}
