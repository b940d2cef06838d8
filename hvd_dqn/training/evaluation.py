"""Measures a policy with little or no exploration. The ranks share the episodes and reduce results as (sum, count)."""

import math
from collections.abc import Callable

import numpy as np

from hvd_dqn.agent.policy import Policy
from hvd_dqn.envs.environments import Environments
from hvd_dqn.ranks.world import World

COLUMNS = ("total_steps", "seconds", "episodes", "return_mean", "return_std", "return_min", "return_max", "length_mean")


class Evaluator:
    """Plays episodes of `policy` in its own environments. Each action is random with probability `epsilon`.

    Only (seed, round, i) seeds episode i and its random actions, so the result depends neither on the number of ranks
    nor on the number of copies. An episode is cut off after `max_length` steps and counts with its return so far.
    Otherwise an environment without a time limit could block all ranks for ever.
    """

    def __init__(
        self,
        envs: Environments,
        policy: Policy,
        world: World,
        *,
        epsilon: float,
        seed: int,
        max_length: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._envs, self._policy, self._world, self._epsilon = envs, policy, world, epsilon
        self._seed, self._max_length, self._stop = seed, max_length, stop

    def evaluate(self, episodes: int, round: int, first: int = 0) -> dict[str, float] | None:
        """The statistics of `episodes` episodes over all ranks, without `total_steps` and `seconds`. A collective.

        These are the episodes `first`, first + 1, ... of this round. If `stop()` becomes true on one rank, it stops
        playing, and all ranks get None.
        """
        mine = range(first + self._world.rank, first + episodes, self._world.size)
        played = [self._play(mine[i : i + self._envs.copies], round) for i in range(0, len(mine), self._envs.copies)]
        returns = np.concatenate([r for r, _ in played]) if played else np.zeros(0)
        lengths = np.concatenate([n for _, n in played]) if played else np.zeros(0)
        count, total, length = self._world.sum(np.array([len(returns), returns.sum(), lengths.sum()])).tolist()
        mean = total / max(count, 1)
        (squares,) = self._world.sum(np.array([np.square(returns - mean).sum()])).tolist()
        highest, lowest, stopped = self._world.max(
            np.array([returns.max(initial=-np.inf), (-returns).max(initial=-np.inf), float(self._stop())])
        ).tolist()
        if stopped:
            return None
        return {
            "episodes": int(count),
            "return_mean": mean,
            "return_std": math.sqrt(squares / count),
            "return_min": -lowest,
            "return_max": highest,
            "length_mean": length / count,
        }

    def _play(self, episodes: range, round: int) -> tuple[np.ndarray, np.ndarray]:
        """The returns and lengths of these episodes. Each is played in a copy of its own."""
        keys = [*episodes] + [episodes[0]] * (self._envs.copies - len(episodes))  # spare copies repeat the first
        streams = [np.random.SeedSequence(self._seed, spawn_key=(round, episode)) for episode in keys]
        self._envs.reset([int(stream.generate_state(1)[0]) for stream in streams])
        rngs = [np.random.default_rng(stream.spawn(1)[0]) for stream in streams]
        running = np.arange(self._envs.copies) < len(episodes)
        returns, lengths = np.zeros(self._envs.copies), np.zeros(self._envs.copies)
        while running.any() and not self._stop():
            transition, ended = self._envs.step(self._act(rngs))
            lengths += running
            # `ended` lists results in the order of the copies in `done`. Only the first episode of a copy counts.
            done = np.flatnonzero(transition.terminated | transition.truncated)
            first = running[done]
            returns[done[first]] = ended.returns[first]
            running[done] = False
            cut = running & (lengths >= self._max_length)
            returns[cut] = self._envs.returns[cut]
            running[cut] = False
        return returns[: len(episodes)], lengths[: len(episodes)]

    def _act(self, rngs: list[np.random.Generator]) -> np.ndarray:
        mask = self._envs.mask
        action = self._policy.choose(self._envs.observation, mask)
        if self._epsilon > 0:
            for i, rng in enumerate(rngs):
                if rng.random() < self._epsilon:
                    action[i] = self._envs.choices.random(rng, 1, None if mask is None else mask[i : i + 1])[0]
        return action

    def close(self) -> None:
        self._envs.close()
