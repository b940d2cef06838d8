"""A proof before any game: in a corridor of five cells every algorithm finds the values that iteration finds."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import hvd_dqn

CELLS, GAMMA = 5, 0.9
LEFT, RIGHT = range(2)


class Corridor(gymnasium.Env):
    """Begins in any cell but the last, which ends the episode with a reward of 1."""

    observation_space, action_space = spaces.Discrete(CELLS), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = int(self.np_random.integers(CELLS - 1))
        return self.cell, {}

    def step(self, action):
        self.cell = max(self.cell + (1 if action == RIGHT else -1), 0)
        over = self.cell == CELLS - 1
        return self.cell, float(over), over, False, {}


gymnasium.register("Corridor-v0", Corridor, max_episode_steps=20)


def values(alpha=0.0, temperature=0.0, lowest=-1.0):
    """[4, 2]: Q* by iteration; with a temperature that of Munchausen DQN (Vieillard et al. 2020, eq. 3)."""
    q = np.zeros((CELLS, 2))
    for _ in range(2_000):
        if temperature:
            highest = q.max(axis=1)
            soft = highest + temperature * np.log(np.exp((q - highest[:, None]) / temperature).sum(axis=1))
            bonus = alpha * np.clip(q - soft[:, None], lowest, 0)
        else:
            soft, bonus = q.max(axis=1), np.zeros_like(q)
        soft[-1] = 0
        below = np.maximum(np.arange(CELLS) - 1, 0)
        above = np.minimum(np.arange(CELLS) + 1, CELLS - 1)
        reward = (above == CELLS - 1).astype(float)
        q = bonus + np.stack([GAMMA * soft[below], reward + GAMMA * soft[above] * (above < CELLS - 1)], axis=1)
    return q[:-1]


SETTINGS = {
    "env.id": "Corridor-v0", "env.envs_per_rank": 8, "total_steps": 20_000,
    "agent.hidden": [], "agent.gamma": GAMMA, "agent.epsilon_end": 0.5, "agent.epsilon_steps": 1,
    "learner.batch_size": 64, "learner.samples_per_insert": 8, "learner.learn_start": 200, "learner.train_period": 64,
    "learner.target_period": 128, "learner.learning_rate": 0.01, "learner.learning_rate_end": 0.01, "learner.xla": False,
    "evaluation.period": 10**6, "evaluation.final_episodes": 4, "evaluation.max_episode_steps": 20,
    "checkpoint.save_replay": False, "report.period": 10**6,
}  # fmt: skip
QUANTILES = {"agent.objective": "quantile", "agent.quantiles": 11, "learner.learning_rate": 0.02}
ATOMS = {"agent.objective": "c51", "agent.support": (-1.0, 2.0), "agent.atoms": 31, "learner.learning_rate": 0.05}
PRIORITIES = {"replay.priority_exponent": 0.6}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"agent.double": False, "agent.loss": "squared"},
        {"agent.hidden": [32], "agent.dueling": True},
        PRIORITIES,
        {"agent.objective": "munchausen"},
        {"agent.objective": "munchausen", **PRIORITIES},
        ATOMS,
        {**ATOMS, **PRIORITIES, "agent.hidden": [32], "agent.dueling": True},
        QUANTILES,
        {**QUANTILES, **PRIORITIES, "agent.double": False},
    ],
    ids=lambda settings: " ".join(f"{name.split('.')[1]}={value}" for name, value in settings.items()) or "dqn",
)
def test_it_finds_the_values_of_iteration(settings, tmp_path):
    soft = settings.get("agent.objective") == "munchausen"
    expected = values(0.9, 0.03) if soft else values()
    result = hvd_dqn.train(run_dir=tmp_path, progress=False, **(SETTINGS | settings))
    found = np.array([result.policy.q_values(cell) for cell in range(CELLS - 1)])
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_three_steps_find_the_values_of_the_greedy_policy(tmp_path):
    """Without exploration beyond the first action nothing is off-policy, which n-step returns do not correct."""
    settings = SETTINGS | {"agent.n_step": 3, "agent.epsilon_end": 0.05}
    result = hvd_dqn.train(run_dir=tmp_path, progress=False, **settings)
    found = np.array([result.policy.q_values(cell)[RIGHT] for cell in range(CELLS - 1)])
    np.testing.assert_allclose(found, values()[:, RIGHT], atol=0.05)
