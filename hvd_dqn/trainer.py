"""The training loop: the same program on one rank and on many."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from hvd_dqn.actor import Actor
from hvd_dqn.arrays import UNREADABLE
from hvd_dqn.checkpoint import Checkpoints, Damaged, Snapshot, small
from hvd_dqn.config import Config
from hvd_dqn.distributed import BroadcastHook, World, check_drift, in_step
from hvd_dqn.envs import Environments
from hvd_dqn.errors import InputError, JobError, RanksChanged, RunError
from hvd_dqn.evaluation import Evaluator
from hvd_dqn.learner import Learner, Phase
from hvd_dqn.metrics import Ledger, Row
from hvd_dqn.networks import build_network
from hvd_dqn.normalizer import Normalizer, NullNormalizer
from hvd_dqn.plan import Plan
from hvd_dqn.replay import Replay
from hvd_dqn.resharding import deal, gather_state
from hvd_dqn.watchdog import NullWatchdog, Watchdog, open_watchdog

# Random streams of a rank. A number, once given, stays: it is part of what a seed means.
ACTING, SAMPLING, ENVIRONMENTS, WEIGHTS, EVALUATING = range(5)


class Record(NamedTuple):
    """One record of the run; equal on all ranks."""

    kind: Literal["report", "evaluation", "message", "stopped", "result"]
    row: Row
    text: str = ""


class Trainer:
    """All that one rank owns of a run. Raises InputError where the settings cannot be carried out.

    `stop` tells whether this rank was asked to stop; the ranks vote on it at fixed cycles. A rank that `joins` the others
    takes over the weights and counters of their `snapshot`.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        snapshot: Snapshot | None = None,
        stop: Callable[[], bool] = lambda: False,
        *,
        joins: bool = False,
    ) -> None:
        self.config, self.world, self._stop = config, world, stop
        resumed_at = snapshot.total_steps if snapshot else 0
        empty: Literal["no", "all"] = "all" if snapshot and not snapshot.complete else "no"
        self.plan = Plan(config, world.size, resumed_at, "joined" if joins else empty)
        _check_not_finished(self.plan, snapshot)
        self.envs = make_environments(
            config, world, self.plan.envs_per_rank, config.env.vectorization, config.env.restart_failed_envs
        )
        self.normalizer = make_normalizer(config, self.envs)
        self.learner = make_learner(config, self.envs, world, self._rng(WEIGHTS))
        self.actor = Actor(self._q_values, self.envs.actions, self._rng(ACTING), config.agent.epsilon_zeta)
        self.replay = self._make_replay(self.plan.slots_per_env)
        self.ledger = Ledger(world)
        self.evaluator = make_evaluator(config, world, self._evaluated_q_values, self._rng(EVALUATING), stop)
        self.watchdog: Watchdog | NullWatchdog = NullWatchdog()
        self.updates = 0
        self.best: tuple[float, int] | None = None  # (mean return, total steps) of the best evaluation
        self._evaluation_due = False  # of the cycle before the first, where the run was stopped in it
        self._saved_at = -1  # the total steps of the last checkpoint to go on from
        self._restored: np.ndarray | None = None  # [E] the copies that stand where they stood
        self._began = False
        self._news: list[str] = []
        self.committed: Snapshot | None = None  # what an elastic job goes on from when it loses ranks
        if config.checkpoint.save_replay:
            self.envs.probe()
        if snapshot:
            self._restore(snapshot)
        self.broadcast = BroadcastHook(world, self.learner.variables)

    def _rng(self, stream: int) -> np.random.Generator:
        # A resumed run that cannot go on exactly draws new numbers instead of the first ones again.
        key = (self.world.rank, stream, *([self.plan.resumed_at] if self.plan.resumed_at else []))
        return np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=key))

    def _make_replay(self, slots: int) -> Replay:
        config = self.config
        return Replay(
            slots,
            self.plan.envs_per_rank,
            self.envs.frame_shape,
            self.envs.frame_dtype,
            self._rng(SAMPLING),
            frame_stack=config.env.frame_stack,
            n_step=config.agent.n_step,
            gamma=config.agent.gamma,
            sharers=self.world.local_size,
        )

    def _q_values(self, observation: np.ndarray) -> np.ndarray:
        return self.learner.online.q_values(self.normalizer(observation))

    def _evaluated_q_values(self, observation: np.ndarray) -> np.ndarray:
        self.watchdog.beat("evaluation")
        return self._q_values(observation)

    def train(self, checkpoints: Checkpoints) -> Generator[Record, None, None]:
        """Runs to the end, yielding a record per report and per evaluation and, last, the result or that it was stopped."""
        plan, world, ranks = self.plan, self.world, self.config.ranks
        # An elastic job outlives its ranks: there Horovod finds out who is gone.
        silence_seconds = None if world.elastic else ranks.silence_seconds
        with open_watchdog(world, silence_seconds, ranks.stall_seconds) as self.watchdog:
            self.broadcast()
            self.learner.online.refresh()
            yield from self._begin()
            self._commit(plan.first_cycle - 1)
            outcome = None
            if self._evaluation_due:
                self._evaluation_due = False
                outcome = yield from self._evaluate_at(plan.first_cycle - 1, checkpoints)
            cycle = plan.first_cycle - 1
            while outcome is None and cycle < plan.cycles - 1:
                cycle += 1
                self.watchdog.beat(f"cycle {cycle:,}")
                self._step(cycle)
                if plan.learns_at(cycle):
                    self._learn(cycle)
                if plan.checks_drift_at(cycle):
                    check_drift(world, self.learner.variables, f"after {plan.total_steps_after(cycle):,} total steps")
                if plan.reports_at(cycle):
                    yield Record("report", self._report(cycle))
                if plan.evaluates_at(cycle):
                    outcome = yield from self._evaluate_at(cycle, checkpoints)
                if plan.checkpoints_at(cycle) and outcome is None:
                    yield from self._save(cycle, checkpoints)
                if plan.votes_at(cycle) and outcome is None and self._vote(cycle):
                    outcome = yield from self._stop_at(cycle, checkpoints)
            if outcome is None:
                check_drift(world, self.learner.variables, "at the end of the run")
                outcome = yield from self._evaluate_finally(cycle, checkpoints)
            if outcome.kind == "result":
                yield from self._save(cycle, checkpoints, finished=True)
            yield outcome

    def _begin(self) -> Iterator[Record]:
        """Starts the episodes, and says how much of an earlier run was found again. A collective."""
        for text in self._news:
            yield Record("message", {}, text)
        self._news.clear()
        began, self._began = self._began, True
        if began:  # in an earlier generation of this job
            return
        if self._restored is None:
            self.envs.reset(self._rng(ENVIRONMENTS).integers(2**31, size=self.envs.copies).tolist())
            return
        lost = int(self.world.sum(np.array([np.count_nonzero(~self._restored)]))[0])
        if lost:
            yield Record(
                "message", {}, f"{lost} of {self.plan.envs} environments start new episodes: they cannot be saved."
            )

    def _vote(self, cycle: int) -> bool:
        """Whether one of the ranks was asked to stop. A collective. Raises RanksChanged, on all, where hosts have changed."""
        stops, changed = self.world.max(np.array([float(self._stop()), float(self.world.changed)]))
        if stops:
            return True
        self._commit(cycle)
        if changed:
            raise RanksChanged
        return False

    def _commit(self, cycle: int) -> None:
        """Keeps in memory what the ranks share, for a job that goes on without those it loses."""
        if self.world.elastic:
            total_steps = self.plan.total_steps_after(cycle)
            state = self._state(total_steps, finished=False)
            self.committed = Snapshot(Path(), total_steps, self.world.size, False, state, self.learner.state(), {})

    def regroup(self, snapshot: Snapshot, joined: bool) -> None:
        """Goes on from `snapshot` with the ranks that there are now; environments and replay stay. No collective."""
        before, now = self.plan.size, self.world.size
        self.plan = Plan(self.config, now, snapshot.total_steps, "joined" if joined else "no")
        self._take_over(snapshot)
        news = (
            f"{before} rank{'s' * (before > 1)} before, {now} now. Going on from {snapshot.total_steps:,} total steps"
        )
        if now <= before:
            news += f", and at most {len(self.replay):,} transitions of each rank that was lost are gone"
        self._news.append(news + ("." if not joined else ". A rank that joined begins with an empty replay."))

    def _step(self, cycle: int) -> None:
        ledger = self.ledger
        with ledger.timed("act"):
            action = self.actor.act(self.envs.observation, self.plan.epsilons_at(cycle, self.world.rank))
        with ledger.timed("env"):
            transition, episodes = self.envs.step(action)
        self.replay.add(transition)
        self.normalizer.observe(transition.observation)
        ledger.episodes(*episodes)

    def _evaluate_at(self, cycle: int, checkpoints: Checkpoints) -> Generator[Record, None, Record | None]:
        """An evaluation, and a longer one to confirm that the target is reached. Returns how the run ends, if it does."""
        row = self._evaluate(cycle, self.config.evaluation.episodes)
        if row is None:
            return (yield from self._stop_at(cycle, checkpoints, evaluation_due=True))
        yield Record("evaluation", row)
        yield from self._remember(row, cycle, checkpoints)
        if not self.world.any(self._reaches_target(row)):
            return None
        row = self._evaluate(cycle, self.config.evaluation.final_episodes)
        if row is None:
            return (yield from self._stop_at(cycle, checkpoints, evaluation_due=True))
        yield Record("evaluation", row)
        if not self.world.any(self._reaches_target(row)):
            return None
        check_drift(self.world, self.learner.variables, "at the end of the run")
        yield from self._remember(row, cycle, checkpoints)
        return Record("result", row)

    def _evaluate_finally(self, cycle: int, checkpoints: Checkpoints) -> Generator[Record, None, Record]:
        row = self._evaluate(cycle, self.config.evaluation.final_episodes)
        if row is None:
            return (yield from self._stop_at(cycle, checkpoints))
        yield Record("evaluation", row)
        yield from self._remember(row, cycle, checkpoints)
        return Record("result", row)

    def _stop_at(
        self, cycle: int, checkpoints: Checkpoints, evaluation_due: bool = False
    ) -> Generator[Record, None, Record]:
        self._evaluation_due = evaluation_due
        if self._saved_at != self.plan.total_steps_after(cycle) or evaluation_due:
            yield from self._save(cycle, checkpoints)
        return Record("stopped", {"total_steps": self.plan.total_steps_after(cycle), "seconds": self.ledger.seconds})

    def describe(self) -> dict[str, str]:
        """The plan and what only the environment tells: for people."""
        parameters = sum(int(np.prod(variable.shape)) for variable in self.learner.online.variables)
        compiled = ", compiled by XLA" if self.learner.compiled else ""
        rows = self.plan.describe()
        rows["network"] = f"{self.config.agent.network}, {parameters:,} parameters{compiled}"
        rows["replay"] += f", {self.replay.nbytes / 1e6:,.0f} MB"
        if not self.config.checkpoint.save_replay:
            rows["after a resume"] = "the replay is filled anew"
        elif self.envs.restorable:
            rows["after a resume"] = "the run goes on exactly"
        else:
            rows["after a resume"] = f"episodes begin anew: {self.config.env.id} cannot be saved"
        return rows

    def _learn(self, cycle: int) -> None:
        plan, updates = self.plan, self.plan.updates_at(cycle)
        self.normalizer.merge(self.world.sum)
        with self.ledger.timed("sample"):
            batch = self.replay.sample(updates, plan.batch_per_rank * plan.passes)
            batch = batch._replace(
                observation=self.normalizer(batch.observation), next_observation=self.normalizer(batch.next_observation)
            )
        with self.ledger.timed("update"):
            phase = self.learner.update(batch, plan.learning_rate_at(cycle), plan.target_copies_at(cycle))
        self.updates += updates
        self.ledger.phase(phase.updates, phase.loss, phase.mean_q, phase.gradient_norm, phase.skipped)
        if self.config.learner.on_nonfinite == "stop":
            self._check_finite(cycle, phase)

    def _check_finite(self, cycle: int, phase: Phase) -> None:
        skipped = phase.skipped > 0
        # Ranks that average gradients skip the same updates; those that average parameters have to ask.
        if not (self.world.any(skipped) if self.config.ranks.sync == "parameters" else skipped):
            return
        culprits = [rank for rank, count in enumerate(self.world.gather(phase.culprits)) if count]
        raise JobError(
            f"The loss or its gradient is not finite after {self.plan.total_steps_after(cycle):,} total steps"
            + (f" (the loss on rank {', '.join(map(str, culprits))})" if culprits else "")
            + f": {phase.skipped} of {phase.skipped + phase.updates} updates were not made, and the weights are sound. "
            "Lower --learner.learning_rate or --env.reward_scale, or skip such updates with --learner.on_nonfinite skip."
        )

    def _report(self, cycle: int) -> Row:
        return self.ledger.report(
            total_steps=self.plan.total_steps_after(cycle),
            cycle=cycle,
            updates=self.updates,
            epsilon=self.plan.epsilon_at(cycle),
            learning_rate=self.plan.learning_rate_at(cycle),
            replay_size=len(self.replay),
        )

    def _evaluate(self, cycle: int, episodes: int) -> Row | None:
        total_steps = self.plan.total_steps_after(cycle)
        row = self.evaluator.evaluate(episodes, round=total_steps)
        return None if row is None else {"total_steps": total_steps, "seconds": self.ledger.seconds, **row}

    def _reaches_target(self, row: Row) -> bool:
        target = self.config.evaluation.target_return
        return target is not None and row["return_mean"] >= target

    def _remember(self, row: Row, cycle: int, checkpoints: Checkpoints) -> Iterator[Record]:
        """Keeps the best evaluation and its weights; of equals the newer, which has learned longer."""
        if self.best is None or row["return_mean"] >= self.best[0]:
            self.best = (row["return_mean"], int(row["total_steps"]))
            yield from self._save(cycle, checkpoints, only_weights=True)

    def _save(
        self, cycle: int, checkpoints: Checkpoints, *, only_weights: bool = False, finished: bool = False
    ) -> Iterator[Record]:
        """A checkpoint to go on from or, `only_weights`, to evaluate. A collective."""
        total_steps = self.plan.total_steps_after(cycle)
        self.watchdog.beat(f"a checkpoint at {total_steps:,} total steps")
        part = self._part() if self.config.checkpoint.save_replay and not only_weights else None
        best = None if self.best is None else self.best[1]
        try:
            saved = checkpoints.save(
                total_steps,
                self.learner.state(),
                self._state(total_steps, finished),
                part=part,
                resumable=not only_weights,
                best=best,
            )
        except JobError as error:
            if self.config.checkpoint.on_failure == "stop":
                raise JobError(f"{error} Make room and go on with --resume.") from None
            yield Record("message", {}, f"{error} The run goes on without it.")
            return
        if not only_weights:
            self._saved_at = total_steps
            size = f"{saved.bytes / 1e6:,.1f} MB in {saved.seconds:.2f} s"
            yield Record("message", {}, f"checkpoint at {total_steps:,} total steps: {size}")

    def _state(self, total_steps: int, finished: bool) -> dict[str, Any]:
        """What all ranks share, besides the weights."""
        return {
            "total_steps": total_steps,
            "updates": self.updates,
            "best": self.best,
            "evaluation_due": self._evaluation_due,
            "finished": finished,
            "layout": {**self._layout(), "slots": self.replay.slots},
            "ledger": self.ledger.state(),
            "normalizer": self.normalizer.state(),
        }

    def _layout(self) -> dict[str, int]:
        """What must be as it was for a run to go on exactly."""
        plan = self.plan
        return {"ranks": plan.size, "envs_per_rank": plan.envs_per_rank, "capacity": self.config.replay.capacity}

    def _part(self) -> dict[str, Any]:
        """What this rank alone has."""
        return {
            "replay": self.replay.state(),
            "envs": self.envs.state(),
            "actor": self.actor.state(),
            "evaluator": self.evaluator.state(),
            "window": self.ledger.window_state(),
            "normalizer": self.normalizer.pending_state(),
        }

    def _restore(self, snapshot: Snapshot) -> None:
        """Takes over a checkpoint: exactly where the layout is the same, else its weights and transitions. No collective.

        Raises InputError where the checkpoint does not fit.
        """
        state = snapshot.state
        try:
            self._take_over(snapshot)
            if not snapshot.complete:
                self._news.append("The replay was not saved: it is filled anew before learning goes on.")
            elif state["layout"] == {**self._layout(), "slots": state["layout"]["slots"]}:
                self._restore_part(snapshot, int(state["layout"]["slots"]))
            else:
                self._deal_anew(snapshot)
        except Damaged as damage:
            raise InputError(f"The checkpoint {snapshot.path} cannot be taken over: {damage}.") from None
        except (InputError, RunError):
            raise
        except UNREADABLE as error:
            raise InputError(
                f"The checkpoint {snapshot.path} was not made by this version or for these settings: "
                f"{type(error).__name__}: {error}."
            ) from error

    def _take_over(self, snapshot: Snapshot) -> None:
        """What all ranks share."""
        restore_weights(self.learner, self.normalizer, snapshot)
        state = snapshot.state
        self.updates = int(state["updates"])
        self.best = None if state["best"] is None else (float(state["best"][0]), int(state["best"][1]))
        self._evaluation_due = bool(state["evaluation_due"])
        self.ledger.load_state(state["ledger"])

    def _restore_part(self, snapshot: Snapshot, slots: int) -> None:
        part = snapshot.part(self.world.rank)
        if slots != self.plan.slots_per_env:  # dealt out anew before, and larger since
            self.replay = self._make_replay(slots)
        self.replay.load_state(part.pop("replay"))
        part = small(part)
        self.actor.load_state(part["actor"])
        self.evaluator.load_state(part["evaluator"])
        self.ledger.load_window_state(part["window"])
        self.normalizer.load_pending_state(part["normalizer"])
        self._restored = self.envs.load_state(part["envs"])
        self.replay.truncate_episodes(~self._restored)

    def _deal_anew(self, snapshot: Snapshot) -> None:
        """Takes its share of the transitions of other ranks, or of rings of another size."""
        plan, capacity = self.plan, self.config.replay.capacity
        shards = [snapshot.part(rank)["replay"] for rank in range(snapshot.ranks)]
        dealt = deal(
            (small({name: shard[name] for name in ("kinds", "ages", "heads", "slots")}) for shard in shards),
            plan.envs,
            plan.slots_per_env,
            self.config.env.frame_stack,
            limit=plan.slots_per_env if capacity < int(snapshot.state["layout"]["capacity"]) else None,
        )
        self.replay = self._make_replay(dealt.slots)
        first, mine = self.world.rank * plan.envs_per_rank, self.replay.state()
        rings = range(first, first + plan.envs_per_rank)
        self.replay.load_state(gather_state(dealt, rings, shards, mine["rng"], into=self.replay.arrays()))
        self._news.append(dealt.describe(plan.size) + ". Episodes begin anew.")

    def close(self) -> None:
        self.envs.close()
        self.evaluator.close()


def _check_not_finished(plan: Plan, snapshot: Snapshot | None) -> None:
    if snapshot is not None and plan.first_cycle >= plan.cycles and snapshot.state.get("finished", True):
        raise InputError(
            f"There is nothing left to train: the run has already taken {plan.resumed_at:,} total steps. "
            f"Raise --total_steps above that. Received: {plan.config.total_steps:,}."
        )


def make_environments(config: Config, world: World, copies: int, vectorization: str, restarts: int = 0) -> Environments:
    env = config.env
    return Environments(
        env.id,
        copies,
        kwargs=env.kwargs,
        vectorization=vectorization,
        frame_stack=env.frame_stack,
        reward_scale=env.reward_scale,
        reward_clip=env.reward_clip,
        first_index=world.rank * copies,
        rank=world.rank,
        restarts=restarts,
    )


def make_normalizer(config: Config, envs: Environments) -> Normalizer | NullNormalizer:
    if not config.env.normalize_observation:
        return NullNormalizer()
    if envs.categories is not None or envs.frame_dtype != np.float32:
        raise InputError(
            "--env.normalize_observation is for observations of real numbers. Received: "
            f"{envs.categories or ''} {'states' if envs.categories else envs.frame_dtype} from {config.env.id}. Turn it off."
        )
    return Normalizer(envs.frame_shape)


def make_learner(config: Config, envs: Environments, world: World, rng: np.random.Generator) -> Learner:
    agent, learner = config.agent, config.learner
    return Learner(
        lambda: build_network(
            agent.network,
            envs.observation_shape,
            envs.categories,
            envs.actions,
            hidden=agent.hidden,
            dueling=agent.dueling,
            rng=rng,
        ),
        world,
        double=agent.double,
        loss=agent.loss,
        sync=config.ranks.sync,
        compression=config.ranks.compression,
        passes=config.ranks.backward_passes_per_step,
        adam_epsilon=learner.adam_epsilon,
        max_gradient_norm=learner.max_gradient_norm,
        xla=learner.xla,
    )


def restore_weights(learner: Learner, normalizer: Normalizer | NullNormalizer, snapshot: Snapshot) -> None:
    """Raises InputError where the checkpoint was made by a network of another shape."""
    try:
        learner.load_state(snapshot.arrays)
        normalizer.load_state(snapshot.state["normalizer"])
    except UNREADABLE as error:
        raise InputError(f"The checkpoint {snapshot.path} does not fit these settings: {error}.") from None


def make_evaluator(
    config: Config,
    world: World,
    q_values: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluator:
    settings, copies = config.evaluation, -(-config.evaluation.episodes // world.size)
    # One by one, not the environment's own vector class: that takes one seed for all its copies.
    mode = "async" if config.env.vectorization == "async" else "sync"
    envs = make_environments(config, world, copies, mode)
    return Evaluator(
        envs,
        Actor(q_values, envs.actions, rng),
        world,
        epsilon=settings.epsilon,
        seed=config.seed,
        max_length=settings.max_episode_steps,
        stop=stop,
    )


def evaluate_snapshot(config: Config, world: World, snapshot: Snapshot) -> Row:
    """Plays the evaluation that `config` describes with the weights of a checkpoint. A collective."""
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(world.rank, EVALUATING)))

    def build() -> tuple[Learner, Evaluator]:
        with contextlib.closing(make_environments(config, world, 1, "sync")) as envs:
            normalizer = make_normalizer(config, envs)
            learner = make_learner(config, envs, world, rng)
        restore_weights(learner, normalizer, snapshot)
        return learner, make_evaluator(config, world, lambda o: learner.online.q_values(normalizer(o)), rng)

    learner, evaluator = in_step(world, build)
    BroadcastHook(world, learner.variables)()
    learner.online.refresh()
    with contextlib.closing(evaluator):
        row = evaluator.evaluate(config.evaluation.episodes, round=0)
    assert row is not None  # nobody asks an evaluation alone to stop
    return {"total_steps": snapshot.total_steps, **row}
