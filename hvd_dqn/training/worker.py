"""One rank's part of a run: it acts, stores transitions, learns, and can be saved and restored."""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, Literal

import numpy as np

from hvd_dqn.agent.actor import Actor
from hvd_dqn.agent.learner import Phase
from hvd_dqn.agent.preprocess import merge
from hvd_dqn.agent.prioritized import PrioritizedReplay
from hvd_dqn.agent.replay import Draw, Replay
from hvd_dqn.config import Config
from hvd_dqn.envs.environments import Environments
from hvd_dqn.envs.vector import short
from hvd_dqn.envs.wrapping import described
from hvd_dqn.errors import InputError, RunError
from hvd_dqn.ranks.limits import available_memory
from hvd_dqn.ranks.world import Solo, World
from hvd_dqn.storage.arrays import UNREADABLE
from hvd_dqn.storage.checkpoint import Damaged, Snapshot, small
from hvd_dqn.storage.resharding import deal, gather_state, survey
from hvd_dqn.training.build import (
    counted,
    make_environments,
    make_evaluator,
    make_learner,
    make_preprocess,
    make_replay,
    make_rewards,
    make_statistics,
    replay_memory,
    restore_weights,
)
from hvd_dqn.training.ledger import COUNTED, Ledger, Row
from hvd_dqn.training.memory import PART_BYTES, bytes_per_update, check_memory, memory_of_rank, updates_per_part
from hvd_dqn.training.plan import Plan

# Observations per rank whose numbers are compared with the range that their space declares.
COMPARED = 4096

# A run tells if no episode has ended after so many steps of each environment. Longer than most: Pong's have 1,700.
ENDLESS_STEPS = 5_000
# Until an episode has ended, those of evaluations are cut off here: the limit of most of Gymnasium's environments.
ENDLESS_EVALUATION_STEPS = 1_000
# Random streams of a rank. Never change these numbers: a seed would give other runs.
ACTING, SAMPLING, ENVIRONMENTS, WEIGHTS = range(4)


class Worker:
    """Environments, replay, networks and statistics of one rank, and its progress.

    Continues from `snapshot`: exactly if the layout is the same, else with its weights and transitions. A worker that
    `joins` others during training has only their weights and counters. Raises InputError if the settings are impossible
    or the snapshot does not fit. Every step of an evaluation calls `stop` and `beat`.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        snapshot: Snapshot | None = None,
        *,
        joins: bool = False,
        stop: Callable[[], bool] = lambda: False,
        beat: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self.config, self.world, self._beat = config, world, beat
        resumed_at = snapshot.total_steps if snapshot else 0
        empty: Literal["no", "all"] = "all" if snapshot and not snapshot.complete else "no"
        self.plan = Plan(config, world.size, resumed_at, "joined" if joins else empty, _learns_from(snapshot))
        _check_not_finished(self.plan, snapshot)
        self.envs = make_environments(config, world, self.plan.envs_per_rank, config.env.vectorization)
        self.statistics, self.preprocess = make_statistics(config, self.envs), make_preprocess(config, self.envs)
        self.rewards = make_rewards(config, self.envs.copies)
        planned = self.plan.updates_after(self.plan.cycles - 1)
        self.learner = make_learner(config, self.envs, self.preprocess, world, self._rng(WEIGHTS), planned)
        self.actor = Actor(
            self.learner.acting.q_values, self.envs.choices, self._rng(ACTING), config.agent.epsilon_zeta
        )
        # A rank that joins need not share the available memory: its neighbours have allocated theirs already.
        self._sharers = 1 if joins else world.local_size
        self._update_bytes = self._bytes_per_update()
        self.replay = self._make_replay(self.plan.slots_per_env)
        self.ledger = Ledger(world, counted(config))
        self.evaluator = make_evaluator(config, world, self._evaluated_q_values, stop)
        _check_one_environment(self.envs, self.evaluator.envs)
        self._thread = ThreadPoolExecutor(1, "learner") if config.learner.overlap else None
        self._phase: Callable[[], Phase] | None = None  # the current phase
        self._drawn: Draw  # its transitions, if they have priorities
        self.learned_at = -1  # the cycle in which that phase began
        self.updates = 0
        self.best: tuple[float, int] | None = None  # (mean return, total steps) of the best evaluation
        self.evaluation_due = False  # whether the last cycle's evaluation is still to be made
        self.any_ended = False  # whether the ranks know that an episode of training has ended
        self._ended_here = False  # whether one has on this rank
        self.cut_short = False  # whether the last evaluation was: see `longest_episode`
        self.told: list[str] = []  # what was told once: the keys of messages
        self._restored: np.ndarray | None = None  # [E] whether each copy was restored
        self.messages: list[str] = []  # what was restored of an earlier run, for display
        if config.checkpoint.save_replay:
            self.envs.probe()
        if snapshot:
            self._restore(snapshot)

    def _rng(self, stream: int) -> np.random.Generator:
        # A resumed run that cannot continue exactly must not repeat the random numbers of its start.
        key = (self.world.rank, stream, *([self.plan.resumed_at] if self.plan.resumed_at else []))
        return np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=key))

    def _make_replay(self, slots: int) -> Replay | PrioritizedReplay:
        copies = self.plan.envs_per_rank
        check_memory(
            memory_of_rank(
                replay_memory(self.config, self.envs, slots),
                self._updates_together(self.plan.most_updates),
                self._update_bytes,
                sum(math.prod(variable.shape) for variable in self.learner.online.variables),
            ),
            self._sharers,
            available_memory(self._sharers),
            f"{copies} environments x {slots} observations per rank",
        )
        return make_replay(self.config, self.envs, slots, self._rng(SAMPLING))

    def _bytes_per_update(self) -> int:
        frames, envs = self.envs.frames, self.envs
        return bytes_per_update(
            self.plan.batch_per_rank * self.plan.passes,
            frames.stack * math.prod(frames.shape) * frames.dtype.itemsize,
            math.prod(envs.choices.shape),
            envs.actions if envs.masked else 0,
        )

    def _updates_together(self, updates: int) -> int:
        """How many updates of a phase have their minibatches in memory at a time. The same on all ranks."""
        # Updates that overlap acting need all of them at its begin: meanwhile the replay goes on.
        return updates if self.config.learner.overlap else updates_per_part(updates, self._update_bytes)

    def _evaluated_q_values(self, observation: np.ndarray) -> np.ndarray:
        self._beat("evaluation")
        return self.learner.online.q_values(observation)

    def begin_episodes(self) -> int | None:
        """Resets the environments and returns None. On an exact resume returns how many were not restored."""
        if self._restored is not None:
            return int(np.count_nonzero(~self._restored))
        self.envs.reset(self._rng(ENVIRONMENTS).integers(2**31, size=self.envs.copies).tolist())
        return None

    def step(self, cycle: int) -> None:
        """One step in each environment."""
        ledger = self.ledger
        with ledger.timed("act"):
            epsilons = self.plan.epsilons_at(cycle, self.world.rank)
            action = self.actor.act(self.envs.observation, epsilons, self.envs.mask)
        with ledger.timed("env"):
            transition, episodes = self.envs.step(action)
        self.replay.add(transition)
        ended, valid = transition.terminated | transition.truncated, transition.valid
        self.actor.end_episodes(ended)
        self.statistics.observe(transition.observation if valid.all() else transition.observation[valid])
        self.rewards.observe(transition.reward, ended, valid)
        ledger.episodes(*episodes)
        self._ended_here |= len(episodes.returns) > 0

    def unused_ranges(self, cycle: int) -> list[str]:
        """What to tell if integer observations stay below a tenth of the range that scales them.

        A collective if there are such observations, which depends on the space alone.
        """
        layout = self.envs.frames.layout
        declared = [
            (part.name, part.divisor.max()) for part in layout.parts if part.declared and part.divisor is not None
        ]
        if not declared:
            return []
        rings = self.replay.arrays()["frames"]
        here = [layout.largest(ring[: math.ceil(COMPARED / len(rings))]) for ring in rings]
        told = []
        for (name, most), (largest, quotient) in zip(declared, self.world.max(np.max(here, axis=0)), strict=True):
            if most >= 10 and quotient < 0.1:
                named = f" `{name}`" if name else ""
                told.append(
                    f"Observations{named} of {self.config.env.id} stay below a tenth of what their space declares: at most "
                    f"{largest:g} of {most:g} in {self.plan.total_steps_after(cycle):,} total steps, and the "
                    f"network sees them divided by that. If that is their range, set --env.observation_scale {largest:g}."
                )
        return told

    def begin_phase(self, cycle: int) -> None:
        """Draws the minibatches of a phase. A collective.

        Its updates run in `finish_phase` or, if they overlap acting, in a thread from now on.
        """
        plan, updates = self.plan, self.plan.updates_at(cycle)
        with self.ledger.communicating():
            merge((self.statistics, self.rewards), self.world.sum)
        self.use_statistics()
        with self.ledger.timed("sample"):
            draw = self.replay.draw(updates, plan.batch_per_rank * plan.passes, self.rewards.learned)
        if isinstance(self.replay, PrioritizedReplay):
            with self.ledger.communicating():
                draw = self._drawn = self.replay.weighted(draw, plan.importance_at(cycle), self.world.max)
        with self.ledger.timed("sample"):
            together = self._updates_together(updates)
            update: Callable[..., Phase] = self.learner.update
            work: Any
            if together == updates:
                work = self.replay.gather(draw)
            else:  # each part is gathered when its turn comes, in `finish_phase` and before the replay changes
                begins = range(0, updates, together)
                work = (self.replay.gather(draw.part(begin, begin + together)) for begin in begins)
                update = self.learner.update_in_parts
        settings = plan.learning_rate_at(cycle), plan.target_copies_at(cycle)
        if self._thread is None:
            self._phase = functools.partial(update, work, *settings)
        else:
            self.learner.sync_acting_weights()
            self._phase = self._thread.submit(update, work, *settings).result
        self.updates, self.learned_at = self.updates + updates, cycle

    def use_statistics(self) -> None:
        """Gives the statistics to those who need them. Call it when they have changed."""
        self.preprocess.set_statistics(self.statistics.mean, self.statistics.scale)
        neutral = self.envs.frames.layout.neutral(self.statistics.mean)
        self.envs.readings.neutral = self.evaluator.envs.readings.neutral = neutral

    def finish_phase(self) -> Phase | None:
        """The result of the current phase; None if there is none. A collective."""
        if self._phase is None:
            return None
        update, self._phase = self._phase, None
        began = perf_counter()
        phase = update()
        waited = perf_counter() - began
        if isinstance(self.replay, PrioritizedReplay):
            assert phase.priority is not None
            with self.ledger.timed("sample"):
                self.replay.update_priorities(self._drawn, phase.priority)
        # Of a phase that overlaps acting only the end is waited for.
        allreduce_seconds = phase.allreduce_seconds * min(1.0, waited / phase.seconds)
        self.ledger.phase(
            phase.updates, phase.loss, phase.mean_q, phase.gradient_norm, phase.skipped, waited, allreduce_seconds
        )
        return phase

    def report(self, cycle: int) -> Row:
        """The row of metrics.csv. A collective."""
        happened = self.envs.take_unreported() + self.evaluator.envs.take_unreported()
        row = self.ledger.report(
            total_steps=self.plan.total_steps_after(cycle),
            cycle=cycle,
            updates=self.updates,
            epsilon=self.plan.epsilon_at(cycle),
            learning_rate=self.plan.learning_rate_at(cycle),
            replay_size=len(self.replay),
            counts=dict(zip(COUNTED, happened.tolist(), strict=True)),
        )
        self.any_ended |= row["episodes"] > 0
        return row

    def is_endless_after(self, cycle: int) -> bool:
        """Whether no episode has ended for so long that it is worth a message. The same on all ranks after a report."""
        steps = self.plan.total_steps_after(cycle) // self.plan.envs
        return not self.any_ended and self.envs.step_limit is None and steps >= ENDLESS_STEPS

    def longest_episode(self) -> int | None:
        """Where evaluation episodes are cut off while no episode of training has ended; None afterwards. A collective.

        Nothing is known then of how long episodes are, and 20 of 27,000 steps would take most of a run's time.
        """
        if self.envs.step_limit is not None:
            return None
        if not self.any_ended:
            self.any_ended = self.world.any(self._ended_here)
        return None if self.any_ended else ENDLESS_EVALUATION_STEPS

    @property
    def first_held(self) -> str | None:
        """Tells of a reading that was held on this rank."""
        return self.envs.readings.first_held or self.evaluator.envs.readings.first_held

    def evaluate(self, cycle: int, episodes: int, first: int = 0, longest: int | None = None) -> Row | None:
        """The row of evaluations.csv; None if a rank was asked to stop. A collective.

        `cut_short` then tells whether an episode was cut off after `longest` steps.
        """
        total_steps = self.plan.total_steps_after(cycle)
        with self.ledger.timed("evaluate"):
            row = self.evaluator.evaluate(episodes, round=total_steps, first=first, max_length=longest)
        self.cut_short = self.evaluator.cut_short
        return None if row is None else {"total_steps": total_steps, "seconds": self.ledger.seconds, **row}

    def describe(self) -> dict[str, str]:
        """The plan, and facts that depend on the environment, for display."""
        parameters = sum(int(np.prod(variable.shape)) for variable in self.learner.online.variables)
        compiled = ", compiled by XLA" if self.learner.compiled else ""
        rows = self.plan.describe()
        rows["observations"] = self.envs.frames.layout.describe()
        rows["network"] = f"{self.config.agent.network}, {parameters:,} parameters{compiled}"
        action_map = self.envs.action_map
        if self.envs.masked or len(action_map.dimensions) > 1:
            rows["actions"] = f"{action_map}" + ("; masks are used" if self.envs.masked else "")
        rows["replay"] += f", {self.replay.nbytes / 1e6:,.0f} MB"
        updates = self.plan.most_updates
        together = self._updates_together(updates)
        if updates * self._update_bytes > PART_BYTES:
            whole = f"{updates * self._update_bytes / 1e9:,.1f} GB"
            rows["minibatches"] = f"{whole} per phase" + (
                ", all in memory: --learner.overlap needs them at its begin; a shorter --learner.train_period needs less"
                if together == updates
                else f", of which {together * self._update_bytes / 1e6:,.0f} MB are in memory at a time"
            )
        if self.config.env.wrappers:
            rows["wrappers"] = ", ".join(map(described, self.config.env.wrappers))
        if self.envs.notes:
            rows["note"] = " ".join(self.envs.notes)
        if not self.config.checkpoint.save_replay:
            rows["after a resume"] = "the replay is filled again"
        elif self.envs.restorable:
            rows["after a resume"] = "the run continues exactly"
        else:
            rows["after a resume"] = f"new episodes begin: {self.config.env.id} cannot be saved"
        return rows

    def environment(self) -> dict[str, str]:
        """What the shapes of networks and of minibatches depend on, by name."""
        envs = self.envs
        return {
            "observation space": str(envs.observation_space),
            "action space": str(envs.action_space),
            "use of action masks": "they are used" if envs.masked else "none are found",
        }

    def state(self, total_steps: int, finished: bool) -> dict[str, Any]:
        """What all ranks share, besides the weights."""
        return {
            "total_steps": total_steps,
            "updates": self.updates,
            "best": self.best,
            "evaluation_due": self.evaluation_due,
            "finished": finished,
            "learns_from": self.plan.learns_from,
            "layout": self._layout(),
            "ledger": self.ledger.state(),
            "normalizer": self.statistics.state(),
            "rewards": self.rewards.state(),
            "any_ended": self.any_ended,
            "told": self.told,
        }

    def shared(self) -> dict[str, np.ndarray]:
        """What must be equal on all ranks, besides the learner's variables, by name."""
        parts = {"observations": self.statistics.shared(), "rewards": self.rewards.shared()}
        return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}

    def part(self) -> dict[str, Any]:
        """The state of this rank alone."""
        return {
            "replay": self.replay.state(),
            "envs": self.envs.state(),
            "actor": self.actor.state(),
            "window": self.ledger.window_state(),
            "normalizer": self.statistics.pending_state(),
            "rewards": self.rewards.pending_state(),
            "evaluation_restarts": self.evaluator.envs.restarted,
        }

    def _layout(self) -> dict[str, float]:
        """The values that must be unchanged for an exact resume."""
        return layout(self.config, self.world.size)

    def regroup(self, snapshot: Snapshot, joined: bool) -> None:
        """Continues from `snapshot` with the current ranks. Environments and replay are kept."""
        before, now = self.plan.size, self.world.size
        empty: Literal["no", "joined"] = "joined" if joined else "no"
        self.plan = Plan(self.config, now, snapshot.total_steps, empty, _learns_from(snapshot))
        self._take_over(snapshot)
        text = (
            f"{before} rank{'s' * (before > 1)} before, {now} now. Continuing from {snapshot.total_steps:,} total steps"
        )
        if now <= before:
            text += f", and at most {len(self.replay):,} transitions of each rank that was lost are missing"
        self.messages.append(text + ("." if not joined else ". A rank that joined begins with an empty replay."))

    def _restore(self, snapshot: Snapshot) -> None:
        try:
            self._take_over(snapshot)
            if not snapshot.complete:
                self.messages.append("The replay was not saved: it is filled again before learning continues.")
            elif snapshot.state["layout"] == self._layout():
                self._restore_part(snapshot)
            else:
                self._reshard(snapshot)
        except Damaged as damage:
            raise InputError(f"The checkpoint {snapshot.path} cannot be taken over: {damage}.") from None
        except (InputError, RunError):
            raise
        except UNREADABLE as error:
            raise _unfit(snapshot, error) from error

    def _take_over(self, snapshot: Snapshot) -> None:
        """What all ranks share."""
        restore_weights(self.learner, self.preprocess, self.statistics, self.rewards, snapshot)
        self.use_statistics()
        state = snapshot.state
        self.any_ended, self.told = bool(state["any_ended"]), [str(key) for key in state["told"]]
        self.updates = int(state["updates"])
        self.best = None if state["best"] is None else (float(state["best"][0]), int(state["best"][1]))
        self.evaluation_due = bool(state["evaluation_due"])
        self.ledger.load_state(state["ledger"])

    def _restore_part(self, snapshot: Snapshot) -> None:
        part = snapshot.part(self.world.rank)
        replay = part.pop("replay")
        slots = int(replay["slots"])
        if slots != self.plan.slots_per_env:  # resharded for another number of ranks, which may need larger rings
            self.replay = self._make_replay(slots)
        self.replay.load_state(replay)
        part = small(part)
        self.actor.load_state(part["actor"])
        self.ledger.load_window_state(part["window"])
        self.statistics.load_pending_state(part["normalizer"])
        self.rewards.load_pending_state(part["rewards"])
        self.evaluator.envs.restarted = int(part["evaluation_restarts"])
        self._restored = self.envs.load_state(part["envs"])
        for ends in (self.replay.truncate_episodes, self.actor.end_episodes, self.rewards.end_episodes):
            ends(~self._restored)

    def _reshard(self, snapshot: Snapshot) -> None:
        """Takes this rank's share of all transitions, if the number of ranks or the size of the rings has changed."""
        plan, capacity = self.plan, self.config.replay.capacity
        # Alone unless the ranks have shared the reading: see `surveyed`.
        found = snapshot.survey or survey(snapshot, Solo(), self.config.env.frame_stack)
        dealt = deal(
            found.episodes,
            plan.envs,
            plan.slots_per_env,
            self.config.env.frame_stack,
            limit=plan.slots_per_env if capacity < int(snapshot.state["layout"]["capacity"]) else None,
        )
        self.replay = self._make_replay(dealt.slots)
        first, mine = self.world.rank * plan.envs_per_rank, self.replay.state()
        rings = range(first, first + plan.envs_per_rank)
        state = gather_state(dealt, rings, found.replays, mine["rng"], into=self.replay.arrays())
        if snapshot.state["layout"]["priority_exponent"] != self.config.replay.priority_exponent:
            state.pop("priorities", None)  # in another scale: all transitions are like new ones
        self.replay.load_state(state)
        self.messages.append(dealt.describe(plan.size) + ". New episodes begin.")

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False)  # if this rank failed during a phase, do not wait for its end
        self.envs.close()
        self.evaluator.close()


def layout(config: Config, size: int) -> dict[str, float]:
    """What must be unchanged for an exact resume."""
    ranks = size if config.ranks.scaling == "strong" else 1
    envs_per_rank = config.env.envs_per_rank // ranks
    return {
        "ranks": size,
        "envs_per_rank": envs_per_rank,
        "capacity": config.replay.capacity,
        "priority_exponent": config.replay.priority_exponent,
    }


def surveyed(snapshot: Snapshot, config: Config, world: World) -> Snapshot:
    """The checkpoint with a survey of its replays if their transitions are to be redistributed. A collective then."""
    if not snapshot.complete or snapshot.state.get("layout") == layout(config, world.size):
        return snapshot
    return snapshot._replace(survey=survey(snapshot, world, config.env.frame_stack))


def _check_one_environment(training: Environments, evaluation: Environments) -> None:
    """Raises InputError unless both have the same spaces: otherwise what is learned would be measured on another task."""
    for what, mine, theirs in (
        ("observations", training.observation_space, evaluation.observation_space),
        ("actions", training.action_space, evaluation.action_space),
    ):
        if mine != theirs:
            raise InputError(
                f"Training and evaluation must see the same {what} of {training.id}. Received: {short(mine)} in training and "
                f"{short(theirs)} in evaluation. The environment must declare the same spaces whenever it is made."
            )


def _learns_from(snapshot: Snapshot | None) -> int:
    """The total steps at which the saved run starts to learn; 0 without one. Raises InputError."""
    if snapshot is None:
        return 0
    try:
        return int(snapshot.state["learns_from"])
    except UNREADABLE as error:
        raise _unfit(snapshot, error) from error


def _unfit(snapshot: Snapshot, error: BaseException) -> InputError:
    return InputError(
        f"The checkpoint {snapshot.path} was not made by this version or for these settings: "
        f"{type(error).__name__}: {error}."
    )


def _check_not_finished(plan: Plan, snapshot: Snapshot | None) -> None:
    if snapshot is not None and plan.first_cycle >= plan.cycles and snapshot.state.get("finished", True):
        raise InputError(
            f"There is nothing left to train: the run has already taken {plan.resumed_at:,} total steps. "
            f"Raise --total-steps above that. Received: {plan.total_steps:,}."
        )
