"""Stable-Baselines3's DQN: `DQN.train` alone, whole training, and training until a target return is reached."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import shared
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.common.vec_env import VecFrameStack


def phases(case: dict[str, Any]) -> tuple[Callable[[], None], int]:
    """Phases of K updates; SB3 draws a batch inside each and copies the target outside `train`, here once per phase."""
    images, count = case["network"] == "cnn", max(1, case["phases"] // 4)  # they take several times as long as ours
    model = DQN(
        "CnnPolicy" if images else "MlpPolicy",
        shared.Spaces(tuple(case["observation"]), case["actions"]),
        learning_rate=1e-4,
        buffer_size=case["transitions"],
        batch_size=case["batch"],
        max_grad_norm=10.0,
        # CnnPolicy is the Nature CNN as it comes: three convolutions and 512 units, then the values.
        policy_kwargs={"net_arch": [] if images else case["hidden"]},
        device="cpu",
        seed=0,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    # The policy of images wants channels first, which the wrapper of a real environment would have seen to.
    order = (2, 0, 1) if images else (0,)

    def write(observation: Any, action: int, reward: float, terminated: bool, following: Any) -> None:
        one = observation.transpose(order)[None], following.transpose(order)[None], np.array([[action]])
        model.replay_buffer.add(*one, np.array([reward]), np.array([terminated]), [{}])

    shared.transitions(case, write)

    def train() -> None:
        for _ in range(count):
            model.train(gradient_steps=case["updates"], batch_size=case["batch"])
            polyak_update(model.q_net.parameters(), model.q_net_target.parameters(), 1.0)

    train()  # warms up
    return train, count * case["updates"]


def learner() -> None:
    asked = shared.request()
    jobs = {name: phases(case) for name, case in asked["cases"].items()}
    shared.reply(
        versions=shared.versions("stable-baselines3", "torch"), microseconds=shared.in_turns(jobs, asked["repeats"])
    )


def agent(job: shared.Job) -> DQN:
    envs = make_vec_env(job.env, n_envs=job.envs, seed=job.seed)
    return DQN(
        "CnnPolicy" if job.image else "MlpPolicy",
        VecFrameStack(envs, n_stack=4) if job.image else envs,
        learning_rate=job.learning_rate,
        batch_size=job.batch,
        buffer_size=job.capacity,
        learning_starts=job.learn_start,
        train_freq=max(1, job.train_period // job.envs),  # SB3 counts steps of all environments at once
        gradient_steps=job.updates,
        target_update_interval=job.target_period,
        exploration_fraction=job.epsilon_steps / job.total_steps,
        exploration_final_eps=job.epsilon_end,
        max_grad_norm=10.0,
        policy_kwargs={"net_arch": [] if job.image else job.hidden},
        device="cpu",
        seed=job.seed,
    )


class Timed(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.clock = shared.Clock()

    def _on_rollout_start(self) -> None:
        self.clock.tick(self.num_timesteps, self.model._n_updates)

    def _on_step(self) -> bool:
        return True


def loop() -> None:
    job, timed = shared.job(), Timed()
    model = agent(job).learn(job.total_steps, callback=timed)
    result = timed.clock.result(model.num_timesteps, model._n_updates)
    shared.reply(versions=shared.versions("stable-baselines3", "torch"), **result)


class Solves(BaseCallback):
    """Ends the training where the greedy policy reaches the target in 20 episodes, and then in 100."""

    def __init__(self, job: shared.Job) -> None:
        super().__init__()
        self._job, self._due = job, job.evaluation_period
        # As many copies as episodes in an evaluation, so that they are valued in one batch.
        self._envs = make_vec_env(job.env, n_envs=20, seed=job.seed + 10_000)
        self.confirmed: float | None = None

    def _mean(self, episodes: int) -> float:
        mean, _ = evaluate_policy(self.model, self._envs, n_eval_episodes=episodes, deterministic=True)
        return float(mean)

    def _on_step(self) -> bool:
        if self.num_timesteps < self._due:
            return True
        self._due += self._job.evaluation_period
        if self._mean(20) >= self._job.target_return and (mean := self._mean(100)) >= self._job.target_return:
            self.confirmed = mean
        return self.confirmed is None


def solve() -> None:
    job = shared.job()
    solves, began = Solves(job), time.perf_counter()
    model = agent(job).learn(job.total_steps, callback=solves)
    shared.reply(
        versions=shared.versions("stable-baselines3", "torch"),
        solved=solves.confirmed is not None,
        return_mean=solves.confirmed,
        total_steps=model.num_timesteps,
        seconds_inside=time.perf_counter() - began,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"learner": learner, "loop": loop, "solve": solve}[shared.request()["what"]]()
