"""Collects what happens on each rank and reduces it over all ranks to one row per report."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np

from hvd_dqn.ranks.world import World

TIMERS = ("act", "env", "sample", "update", "communication", "evaluate", "save")
# The same, with communication split into the time of the collectives and the wait for other ranks.
TIMED = ("act", "env", "sample", "update", "communicate", "idle", "evaluate", "save")
COLUMNS = (
    "total_steps", "cycle", "updates", "seconds", "steps_per_second", "updates_per_second", "epsilon", "learning_rate",
    "loss", "mean_q", "gradient_norm", "episodes", "return_mean", "return_max", "length_mean", "replay_size", "skipped_updates",
    *(f"time_{name}" for name in TIMED),
)  # fmt: skip
# Columns of runs whose settings allow it: what happened to environments, in the order of `Environments.take_unreported`.
COUNTED = ("held_readings", "env_restarts")

Row = dict[str, float]  # by column; NaN if there was nothing to measure


class Timer:
    """Adds up the seconds spent inside `with timer:`."""

    __slots__ = ("_entered", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._entered = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += perf_counter() - self._entered


class Ledger:
    """Collects on each rank what happened since the last report, and reduces it over all ranks.

    Means are reduced as (sum, count): a rank that finished three episodes counts three times as much as one that
    finished one. `counted` are those of `COUNTED` that reports have.
    """

    def __init__(self, world: World, counted: Sequence[str] = ()) -> None:
        self._world, self._counted = world, tuple(counted)
        self._timers = {name: Timer() for name in TIMERS}
        self._spent = dict.fromkeys(TIMED, 0.0)  # before the current window
        self._began = perf_counter()
        self._total_steps = self._updates = 0  # at the last report
        self._start_window()

    def _start_window(self) -> None:
        self._window_began = perf_counter()
        self._episodes: np.ndarray = np.zeros(3)  # count, sum of returns, sum of lengths
        self._return_max = -math.inf
        self._phases: np.ndarray = np.zeros(4)  # updates, sum of losses, of mean q, of gradient norms
        self._skipped = 0
        for timer in self._timers.values():
            timer.seconds = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of the run, over all its resumes."""
        return perf_counter() - self._began

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of this rank in each of `TIMED`, over all resumes of the run.

        Until the next report the wait for others counts as communication.
        """
        return self._spent_with(self._timers["communication"].seconds)

    def _spent_with(self, communicate: float) -> dict[str, float]:
        window = {name: timer.seconds for name, timer in self._timers.items()}
        window |= {"communicate": communicate, "idle": window["communication"] - communicate}
        return {name: self._spent[name] + window[name] for name in TIMED}

    def timed(self, name: str) -> Timer:
        """Counts the time inside `with ledger.timed("act"):` as one of `TIMERS`."""
        return self._timers[name]

    def communicating(self) -> AbstractContextManager[None]:
        """Counts the time inside `with ledger.communicating():` as communication, except in a single process."""
        return self._timers["communication"] if self._world.size > 1 else nullcontext()

    def episodes(self, returns: np.ndarray, lengths: np.ndarray) -> None:
        """Episodes that ended on this rank in this cycle, [n] each; n may be 0."""
        if len(returns):
            self._episodes += (len(returns), np.sum(returns, dtype=np.float64), np.sum(lengths, dtype=np.float64))
            self._return_max = max(self._return_max, float(np.max(returns)))

    def phase(
        self,
        updates: int,
        loss_sum: float,
        q_sum: float,
        gradient_norm_sum: float,
        skipped: int = 0,
        seconds: float = 0.0,
        allreduce_seconds: float = 0.0,
    ) -> None:
        """One phase of this rank: the number of updates, sums over them, and the number of skipped updates.

        Of its `seconds`, `allreduce_seconds` were spent on averaging over ranks.
        """
        self._phases += (updates, loss_sum, q_sum, gradient_norm_sum)
        self._skipped += skipped
        self._timers["update"].seconds += seconds - allreduce_seconds
        self._timers["communication"].seconds += allreduce_seconds

    def report(
        self,
        *,
        total_steps: int,
        cycle: int,
        updates: int,
        epsilon: float,
        learning_rate: float,
        replay_size: int,
        counts: Mapping[str, int] | None = None,
    ) -> Row:
        """A row with `COLUMNS`, the same on all ranks, about the time since the last one. A collective.

        `replay_size` is this rank's, as `counts` are, with a number for each of `COUNTED`; the row has the sums over ranks
        (of those counts that it has). `episodes` counts the window's. `skipped_updates`
        is the mean over ranks (with averaged gradients all skip the same). `time_*` are mean seconds of a rank. The
        rank that waited least defines the time of communication; what other ranks spent beyond that is idle.
        """
        # Horovod: the vectors have the same length on every rank, whatever happened there.
        times = [timer.seconds for timer in self._timers.values()]
        communication = self._timers["communication"].seconds
        sums = self._world.sum(
            np.concatenate(
                [
                    self._episodes,
                    self._phases,
                    [float(replay_size), float(self._skipped)],
                    [float((counts or {})[name]) for name in self._counted],
                    times,
                ]
            )
        )
        highest = self._world.max(
            np.array([self._return_max, self.seconds, perf_counter() - self._window_began, -communication])
        )

        episodes, return_sum, length_sum, phase_updates, loss_sum, q_sum, norm_sum, replay_sum, skipped, *times = (
            sums.tolist()
        )
        happened, times = times[: len(self._counted)], times[len(self._counted) :]
        return_max, seconds, window, communicate = highest.tolist()
        communicate = -communicate
        mean = {name: time / self._world.size for name, time in zip(TIMERS, times, strict=True)}
        mean |= {"communicate": communicate, "idle": mean["communication"] - communicate}
        values = (
            total_steps,
            cycle,
            updates,
            seconds,
            _ratio(total_steps - self._total_steps, window),
            _ratio(updates - self._updates, window),
            epsilon,
            learning_rate,
            _ratio(loss_sum, phase_updates),
            _ratio(q_sum, phase_updates),
            _ratio(norm_sum, phase_updates),
            round(episodes),
            _ratio(return_sum, episodes),
            return_max if episodes else math.nan,
            _ratio(length_sum, episodes),
            round(replay_sum),
            round(skipped / self._world.size),
            *(mean[name] for name in TIMED),
        )
        self._total_steps, self._updates = total_steps, updates
        self._spent = self._spent_with(communicate)
        self._start_window()
        return dict(zip((*COLUMNS, *self._counted), (*values, *map(round, happened)), strict=True))

    def state(self) -> dict[str, Any]:
        """What all ranks share; see `window_state` for what has not been reported yet."""
        return {
            "seconds": self.seconds,
            "total_steps": self._total_steps,
            "updates": self._updates,
            "spent": self._spent,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._began = perf_counter() - state["seconds"]
        self._total_steps, self._updates = int(state["total_steps"]), int(state["updates"])
        self._start_window()
        self._spent = {name: float(state["spent"][name]) for name in TIMED}

    def window_state(self) -> dict[str, Any]:
        """What this rank has collected since the last report."""
        return {
            "seconds": perf_counter() - self._window_began,
            "episodes": self._episodes,
            "return_max": None if math.isinf(self._return_max) else self._return_max,
            "phases": self._phases,
            "skipped": self._skipped,
            "timers": {name: timer.seconds for name, timer in self._timers.items()},
        }

    def load_window_state(self, state: dict[str, Any]) -> None:
        self._window_began = perf_counter() - float(state["seconds"])
        self._episodes, self._phases = np.array(state["episodes"], np.float64), np.array(state["phases"], np.float64)
        self._return_max = -math.inf if state["return_max"] is None else float(state["return_max"])
        self._skipped = int(state["skipped"])
        for name, timer in self._timers.items():
            timer.seconds = float(state["timers"][name])


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
