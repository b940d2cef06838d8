"""Prioritized experience replay: transitions with large errors are drawn more often, and weighted less."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hvd_dqn.agent.replay import NOTHING, ROUNDS, Draw, Replay, as_stored

# Added to priorities, so that no transition is never drawn again. Source: Schaul et al. 2016, arXiv:1511.05952, section 3.3;
# the number: OpenAI Baselines.
LEAST = 1e-6


class SumTree:
    """Sums of `leaves` float64 values, in levels of which each number is the sum of `FAN` numbers below it.

    The highest level has at most `TOP` numbers, and is searched as a whole. So drawing n leaves of a million, and changing
    them, takes a few NumPy calls: a tree of two branches to a node would take as many for each of its 20 levels. Sums are
    recomputed from the numbers below them, so no rounding errors add up.
    """

    FAN, TOP = 16, 1 << 16

    def __init__(self, leaves: int) -> None:
        self._levels = [np.zeros(-(-leaves // self.FAN) * self.FAN)]  # the leaves first
        while len(self._levels[-1]) > self.TOP:
            above = len(self._levels[-1]) // self.FAN
            self._levels.append(np.zeros(-(-above // self.FAN) * self.FAN))
        self.leaves = self._levels[0][:leaves]  # a view: read it, and write by `set`

    @property
    def total(self) -> float:
        return float(self._levels[-1].sum())

    def set(self, leaves: np.ndarray, values: np.ndarray | float) -> None:
        """Gives `leaves`, [n], these values, at least 0. If a leaf comes twice, the last value counts."""
        self._levels[0][leaves] = values
        places = leaves
        for below, above in zip(self._levels, self._levels[1:], strict=False):
            places = np.unique(places // self.FAN)
            above[places] = below.reshape(-1, self.FAN)[places].sum(axis=1)

    def set_all(self, values: np.ndarray) -> None:
        """Gives all leaves these values."""
        self.leaves[:] = values
        for below, above in zip(self._levels, self._levels[1:], strict=False):
            above[: len(below) // self.FAN] = below.reshape(-1, self.FAN).sum(axis=1)

    def find(self, place: np.ndarray) -> np.ndarray:
        """[n]: for places [n] in [0, total) the leaves in whose part of the line they lie."""
        top = self._levels[-1].cumsum()
        # Rounding may put a place at the end of the last part that is not empty, or behind it.
        rest = np.minimum(place, np.nextafter(top[-1], 0))
        node: np.ndarray = top.searchsorted(rest, side="right")
        rest = rest - np.where(node > 0, top[node - 1], 0.0)
        for level in self._levels[-2::-1]:
            ends = level.reshape(-1, self.FAN)[node].cumsum(axis=1)  # [n, FAN]
            rest = np.minimum(rest, np.nextafter(ends[:, -1], 0))
            child = (ends <= rest[:, None]).sum(axis=1)
            rest = rest - np.where(child > 0, ends[np.arange(len(ends)), child - 1], 0.0)
            node = node * self.FAN + child
        return node


class PrioritizedReplay(Replay):
    """A `Replay` that draws in proportion to priority**exponent (Schaul et al. 2016, arXiv:1511.05952, section 3.3).

    New transitions get the largest priority seen, on any rank. Each rank draws from its own part of the memory. So a
    transition i of this rank is drawn with the probability P(i) = p_i / (ranks * sum of this rank's p), and its weight
    is (N * P(i))**-importance, divided by the largest in its minibatch on any rank. N, the size of the whole memory,
    cancels there.
    """

    def __init__(self, *values: Any, exponent: float, **named: Any) -> None:
        super().__init__(*values, **named)
        self._exponent = exponent
        self._tree = SumTree(self._envs * self._slots)
        self._synced = np.zeros(self._envs, np.int64)  # the write positions up to which priorities are set
        self.largest = 1.0  # priority seen

    @staticmethod
    def memory_needed(*values: Any, **named: Any) -> int:
        slots, envs = values[:2]
        return Replay.memory_needed(*values, **named) + round(8 * slots * envs * (1 + 1 / (SumTree.FAN - 1)))

    def draw(self, updates: int, batch_size: int, learned: Callable[[np.ndarray], np.ndarray] = as_stored) -> Draw:
        """The same in proportion to priorities. `weighted` gives the draw its weights."""
        self._sync()
        return super().draw(updates, batch_size, learned)

    def weighted(self, draw: Draw, importance: float, largest: Callable[[np.ndarray], np.ndarray]) -> Draw:
        """The last draw with its weights [K, B]. A collective: `largest` is the world's `max`.

        All ranks draw the same number of minibatches, so all send K + 1 numbers.
        """
        share = self._tree.leaves[draw.start] / self._sum_of_starts()
        weight = share**-importance  # [K, B]
        *most, self.largest = largest(np.append(weight.max(axis=1), self.largest))
        return draw._replace(weight=(weight / np.array(most)[:, None]).astype(np.float32))

    def update_priorities(self, draw: Draw, priority: np.ndarray) -> None:
        """Takes the priorities [K, B], at least 0, of transitions that were drawn and are still stored.

        Those that are not finite, of updates that were skipped, are left out: one of them would be the sum of all.
        """
        held = self.is_held(draw) & np.isfinite(priority)
        if not held.any():
            return
        self.largest = max(self.largest, float(priority[held].max()))
        self._tree.set(draw.start[held], (priority[held].astype(np.float64) + LEAST) ** self._exponent)

    def _sync(self) -> None:
        """Gives the slots that were written since the last draw their first priorities."""
        newest = self._write_positions
        count = np.minimum(newest - self._synced + 1, self._slots)  # with the head, where no transition starts
        env = np.repeat(np.arange(self._envs), count)
        back = np.arange(len(env)) - np.repeat(np.cumsum(count) - count, count)
        at = env * self._slots + (newest[env] - back) % self._slots
        starts = self._step_types.reshape(-1)[at] != NOTHING
        # The slot of the old head was empty at the last call, and is set now like all that follow it.
        self._tree.set(at, np.where(starts, (self.largest + LEAST) ** self._exponent, 0.0))
        self._synced = newest.copy()

    def _draw(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        oldest, candidates = self._candidates()
        drawn, generation, total = np.empty(size, np.int64), np.empty(size, np.int64), self._tree.total
        missing = np.arange(size)
        for _ in range(ROUNDS if total > 0 else 0):
            drawn[missing] = at = self._tree.find(self._rng.random(len(missing)) * total)
            env = at // self._slots
            place = (at - oldest[env]) % self._slots
            generation[missing] = oldest[env] + place
            # Draws that are no starts are replaced, so the others keep their proportions.
            missing = missing[~self._is_start(at, place, candidates[env])]
            if len(missing) == 0:
                return drawn, generation
        starts = self._starts()
        if len(starts) == 0:
            raise ValueError("The replay holds no transition that can be sampled yet.")
        priority = self._tree.leaves[starts]
        drawn[missing] = at = self._rng.choice(starts, len(missing), p=priority / priority.sum())
        env = at // self._slots
        generation[missing] = oldest[env] + (at - oldest[env]) % self._slots
        return drawn, generation

    def _is_start(self, at: np.ndarray, place: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        stacked = np.minimum(self._episode_steps.reshape(-1)[at], self._frame_stack - 1) <= place
        result: np.ndarray = stacked & (place < candidates) & (self._step_types.reshape(-1)[at] != NOTHING)
        return result

    def _sum_of_starts(self) -> float:
        """The sum over all starts: of all leaves without the newest, whose window is incomplete, and the oldest."""
        oldest, candidates = self._candidates()
        held = np.minimum(self._write_positions, self._slots - 1)
        without = 0.0
        for place in [*range(self._frame_stack - 1), *(-1 - i for i in range(self._n_step - 1))]:
            env = np.flatnonzero(held > (place if place >= 0 else -place - 1))
            places = place if place >= 0 else held[env] + place
            places = np.broadcast_to(places, env.shape)
            at = env * self._slots + (oldest[env] + places) % self._slots
            no_start = ~self._is_start(at, places, candidates[env])
            # A small ring's oldest may be its newest, too.
            counted = places >= self._frame_stack - 1 if place < 0 else np.ones(len(env), np.bool_)
            without += float(self._tree.leaves[at[no_start & counted]].sum())
        return self._tree.total - without

    def arrays(self) -> dict[str, np.ndarray]:
        return super().arrays() | {"priorities": self._tree.leaves.reshape(self._envs, self._slots)}

    def state(self) -> dict[str, Any]:
        self._sync()
        return super().state() | {"largest_priority": self.largest}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The same. Without `priorities` all transitions are like new ones; without `largest_priority` it is theirs."""
        fresh = "priorities" not in state
        used = state["frames"].shape[1]
        super().load_state(dict(state) | ({"priorities": self.arrays()["priorities"][:, :used]} if fresh else {}))
        stored = self._step_types.reshape(-1) != NOTHING
        first = (self.largest + LEAST) ** self._exponent
        self._tree.set_all(np.where(stored, first if fresh else self._tree.leaves, 0.0))
        highest = float(self._tree.leaves.max()) ** (1 / self._exponent) - LEAST
        self.largest = float(state.get("largest_priority", max(highest, LEAST)))
        self._synced = self._write_positions.copy()
