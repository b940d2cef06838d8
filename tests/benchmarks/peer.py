"""Times Stable-Baselines3's `DQN.train`; runs in the peers' environment, started by learner.py.

Reads {"repeats": ..., "cases": {network: fields of hvd_dqn.bench.Case}} from its argument and prints one JSON object.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import polyak_update


class Spaces(gym.Env):
    """No environment, only the spaces of one: nothing is stepped here."""

    def __init__(self, observation: tuple[int, ...], actions: int) -> None:
        images = len(observation) == 3
        self.observation_space = (
            gym.spaces.Box(0, 255, observation, np.uint8) if images else gym.spaces.Box(-np.inf, np.inf, observation)
        )
        self.action_space = gym.spaces.Discrete(actions)


def job(case: dict[str, Any], phases: int) -> Callable[[], None]:
    """Phases of K updates; SB3 draws a batch inside each and copies the target outside `train`, here once per phase."""
    images = case["network"] == "cnn"
    model = DQN(
        "CnnPolicy" if images else "MlpPolicy",
        Spaces(tuple(case["observation"]), case["actions"]),
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
    rng, shape = np.random.default_rng(0), model.observation_space.shape
    frames = rng.integers(256, size=(65, 1, *shape)).astype(model.observation_space.dtype)
    for step in range(case["transitions"]):
        model.replay_buffer.add(
            frames[step % 64],
            frames[step % 64 + 1],
            rng.integers(case["actions"], size=(1, 1)),
            rng.normal(size=1),
            rng.random(1) < 0.01,
            [{}],
        )

    def train() -> None:
        for _ in range(phases):
            model.train(gradient_steps=case["updates"], batch_size=case["batch"])
            polyak_update(model.q_net.parameters(), model.q_net_target.parameters(), 1.0)

    train()  # warms up
    return train


def main() -> None:
    torch.set_num_threads(1)
    request = json.loads(sys.argv[1])
    # A quarter of our phases, because the updates take several times as long.
    phases = {name: max(1, case["phases"] // 4) for name, case in request["cases"].items()}
    jobs = {name: job(case, phases[name]) for name, case in request["cases"].items()}
    microseconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(request["repeats"]):
        for name, train in jobs.items():
            start = time.perf_counter()
            train()
            updates = phases[name] * request["cases"][name]["updates"]
            microseconds[name].append(1e6 * (time.perf_counter() - start) / updates)
    versions = {"stable-baselines3": stable_baselines3.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "microseconds": {n: float(np.median(t)) for n, t in microseconds.items()}}))


if __name__ == "__main__":
    main()
