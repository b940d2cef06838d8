"""Tianshou's DQN: its update alone, whole training, and training until a target return is reached.

The loop is that of its OffPolicyTrainer, collect and update in turns, without the trainer's own records.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import shared
import torch
from tianshou.algorithm.modelfree.dqn import DQN, DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, OptimizerFactory
from tianshou.data import Batch, Collector, ReplayBuffer, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.env.atari.atari_network import DQNet, ScaledObsInputActionReprNet
from tianshou.utils.net.common import Net
from tianshou.utils.torch_utils import policy_within_training_step


class ClippedDQN(DQN):
    """Its optimizers can clip, but DQN's constructor does not let one ask for it."""

    def _create_policy_optimizer(self, optim: OptimizerFactory) -> Any:
        return self._create_optimizer(self.policy, optim, max_grad_norm=10.0)


class Stacked(gym.Wrapper):
    """The last four frames [84, 84, 1] as [4, 84, 84]."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(gym.wrappers.FrameStackObservation(env, 4))
        self.observation_space = gym.spaces.Box(0, 255, (4, *env.observation_space.shape[:2]), np.uint8)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict]:
        observation, info = self.env.reset(**options)
        return observation[..., 0], info

    def step(self, action: Any) -> tuple:
        observation, *rest = self.env.step(action)
        return observation[..., 0], *rest


def algorithm(spaces: gym.Env, image: bool, hidden: list[int], learning_rate: float, target_updates: int) -> ClippedDQN:
    observation, actions = spaces.observation_space, int(spaces.action_space.n)
    model = (
        ScaledObsInputActionReprNet(DQNet(*observation.shape, actions))
        if image
        else Net(state_shape=observation.shape, action_shape=actions, hidden_sizes=hidden)
    )
    policy = DiscreteQLearningPolicy(model=model, action_space=spaces.action_space, observation_space=observation)
    return ClippedDQN(
        policy=policy,
        optim=AdamOptimizerFactory(lr=learning_rate),
        gamma=0.99,
        target_update_freq=target_updates,
        is_double=False,
        huber_loss_delta=1.0,
    )


def phases(case: dict[str, Any]) -> tuple[Callable[[], None], int]:
    images, count = case["network"] == "cnn", max(1, case["phases"] // 4)
    shape = tuple(case["observation"])
    spaces = shared.Spaces((shape[2], *shape[:2]) if images else shape, case["actions"])
    dqn = algorithm(spaces, images, case["hidden"], 1e-4, case["updates"])
    buffer = ReplayBuffer(case["transitions"])

    def write(observation: Any, action: int, reward: float, terminated: bool, following: Any) -> None:
        if images:
            observation, following = observation.transpose(2, 0, 1), following.transpose(2, 0, 1)
        buffer.add(
            Batch(
                obs=observation, act=action, rew=reward, terminated=terminated, truncated=False, obs_next=following, info={}
            )
        )  # fmt: skip

    shared.transitions(case, write)

    def train() -> None:
        with policy_within_training_step(dqn.policy):
            for _ in range(count * case["updates"]):
                dqn.update(buffer=buffer, sample_size=case["batch"])

    train()  # warms up
    return train, count * case["updates"]


def learner() -> None:
    asked = shared.request()
    jobs = {name: phases(case) for name, case in asked["cases"].items()}
    shared.reply(versions=shared.versions("tianshou", "torch"), microseconds=shared.in_turns(jobs, asked["repeats"]))


def make_env(job: shared.Job) -> gym.Env:
    env = gym.make(job.env)
    return Stacked(env) if job.image else env


def train(job: shared.Job) -> Iterator[tuple[ClippedDQN, int, int]]:
    """Yields steps and updates after each turn of collecting and updating."""
    np.random.seed(job.seed)  # noqa: NPY002 - the generator that Tianshou draws from
    torch.manual_seed(job.seed)
    envs = DummyVectorEnv([lambda: make_env(job)] * job.envs)
    # The target is copied where SB3 copies it: within a phase of updates it stays.
    target_updates = max(job.updates, job.target_period * job.updates // job.train_period)
    dqn = algorithm(make_env(job), job.image, job.hidden, job.learning_rate, target_updates)
    # Of images its replay keeps single frames, as its Atari example does.
    frames = {"ignore_obs_next": True, "save_only_last_obs": True, "stack_num": 4} if job.image else {}
    buffer = VectorReplayBuffer(job.capacity, job.envs, **frames)
    collector = Collector(dqn, envs, buffer, exploration_noise=True)
    collector.reset(gym_reset_kwargs={"seed": job.seed})
    steps = updates = 0
    with policy_within_training_step(dqn.policy):
        while steps < job.total_steps:
            dqn.policy.set_eps_training(job.epsilon(steps))
            steps += collector.collect(n_step=job.train_period).n_collected_steps
            if steps >= job.learn_start:
                for _ in range(job.updates):
                    dqn.update(buffer=buffer, sample_size=job.batch)
                updates += job.updates
            yield dqn, steps, updates


def loop() -> None:
    job, clock, steps, updates = shared.job(), shared.Clock(), 0, 0
    for _, steps, updates in train(job):
        clock.tick(steps, updates)
    shared.reply(versions=shared.versions("tianshou", "torch"), **clock.result(steps, updates))


def solve() -> None:
    job, due, confirmed, steps = shared.job(), 0, None, 0
    envs, began = DummyVectorEnv([lambda: make_env(job)] * 20), time.perf_counter()
    for dqn, steps, _ in train(job):
        if steps < due + job.evaluation_period:
            continue
        due += job.evaluation_period
        if mean(dqn, envs, 20, job) >= job.target_return and (found := mean(dqn, envs, 100, job)) >= job.target_return:
            confirmed = found
            break
    shared.reply(
        versions=shared.versions("tianshou", "torch"),
        solved=confirmed is not None,
        return_mean=confirmed,
        total_steps=steps,
        seconds_inside=time.perf_counter() - began,
    )


def mean(dqn: ClippedDQN, envs: DummyVectorEnv, episodes: int, job: shared.Job) -> float:
    collector = Collector(dqn, envs, exploration_noise=False)
    collector.reset(gym_reset_kwargs={"seed": job.seed + 10_000 + episodes})
    return float(np.mean(collector.collect(n_episode=episodes).returns))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"learner": learner, "loop": loop, "solve": solve}[shared.request()["what"]]()
