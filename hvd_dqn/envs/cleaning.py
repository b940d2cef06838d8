"""Finds readings that are not finite, and holds the last finite ones in their places if that is asked for."""

from collections.abc import Iterator

import numpy as np

from hvd_dqn.agent.layout import Layout
from hvd_dqn.envs.wrappers import EnvFailure


class Readings:
    """Checks the numbers that E copies return. `holds` says whether readings of observations are held; see `environments`.

    Errors name copies by their global numbers, from `first_index` on. Rewards are never held.
    """

    neutral: np.ndarray  # a frame: stands in for readings that are not finite when an episode begins
    held: int  # readings, since whoever reports them set it to 0
    first_held: str | None  # the first of them, in words

    def __init__(self, layout: Layout, holds: bool, id: str, first_index: int, rank: int) -> None:
        self._layout, self._holds = layout, holds
        self._id, self._first_index, self._rank = id, first_index, rank
        self.neutral = np.zeros(layout.shape, layout.dtype)
        self.held, self.first_held = 0, None

    def check_rewards(self, reward: np.ndarray) -> None:
        """Raises EnvFailure unless all rewards [E] are finite."""
        if np.count_nonzero(np.isfinite(reward)) < len(reward):
            raise self._failure("reward", reward, ~np.isfinite(reward))

    def check_first(self, frame: np.ndarray, rows: np.ndarray | None = None, what: str = "observation") -> None:
        """Checks the first frames of episodes, [E, *frame], or those of `rows`, [E] bool. Raises EnvFailure, or holds."""
        for name, i, values, bad in self._bad(frame, what, rows):
            self._hold(name, values, bad, np.broadcast_to(self.neutral, frame.shape), i, step=None)

    def check(self, frame: np.ndarray, last: np.ndarray, begins: np.ndarray | None, step: int) -> bool:
        """Checks frames [E, *frame] that follow `last`, but where an episode `begins`, [E] bool. Returns whether any changed.

        Raises EnvFailure, or holds.
        """
        held = False
        for name, i, values, bad in self._bad(frame, "observation"):
            if begins is not None:
                last = last.copy()
                last[begins] = self.neutral
            self._hold(name, values, bad, last, i, step)
            held = True
        return held

    def copy_held(self, shown: np.ndarray, stored: np.ndarray) -> None:
        """Puts what was `stored` into the places of `shown` that may have been held: its readings that are not finite."""
        if self._holds:
            for mine, theirs in zip(self._layout.views(shown), self._layout.views(stored), strict=True):
                if mine.dtype.kind == "f":
                    np.copyto(mine, theirs, where=~np.isfinite(mine))

    def _bad(
        self, frame: np.ndarray, what: str, rows: np.ndarray | None = None
    ) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
        """For each part with readings that are not finite: its name, its number, its values and where they are bad."""
        for i, (part, values) in enumerate(zip(self._layout.parts, self._layout.views(frame), strict=True)):
            if values.dtype.kind != "f" or np.count_nonzero(np.isfinite(values)) == values.size:
                continue
            bad = ~np.isfinite(values)
            if rows is not None:
                bad[~rows] = False
            if bad.any():
                yield f"{what} `{part.name}`" if part.name else what, i, values, bad

    def _hold(
        self, name: str, values: np.ndarray, bad: np.ndarray, last: np.ndarray, part: int, step: int | None
    ) -> None:
        if not self._holds:
            raise self._failure(name, values, bad)
        if self.first_held is None:
            number, value = self._first(values, bad)
            when = "at a reset" if step is None else f"in step {step}"
            self.first_held = f"environment {number} ({self._id}) on rank {self._rank} {when}: {value}"
        self.held += int(np.count_nonzero(bad))
        values[bad] = self._layout.views(last)[part][bad]

    def _failure(self, what: str, values: np.ndarray, bad: np.ndarray) -> EnvFailure:
        number, value = self._first(values, bad)
        return EnvFailure(
            [number], f"returned a non-finite {what}", f"{value}, which would make all weights non-finite"
        )

    def _first(self, values: np.ndarray, bad: np.ndarray) -> tuple[int, str]:
        """The number of the first copy that has a bad value, and which one."""
        place = np.argwhere(bad)[0].tolist()
        where = f" at index {place[1:]}" if place[1:] else ""
        return self._first_index + place[0], f"{values[tuple(place)]}{where}"
