"""What the peers' scripts share. Each runs in the peers' environment, reads one JSON request from its argument and prints one
JSON object; nothing of TensorFlow is there.

A request for the learner holds {"what": "learner", "repeats": ..., "cases": {network: fields of LearnerCase}}, the other
two the fields of a `Job`: {"what": "loop" or "solve", ...}.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np


class Job(NamedTuple):
    """A training run, in the words of the zoo; periods and lengths in steps of all environments together."""

    what: str
    env: str  # Gymnasium's id
    envs: int
    image: bool  # four stacked frames and the Nature CNN
    hidden: list[int]  # of its dense layers
    learning_rate: float
    batch: int
    capacity: int
    learn_start: int
    train_period: int
    updates: int  # in each phase
    target_period: int
    epsilon_end: float
    epsilon_steps: int
    total_steps: int
    seed: int = 0
    target_return: float = 0.0  # from here on those of `solve`
    evaluation_period: int = 0

    def epsilon(self, steps: int) -> float:
        return 1.0 + (self.epsilon_end - 1.0) * min(1.0, steps / self.epsilon_steps)


class Spaces(gym.Env):
    """No environment, only the spaces of one: nothing is stepped here."""

    def __init__(self, observation: tuple[int, ...], actions: int) -> None:
        images = len(observation) == 3
        self.observation_space = (
            gym.spaces.Box(0, 255, observation, np.uint8) if images else gym.spaces.Box(-np.inf, np.inf, observation)
        )
        self.action_space = gym.spaces.Discrete(actions)


class Clock:
    """Counts steps and updates from the first learning phase on: graphs, caches and workers are warm by then."""

    def __init__(self) -> None:
        self._began: tuple[float, int, int] | None = None

    def tick(self, steps: int, updates: int) -> None:
        """To be called between phases."""
        if self._began is None and updates:
            self._began = (time.perf_counter(), steps, updates)

    def result(self, steps: int, updates: int) -> dict[str, float]:
        if self._began is None:
            sys.exit(f"{steps} steps were too few: no phase of updates was made.")
        seconds, steps, updates = (
            now - then for now, then in zip((time.perf_counter(), steps, updates), self._began, strict=True)
        )
        if not steps:
            sys.exit("No steps were taken after the first phase of updates: raise --total-steps.")
        rates = {"steps_per_second": steps / seconds, "updates_per_second": updates / seconds}
        return {**rates, "total_steps": steps, "updates": updates, "seconds": seconds}


def in_turns(jobs: Mapping[str, tuple[Callable[[], None], int]], repeats: int) -> dict[str, float]:
    """The median microseconds per update of jobs that make so many updates, warmed up; all wait for the same bad moments."""
    microseconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, (train, updates) in jobs.items():
            start = time.perf_counter()
            train()
            microseconds[name].append(1e6 * (time.perf_counter() - start) / updates)
    return {name: statistics.median(times) for name, times in microseconds.items()}


def transitions(case: Mapping[str, Any], write: Callable[..., None]) -> None:
    """Fills a replay with random transitions, one in a hundred the last of its episode, one after the other."""
    rng, shape = np.random.default_rng(0), tuple(case["observation"])
    dtype = np.uint8 if len(shape) == 3 else np.float32
    frames = rng.integers(256, size=(65, *shape)).astype(dtype)
    for step in range(case["transitions"]):
        action, reward, terminated = rng.integers(case["actions"]), rng.normal(), rng.random() < 0.01
        write(frames[step % 64], action, reward, terminated, frames[step % 64 + 1])


def versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def request() -> dict[str, Any]:
    return json.loads(sys.argv[1])


def job() -> Job:
    return Job(**request())


def reply(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)
