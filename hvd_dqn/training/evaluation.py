"""Measures a policy with little or no exploration. The ranks share the episodes and reduce results as (sum, count)."""

import math
from collections import deque
from collections.abc import Callable

import numpy as np

from hvd_dqn.agent.policy import Policy
from hvd_dqn.envs.environments import Environments
from hvd_dqn.errors import RunError
from hvd_dqn.ranks.world import World

COLUMNS = ("total_steps", "seconds", "episodes", "return_mean", "return_std", "return_min", "return_max", "length_mean")
# So many failures of environments without one finished episode end the job: the same episodes would fail for ever.
TRIES = 10


class Evaluator:
    """Plays episodes of `policy` in its own environments, `envs` that `evaluate`. Actions are random with `epsilon`.

    Only (seed, round, i) seeds episode i and its random actions, so the result depends neither on the number of ranks
    nor on the number of copies. A copy that is free gets the next episode. If environments fail and are made again, the
    episodes that were interrupted are played again from their beginning. An episode is cut off after `max_length` steps
    and counts with its return so far. Otherwise an environment without a time limit could block all ranks for ever.
    """

    cut_short: bool  # whether the `max_length` of the last `evaluate` cut off an episode, on any rank

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
        self.envs = envs
        self._policy, self._world, self._epsilon = policy, world, epsilon
        self._seed, self._max_length, self._stop = seed, max_length, stop
        self.cut_short = False

    def evaluate(
        self, episodes: int, round: int, first: int = 0, max_length: int | None = None
    ) -> dict[str, float] | None:
        """The statistics of `episodes` episodes over all ranks, without `total_steps` and `seconds`. A collective.

        These are the episodes `first`, first + 1, ... of this round. `max_length` may cut them off earlier. If `stop()`
        becomes true on one rank, it stops playing, and all ranks get None.
        """
        mine = range(first + self._world.rank, first + episodes, self._world.size)
        longest = min(self._max_length, max_length or self._max_length)
        returns, lengths, was_cut = self._play(mine, round, longest)
        count, total, length = self._world.sum(np.array([len(returns), returns.sum(), lengths.sum()])).tolist()
        mean = total / max(count, 1)
        (squares,) = self._world.sum(np.array([np.square(returns - mean).sum()])).tolist()
        extremes = returns.max(initial=-np.inf), (-returns).max(initial=-np.inf)
        was_cut &= longest < self._max_length
        highest, lowest, stopped, cut_short = self._world.max(
            np.array([*extremes, float(self._stop()), float(was_cut)])
        ).tolist()
        self.cut_short = bool(cut_short)
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

    def _play(self, episodes: range, round: int, longest: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """The returns and lengths [n] of these episodes, and whether any was cut off."""
        envs, waiting, tries = self.envs, deque(range(len(episodes))), 0
        returns, lengths = np.zeros(len(episodes)), np.zeros(len(episodes))
        playing = np.full(envs.copies, -1)  # [E]: the place in `episodes` of what each copy plays; -1: none
        steps = np.zeros(envs.copies)  # [E]: of that episode
        rngs: dict[int, np.random.Generator] = {}  # by copy
        was_cut = False
        while (waiting or (playing >= 0).any()) and not self._stop():
            failures = envs.restarted
            if waiting and (playing < 0).any():
                seeds: list[int | None] = [None] * envs.copies
                for copy in np.flatnonzero(playing < 0)[: len(waiting)].tolist():
                    playing[copy], steps[copy] = waiting.popleft(), 0
                    stream = np.random.SeedSequence(self._seed, spawn_key=(round, episodes[playing[copy]]))
                    # Simulators keep seeds as signed integers of 32 bits.
                    seeds[copy] = int(stream.generate_state(1)[0]) % 2**31
                    rngs[copy] = np.random.default_rng(stream.spawn(1)[0])
                envs.begin(seeds)
            rows = np.flatnonzero(playing >= 0)
            if envs.restarted == failures:
                transition, ended = envs.step(self._act(rows, rngs))
            if envs.restarted != failures:
                tries += 1
                if tries >= TRIES:
                    raise RunError(
                        f"{tries} evaluation episodes of {envs.id} in a row were interrupted by a failure, and none was "
                        f"finished: evaluation cannot go on with --env.restart_failed_envs. Make the environment more "
                        "reliable, or its episodes shorter."
                    )
                waiting.extendleft(sorted(playing[rows].tolist(), reverse=True))
                playing[rows] = -1
                continue
            steps[rows] += 1
            # `ended` lists results in the order of the copies that are done. A copy that rests is never done.
            done = np.flatnonzero(transition.terminated | transition.truncated)
            cut = np.setdiff1d(rows[steps[rows] >= longest], done)
            for copies, results in ((done, ended.returns), (cut, envs.returns[cut])):
                returns[playing[copies]], lengths[playing[copies]] = results, steps[copies]
                playing[copies] = -1
                tries = 0 if len(copies) else tries
            if len(cut):
                envs.rest(playing < 0)
                was_cut = True
        return returns, lengths, was_cut

    def _act(self, rows: np.ndarray, rngs: dict[int, np.random.Generator]) -> np.ndarray:
        """Actions [E] or [E, D]. Those of the copies `rows` matter; the others rest."""
        mask, choices = self.envs.mask, self.envs.choices
        action = np.zeros((self.envs.copies, *choices.shape), np.int64)
        action[rows] = self._policy.choose(self.envs.observation[rows], None if mask is None else mask[rows])
        if self._epsilon > 0:
            for copy in rows.tolist():
                if rngs[copy].random() < self._epsilon:
                    action[copy] = choices.random(rngs[copy], 1, None if mask is None else mask[copy : copy + 1])[0]
        return action

    def close(self) -> None:
        self.envs.close()
