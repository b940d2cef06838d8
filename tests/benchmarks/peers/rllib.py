"""RLlib's DQN with its workers: whole training, with the learner in this process and `runners` others that step environments.

Without prioritized replay, double Q-learning and dueling streams, which are its defaults.
"""

import os
import tempfile
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import shared
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.tune.registry import register_env


class Stacked(gym.Wrapper):
    """The last four frames as floats [84, 84, 4], scaled here as RLlib's Atari wrapper does: its networks take no bytes."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(gym.wrappers.FrameStackObservation(env, 4))
        self.observation_space = gym.spaces.Box(0, 1, (*env.observation_space.shape[:2], 4), np.float32)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict]:
        observation, info = self.env.reset(**options)
        return self._scaled(observation), info

    def step(self, action: Any) -> tuple:
        observation, *rest = self.env.step(action)
        return self._scaled(observation), *rest

    @staticmethod
    def _scaled(observation: np.ndarray) -> np.ndarray:
        return observation[..., 0].transpose(1, 2, 0).astype(np.float32) / 255.0


def make_env(job: shared.Job) -> gym.Env:
    env = gym.make(job.env)
    return Stacked(env) if job.image else env


def config(job: shared.Job, runners: int) -> DQNConfig:
    model = (
        DefaultModelConfig(
            conv_filters=[[32, 8, 4, "valid"], [64, 4, 2, "valid"], [64, 3, 1, "valid"]], head_fcnet_hiddens=job.hidden
        )
        if job.image
        else DefaultModelConfig(fcnet_hiddens=job.hidden, fcnet_activation="relu", head_fcnet_hiddens=[])
    )
    fragment = max(1, job.train_period // job.envs)
    # How RLlib counts: the batch over the steps of all runners and of the learner's own process, which steps nothing here.
    native = job.batch / (fragment * (job.envs // runners) * (runners + 1))
    return (
        DQNConfig()
        .environment("job")
        .env_runners(
            num_env_runners=runners, num_envs_per_env_runner=job.envs // runners, rollout_fragment_length=fragment
        )
        .learners(num_learners=0)
        .fault_tolerance(restart_failed_env_runners=False)  # a failure shall be seen
        .rl_module(model_config=model)
        .training(
            lr=job.learning_rate,
            train_batch_size_per_learner=job.batch,
            training_intensity=job.updates * native,
            replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": job.capacity},
            num_steps_sampled_before_learning_starts=job.learn_start,
            target_network_update_freq=job.target_period,
            epsilon=[[0, 1.0], [job.epsilon_steps, job.epsilon_end]],
            double_q=False,
            dueling=False,
            n_step=1,
            grad_clip=10.0,
        )
        # Its iterations end with a report; the default, every 1,000 steps, is too coarse for short runs.
        .reporting(min_sample_timesteps_per_iteration=min(1_000, job.total_steps // 20))
        .debugging(seed=job.seed, log_level="ERROR")
    )


def loop() -> None:
    job, clock, updates, steps = shared.job(), shared.Clock(), 0, 0
    # As many runners as cores, which is best for it: they step while the learner waits for them, and wait while it learns.
    runners = max(n for n in range(1, (os.cpu_count() or 1) + 1) if job.envs % n == 0 and n <= job.envs)
    register_env("job", lambda _: make_env(job))
    algorithm = config(job, runners).build_algo()
    update = algorithm.learner_group.update

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal updates
        updates += 1
        return update(*arguments, **options)

    algorithm.learner_group.update = counted
    while steps < job.total_steps:
        steps = int(algorithm.train()["env_runners"]["num_env_steps_sampled_lifetime"])
        clock.tick(steps, updates)
    shared.reply(versions=shared.versions("ray", "torch"), runners=runners, **clock.result(steps, updates))
    algorithm.stop()


if __name__ == "__main__":
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(
            include_dashboard=False, log_to_driver=False, logging_level="error", _temp_dir=folder,
            object_store_memory=300_000_000,
        )  # fmt: skip
        try:
            loop()
        finally:
            ray.shutdown()
