"""Bootstrapping, end to end: a chain of five states whose values are known; one end terminates, the other truncates."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from hvd_dqn.config import Config
from hvd_dqn.ranks.world import Solo
from hvd_dqn.storage.checkpoint import Checkpoints
from hvd_dqn.training.trainer import Trainer

STATES, GAMMA = 5, 0.9
LEFT, RIGHT = 0, 1


class Chain(gymnasium.Env):
    """Beyond the right end lies a terminal state and a reward of 1.

    At the left end a step to the left stays there, is rewarded by 0.2, and is cut off by a time limit: going on for ever is
    worth 0.2 / (1 - gamma) = 2, and a learner that takes the limit for an end sees 0.2.
    """

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Discrete(STATES)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(STATES))
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.state, reward, terminated, truncated = move(self.state, action)
        return self.state, reward, terminated, truncated, {}


def move(state: int, action: int) -> tuple[int, float, bool, bool]:
    if action == RIGHT:
        return min(state + 1, STATES - 1), float(state == STATES - 1), state == STATES - 1, False
    return max(state - 1, 0), 0.2 * (state == 0), False, state == 0


gymnasium.register("Chain-v0", Chain)


def n_step_values(n: int) -> np.ndarray:
    """The fixed point [S, A] of n-step returns of a random walk that bootstrap with the maximum; for n = 1 it is Q*."""
    q = np.zeros((STATES, 2))
    for _ in range(500):
        window = np.zeros((0, 2))
        for steps in range(1, n + 1):
            longer = np.zeros((STATES, 2))
            for state in range(STATES):
                for action in (LEFT, RIGHT):
                    following, reward, terminated, truncated = move(state, action)
                    ahead = q[following].max() if truncated or steps == 1 else window[following].mean()
                    longer[state, action] = reward + (0 if terminated else GAMMA * ahead)
            window = longer
        q = window
    return q


def replay_values(replay: Any) -> np.ndarray:
    """The same for the returns that this replay holds, where chance gave the walk other frequencies."""
    draw = replay.draw(1, 400_000)
    batch = replay.gather(draw)
    state, action, following = batch.observation[0, :, 0], batch.action[0], batch.next_observation[0, :, 0]
    count, reward, discount = np.zeros((STATES, 2)), np.zeros((STATES, 2)), np.zeros((STATES, 2, STATES))
    np.add.at(count, (state, action), 1)
    np.add.at(reward, (state, action), batch.reward[0])
    np.add.at(discount, (state, action, following), batch.discount[0])
    q = np.zeros((STATES, 2))
    for _ in range(500):
        q = (reward + discount @ q.max(axis=1)) / count
    return q


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_values_of_a_chain_are_learned_to_one_percent(n_step, double, tmp_path):
    config = Config.model_validate(
        {
            "total_steps": 12_000,
            "env": {"id": "Chain-v0", "envs_per_rank": 8},
            "agent": {
                "hidden": (32,), "gamma": GAMMA, "n_step": n_step, "double": double, "loss": "squared", "epsilon_end": 1.0,
            },
            "replay": {"capacity": 12_000},
            "learner": {
                "batch_size": 512, "samples_per_insert": 128, "learn_start": 1_000, "train_period": 64, "target_period": 64,
                "learning_rate": 5e-3, "learning_rate_end": 0.01,
            },
            "evaluation": {"period": 12_000, "episodes": 1, "final_episodes": 1, "max_episode_steps": 10},
        }
    )  # fmt: skip
    trainer = Trainer(config, Solo())
    list(trainer.train(Checkpoints(tmp_path, Solo())))
    trainer.close()
    learned = trainer.worker.learner.online.q_values(np.arange(STATES, dtype=np.int32)[:, None])
    held = replay_values(trainer.worker.replay)
    # At 1 % of the largest value: the arithmetic of losses and targets. At 5 %: that of returns, which chance blurs for n = 3.
    np.testing.assert_allclose(learned, held, atol=0.01 * held.max())
    np.testing.assert_allclose(held, n_step_values(n_step), atol=1e-6 if n_step == 1 else 0.05 * held.max())
    if n_step == 1:
        assert held.max() == pytest.approx(0.2 / (1 - GAMMA))
        assert held[4, RIGHT] == 1.0
