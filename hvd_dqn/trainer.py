"""The training loop: the same program on one rank and on many."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from hvd_dqn.actor import Actor
from hvd_dqn.checkpoint import Checkpoints, Snapshot
from hvd_dqn.config import Config
from hvd_dqn.distributed import BroadcastHook, World, check_drift, in_step
from hvd_dqn.envs import Environments
from hvd_dqn.errors import InputError
from hvd_dqn.evaluation import Evaluator
from hvd_dqn.learner import Learner
from hvd_dqn.metrics import Ledger, Row
from hvd_dqn.networks import build_network
from hvd_dqn.normalizer import Normalizer, NullNormalizer
from hvd_dqn.plan import Plan
from hvd_dqn.replay import Replay

# Random streams of a rank. A number, once given, stays: it is part of what a seed means.
ACTING, SAMPLING, ENVIRONMENTS, WEIGHTS, EVALUATING = range(5)


class Record(NamedTuple):
    """One record of the run; equal on all ranks."""

    kind: Literal["report", "evaluation", "result"]
    row: Row


class Trainer:
    """All that one rank owns of a run. Raises InputError where the settings cannot be carried out."""

    def __init__(self, config: Config, world: World, snapshot: Snapshot | None = None) -> None:
        self.config, self.world = config, world
        self.plan = Plan(config, world.size, resumed_at=snapshot.total_steps if snapshot else 0)
        self.envs = make_environments(config, world, self.plan.envs_per_rank, config.env.vectorization)
        self.normalizer = make_normalizer(config, self.envs)
        self.learner = make_learner(config, self.envs, world, self._rng(WEIGHTS))
        self.actor = Actor(self._q_values, self.envs.actions, self._rng(ACTING), config.agent.epsilon_zeta)
        self.replay = Replay(
            self.plan.slots_per_env,
            self.plan.envs_per_rank,
            self.envs.frame_shape,
            self.envs.frame_dtype,
            self._rng(SAMPLING),
            frame_stack=config.env.frame_stack,
            n_step=config.agent.n_step,
            gamma=config.agent.gamma,
            sharers=world.local_size,
        )
        self.ledger = Ledger(world)
        self.updates = 0
        self.best: tuple[float, int] | None = None  # (mean return, total steps) of the best evaluation
        if snapshot:
            self._restore(snapshot)
        self.broadcast = BroadcastHook(world, self.learner.variables)
        self.evaluator = make_evaluator(config, world, self._q_values, self._rng(EVALUATING))

    def _rng(self, stream: int) -> np.random.Generator:
        # A resumed run draws new numbers instead of the first ones again.
        key = (self.world.rank, stream, *([self.plan.resumed_at] if self.plan.resumed_at else []))
        return np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=key))

    def _q_values(self, observation: np.ndarray) -> np.ndarray:
        return self.learner.online.q_values(self.normalizer(observation))

    def train(self, checkpoints: Checkpoints) -> Iterator[Record]:
        """Runs to the end, yielding a record per report and per evaluation and, last, the result."""
        plan, world, ledger = self.plan, self.world, self.ledger
        self.broadcast()
        self.envs.reset(self._rng(ENVIRONMENTS).integers(2**31, size=self.envs.copies).tolist())
        reached = None
        for cycle in range(plan.first_cycle, plan.cycles):
            with ledger.timed("act"):
                action = self.actor.act(self.envs.observation, plan.epsilons_at(cycle, world.rank))
            with ledger.timed("env"):
                transition, episodes = self.envs.step(action)
            self.replay.add(transition)
            self.normalizer.observe(transition.observation)
            ledger.episodes(*episodes)
            if plan.learns_at(cycle):
                self._learn(cycle)
            if plan.checks_drift_at(cycle):
                check_drift(world, self.learner.variables, f"after {plan.total_steps_after(cycle):,} total steps")
            if plan.reports_at(cycle):
                yield Record("report", self._report(cycle))
            if plan.evaluates_at(cycle):
                row = self._evaluate(cycle, self.config.evaluation.episodes)
                yield Record("evaluation", row)
                self._remember(row, cycle, checkpoints)
                if world.any(self._reaches_target(row)):
                    row = self._evaluate(cycle, self.config.evaluation.final_episodes)
                    yield Record("evaluation", row)
                    if world.any(self._reaches_target(row)):
                        reached = row
                        break
            if plan.checkpoints_at(cycle):
                self._save(cycle, checkpoints)
        check_drift(world, self.learner.variables, "at the end of the run")
        if reached is None:
            reached = self._evaluate(cycle, self.config.evaluation.final_episodes)
            yield Record("evaluation", reached)
        self._remember(reached, cycle, checkpoints)
        self._save(cycle, checkpoints)
        yield Record("result", reached)

    def describe(self) -> dict[str, str]:
        """The plan and what only the environment tells: for people."""
        parameters = sum(int(np.prod(variable.shape)) for variable in self.learner.online.variables)
        compiled = ", compiled by XLA" if self.learner.compiled else ""
        rows = self.plan.describe()
        rows["network"] = f"{self.config.agent.network}, {parameters:,} parameters{compiled}"
        rows["replay"] += f", {self.replay.nbytes / 1e6:,.0f} MB"
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
        self.ledger.phase(*phase)

    def _report(self, cycle: int) -> Row:
        return self.ledger.report(
            total_steps=self.plan.total_steps_after(cycle),
            cycle=cycle,
            updates=self.updates,
            epsilon=self.plan.epsilon_at(cycle),
            learning_rate=self.plan.learning_rate_at(cycle),
            replay_size=len(self.replay),
        )

    def _evaluate(self, cycle: int, episodes: int) -> Row:
        total_steps = self.plan.total_steps_after(cycle)
        row = self.evaluator.evaluate(episodes, round=total_steps)
        return {"total_steps": total_steps, "seconds": self.ledger.seconds, **row}

    def _reaches_target(self, row: Row) -> bool:
        target = self.config.evaluation.target_return
        return target is not None and row["return_mean"] >= target

    def _remember(self, row: Row, cycle: int, checkpoints: Checkpoints) -> None:
        """Keeps the best evaluation and its weights; of equals the newer, which has learned longer."""
        if self.best is None or row["return_mean"] >= self.best[0]:
            self.best = (row["return_mean"], int(row["total_steps"]))
            self._save(cycle, checkpoints)

    def _save(self, cycle: int, checkpoints: Checkpoints) -> None:
        state: dict[str, Any] = {
            "total_steps": self.plan.total_steps_after(cycle),
            "updates": self.updates,
            "best": self.best,
            "ledger": self.ledger.state(),
            "normalizer": self.normalizer.state(),
        }
        best = None if self.best is None else self.best[1]
        checkpoints.save(self.plan.total_steps_after(cycle), self.learner.state(), state, best)

    def _restore(self, snapshot: Snapshot) -> None:
        state = snapshot.state
        restore_weights(self.learner, self.normalizer, snapshot)
        self.updates = state["updates"]
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        self.ledger.load_state(state["ledger"])

    def close(self) -> None:
        self.envs.close()
        self.evaluator.close()


def make_environments(config: Config, world: World, copies: int, vectorization: str) -> Environments:
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
    except ValueError as error:
        raise InputError(f"The checkpoint {snapshot.path} does not fit these settings: {error}.") from None


def make_evaluator(
    config: Config, world: World, q_values: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator
) -> Evaluator:
    settings, copies = config.evaluation, -(-config.evaluation.episodes // world.size)
    # One by one, not the environment's own vector class: that takes one seed for all its copies.
    mode = "async" if config.env.vectorization == "async" else "sync"
    envs = make_environments(config, world, copies, mode)
    actor, epsilons = Actor(q_values, envs.actions, rng), np.full(copies, settings.epsilon)
    return Evaluator(
        envs,
        lambda observation: actor.act(observation, epsilons),
        world,
        seed=config.seed,
        max_length=settings.max_episode_steps,
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
    with contextlib.closing(evaluator):
        return {"total_steps": snapshot.total_steps, **evaluator.evaluate(config.evaluation.episodes, round=0)}
