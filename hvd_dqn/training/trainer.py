"""The training loop: the same program on one rank and on many."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np

from hvd_dqn.config import Config
from hvd_dqn.errors import InputError, JobError, RanksChanged
from hvd_dqn.ranks.lockstep import BroadcastHook, check_drift
from hvd_dqn.ranks.watchdog import NullWatchdog, Watchdog, open_watchdog
from hvd_dqn.ranks.world import World, largest_gradient
from hvd_dqn.storage.checkpoint import Checkpoints, Snapshot
from hvd_dqn.training.build import start_from
from hvd_dqn.training.ledger import Row
from hvd_dqn.training.worker import Worker


class Record(NamedTuple):
    """One record of the run, equal on all ranks, except for warnings of a rank's own environments."""

    kind: Literal["report", "evaluation", "message", "warning", "stopped", "result"]
    row: Row
    text: str = ""


class Trainer:
    """The training loop of one rank. It fixes the order of all collectives. Raises InputError as `Worker` does.

    `stop` tells whether this rank was asked to stop; the ranks vote on it at fixed cycles. `learned` is called after
    each phase. A rank that `joins` takes the weights and counters of the others' `snapshot`. A new run takes its first
    weights from `start`, a checkpoint of another run, and nothing else.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        snapshot: Snapshot | None = None,
        stop: Callable[[], bool] = lambda: False,
        *,
        joins: bool = False,
        start: Snapshot | None = None,
        learned: Callable[[Worker], None] = lambda worker: None,
    ) -> None:
        self.config, self.world, self._stop, self._learned = config, world, stop, learned
        self.worker = Worker(
            config, world, snapshot, joins=joins, stop=stop, beat=lambda doing: self.watchdog.beat(doing)
        )
        if start is not None:
            try:
                worker = self.worker
                start_from(worker.learner, worker.preprocess, worker.statistics, worker.rewards, start)
                worker.use_statistics()
            except InputError:
                self.worker.close()
                raise
        self.watchdog: Watchdog | NullWatchdog = NullWatchdog()
        self._broadcast = BroadcastHook(world, self.worker.learner.variables)
        # The total steps of the last resumable checkpoint, which has all of this rank's state but what evaluations change.
        self._saved_at = snapshot.total_steps if snapshot and snapshot.path.name else -1
        self._began = False
        self.committed: Snapshot | None = None  # what an elastic job continues from when it loses ranks

    def train(self, checkpoints: Checkpoints) -> Generator[Record, None, None]:
        """Trains to the end. Yields a record per report and per evaluation, and last the result or "stopped"."""
        worker, plan, world, ranks = self.worker, self.worker.plan, self.world, self.config.ranks
        # An elastic job survives the loss of ranks, which Horovod detects.
        silence_seconds = None if world.elastic else ranks.silence_seconds
        with contextlib.closing(open_watchdog(world, silence_seconds, ranks.stall_seconds)) as self.watchdog:
            self._broadcast()
            worker.learner.refresh()
            yield from self._begin()
            cycle, outcome = plan.first_cycle - 1, None
            self._commit(cycle)
            if worker.evaluation_due:
                worker.evaluation_due = False
                outcome = yield from self._evaluate_at(cycle, checkpoints)
            while outcome is None and cycle < plan.cycles - 1:
                cycle += 1
                self.watchdog.beat(f"cycle {cycle:,}")
                worker.step(cycle)
                if plan.ends_warm_up_at(cycle):
                    for text in worker.unused_ranges(cycle):
                        yield Record("message", {}, text)
                votes, learns = plan.votes_at(cycle), plan.learns_at(cycle)
                if votes or learns:
                    self._finish_phase()
                stopping, changed = self._vote() if votes else (False, False)
                if learns:
                    worker.begin_phase(cycle)
                if plan.finishes_phase_at(cycle) or stopping:
                    self._finish_phase()
                if plan.checks_drift_at(cycle):
                    self._check_drift(f"after {plan.total_steps_after(cycle):,} total steps")
                if plan.reports_at(cycle):
                    row = worker.report(cycle)
                    yield Record("report", row)
                    yield from self._tell_news(row, cycle)
                    yield from self._warnings()
                if plan.evaluates_at(cycle):
                    if plan.saves_before_evaluation_at(cycle):
                        yield from self._save(cycle, checkpoints, evaluation_due=True)
                    outcome = yield from self._evaluate_at(cycle, checkpoints)
                if plan.checkpoints_at(cycle) and outcome is None:
                    yield from self._save(cycle, checkpoints)
                if outcome is None and stopping:
                    outcome = yield from self._stop_at(cycle, checkpoints)
                elif outcome is None and votes:
                    self._commit(cycle)
                    if changed:
                        raise RanksChanged
            if outcome is None:
                outcome = yield from self._evaluate_finally(cycle, checkpoints)
            if outcome.kind == "result":
                yield from self._save(cycle, checkpoints, finished=True)
            yield outcome

    def _begin(self) -> Iterator[Record]:
        """Starts the episodes, and reports what was restored of an earlier run. A collective if a run is resumed."""
        for text in self.worker.messages:
            yield Record("message", {}, text)
        self.worker.messages.clear()
        began, self._began = self._began, True
        if began:  # in an earlier generation of this job, which may have come further than this one's snapshot
            self._saved_at = -1
            return
        lost = self.worker.begin_episodes()
        if lost is not None and (lost := int(self.world.sum(np.array([lost]))[0])):
            envs = self.worker.plan.envs
            yield Record("message", {}, f"{lost} of {envs} environments start new episodes: they cannot be restored.")

    def _warnings(self) -> Iterator[Record]:
        """What this rank's environments noticed. No collective: each rank has its own, and the chief shows its own."""
        for envs in (self.worker.envs, self.worker.evaluator.envs):
            for text in envs.warnings:
                yield Record("warning", {}, text)
            envs.warnings.clear()

    def _vote(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether the hosts have changed. A collective."""
        with self.worker.ledger.communicating():
            stops, changed = self.world.max(np.array([float(self._stop()), float(self.world.changed)]))
        return bool(stops), bool(changed)

    def _commit(self, cycle: int) -> None:
        """Keeps in memory what the ranks share, so that the job can continue after losing ranks. A collective."""
        if self.world.elastic:
            self._finish_phase()
            worker, total_steps = self.worker, self.worker.plan.total_steps_after(cycle)
            state = worker.state(total_steps, finished=False)
            self.committed = Snapshot(Path(), total_steps, self.world.size, False, state, worker.learner.state(), {})

    def _check_drift(self, when: str) -> None:
        check_drift(self.world, self.worker.learner.variables, when, self.worker.shared())

    def _tell_news(self, row: Row, cycle: int) -> Iterator[Record]:
        """What a run tells once. A collective: `row` and what was told are the same on all ranks."""
        worker = self.worker
        if worker.is_endless_after(cycle):
            yield from self._tell_of_endless_episodes(cycle)
        if row.get("held_readings") and "held" not in worker.told:
            worker.told.append("held")
            first = [each for each in self.world.gather(worker.first_held) if each]
            yield Record(
                "message",
                {},
                f"{row['held_readings']:,.0f} readings were not finite by {row['total_steps']:,.0f} total steps, and the last "
                f"finite ones were held. The first: {', '.join(first[:1])}. metrics.csv counts them as held_readings.",
            )

    def _tell_of_endless_episodes(self, cycle: int, then: str = "") -> Iterator[Record]:
        plan, told = self.worker.plan, self.worker.told
        if "endless" not in told:
            told.append("endless")
            yield Record(
                "message",
                {},
                f"No episode has ended yet, in {plan.total_steps_after(cycle) // plan.envs:,} steps of each environment."
                f"{then} Give episodes a limit with --env.max-episode-steps, or those of evaluations with "
                "--evaluation.max-episode-steps.",
            )

    def _finish_phase(self) -> None:
        """Finishes the current phase, if any: either all ranks have one or none. A collective.

        Raises JobError, on all ranks, if an update was skipped and `learner.on_nonfinite` is "stop".
        """
        phase = self.worker.finish_phase()
        if phase is None:
            return
        self._learned(self.worker)
        if self.config.learner.on_nonfinite == "skip" or not phase.any_skipped:
            return
        total_steps = self.worker.plan.total_steps_after(self.worker.learned_at)
        nonfinite, skipped = np.array(self.world.gather((phase.nonfinite, phase.skipped))).T
        what, ranks = ("loss", nonfinite) if nonfinite.any() else ("gradient", skipped)
        raise JobError(
            f"The {what} on rank {', '.join(map(str, np.flatnonzero(ranks)))} is not finite after {total_steps:,} total steps: "
            f"{skipped.max()} of {phase.skipped + phase.updates} updates were skipped, so all weights are finite. "
            "Lower --learner.learning-rate or --env.reward-scale, or skip such updates with --learner.on-nonfinite skip."
            + (
                f" Gradients above {largest_gradient(self.world.size, self.world.elastic):,.0f} do not fit "
                "--ranks.compression fp16."
                if self.config.ranks.compression == "fp16" and self.world.size > 1
                else ""
            )
        )

    def _evaluate_at(self, cycle: int, checkpoints: Checkpoints) -> Generator[Record, None, Record | None]:
        """An evaluation, and a longer one to confirm that the target is reached. Returns a record if the run ends."""
        row = yield from self._evaluate(cycle)
        if row is None:
            return (yield from self._stop_at(cycle, checkpoints, evaluation_due=True))
        yield Record("evaluation", row)
        if self.worker.cut_short:
            return None
        yield from self._remember(row, cycle, checkpoints)
        if not self.world.any(self._reaches_target(row)):
            return None
        # This may be the last evaluation.
        yield from self._save(cycle, checkpoints, evaluation_due=True)
        # With other episodes than those that reached the target.
        row = self.worker.evaluate(cycle, self.config.evaluation.final_episodes, first=self.config.evaluation.episodes)
        if row is None:
            return (yield from self._stop_at(cycle, checkpoints, evaluation_due=True))
        yield Record("evaluation", row)
        if not self.world.any(self._reaches_target(row)):
            return None
        self._check_drift("at the end of the run")
        yield from self._remember(row, cycle, checkpoints)
        return Record("result", row)

    def _evaluate(self, cycle: int, final: bool = False) -> Generator[Record, None, Row | None]:
        """An evaluation, cut short until an episode of training has ended. None if a rank was asked to stop."""
        evaluation, longest = self.config.evaluation, self.worker.longest_episode()
        if longest is not None and longest < evaluation.max_episode_steps:
            yield from self._tell_of_endless_episodes(
                cycle,
                f" Until one does, episodes of evaluations are cut off after {longest:,} steps, and such evaluations count "
                "neither as the best nor for evaluation.target_return.",
            )
        return self.worker.evaluate(cycle, evaluation.final_episodes if final else evaluation.episodes, longest=longest)

    def _evaluate_finally(self, cycle: int, checkpoints: Checkpoints) -> Generator[Record, None, Record]:
        self._check_drift("at the end of the run")
        yield from self._save(cycle, checkpoints)
        row = yield from self._evaluate(cycle, final=True)
        if row is None:
            return (yield from self._stop_at(cycle, checkpoints))
        yield Record("evaluation", row)
        if not self.worker.cut_short:
            yield from self._remember(row, cycle, checkpoints)
        return Record("result", row)

    def _stop_at(
        self, cycle: int, checkpoints: Checkpoints, evaluation_due: bool = False
    ) -> Generator[Record, None, Record]:
        total_steps = self.worker.plan.total_steps_after(cycle)
        yield from self._save(cycle, checkpoints, evaluation_due=evaluation_due)
        if self._saved_at != total_steps:
            raise JobError(
                f"Asked to stop after {total_steps:,} total steps, and no checkpoint could be written: --resume continues "
                "from an earlier checkpoint, if there is one."
            )
        return Record("stopped", {"total_steps": total_steps, "seconds": self.worker.ledger.seconds})

    def _reaches_target(self, row: Row) -> bool:
        target = self.config.evaluation.target_return
        return target is not None and row["return_mean"] >= target

    def _remember(self, row: Row, cycle: int, checkpoints: Checkpoints) -> Iterator[Record]:
        """Keeps the best evaluation and its weights. Of equal ones it keeps the newer, which has learned longer."""
        worker, before = self.worker, self.worker.best
        if before is not None and row["return_mean"] < before[0]:
            return
        worker.best = (row["return_mean"], int(row["total_steps"]))
        saved = yield from self._save(cycle, checkpoints, only_weights=True)
        if not saved:
            worker.best = before

    def _save(
        self,
        cycle: int,
        checkpoints: Checkpoints,
        *,
        only_weights: bool = False,
        evaluation_due: bool = False,
        finished: bool = False,
    ) -> Generator[Record, None, bool]:
        """A resumable checkpoint, or `only_weights` for evaluation. Returns whether it was written. A collective.

        If there is a resumable one of this cycle already, only evaluations have happened since: what they changed is amended.
        """
        worker, total_steps = self.worker, self.worker.plan.total_steps_after(cycle)
        worker.evaluation_due = evaluation_due
        self.watchdog.beat(f"a checkpoint at {total_steps:,} total steps")
        state, best = worker.state(total_steps, finished), None if worker.best is None else worker.best[1]
        began, written = perf_counter(), 0
        try:
            with worker.ledger.timed("save"):
                if self._saved_at == total_steps:
                    checkpoints.amend(total_steps, state, best=best)
                else:
                    written = checkpoints.save(
                        total_steps,
                        worker.learner.state(),
                        state,
                        part=worker.part() if self.config.checkpoint.save_replay and not only_weights else None,
                        resumable=not only_weights,
                        best=best,
                    )
        except JobError as error:
            if self.config.checkpoint.on_failure == "stop":
                raise JobError(f"{error} Free space and use --resume.") from None
            yield Record("warning", {}, f"{error} The run continues without it.")
            if worker.best is not None and worker.best[1] == total_steps and self._saved_at != total_steps:
                worker.best = None  # its weights were deleted for the checkpoint that failed
            return False
        if not only_weights and self._saved_at != total_steps:
            self._saved_at = total_steps
            size = f"{written / 1e6:,.1f} MB in {perf_counter() - began:.2f} s"
            yield Record("message", {}, f"checkpoint at {total_steps:,} total steps: {size}")
        return True

    def close(self) -> None:
        self.worker.close()
