"""A whole training, from settings to result, on one rank or many; and the evaluation and policy of a finished run."""

import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from hvd_dqn.agent.networks import Network
from hvd_dqn.agent.policy import Policy
from hvd_dqn.config import Config
from hvd_dqn.config_files import configure
from hvd_dqn.errors import InputError, RunError, tell
from hvd_dqn.printing import MOST_LINES, few_printed_lines
from hvd_dqn.ranks.elastic import ElasticWorld
from hvd_dqn.ranks.lockstep import BroadcastHook, check_equal, in_step
from hvd_dqn.ranks.world import Solo, World
from hvd_dqn.reporting.session import Session, open_session
from hvd_dqn.storage.checkpoint import Checkpoints, Snapshot
from hvd_dqn.storage.run_directory import Run, check_same_task
from hvd_dqn.training.build import make_evaluator, make_one, make_policy, read_statistics, trained_network
from hvd_dqn.training.evaluation import Evaluator
from hvd_dqn.training.trainer import Trainer
from hvd_dqn.training.worker import surveyed


@dataclass(frozen=True)
class Result:
    """How a training ended: the environment's own returns, neither clipped nor scaled.

    `outcome` is "stopped" if the run was stopped on request before its end; it can then be resumed.
    """

    outcome: Literal["finished", "stopped"]
    return_mean: float  # of the last evaluation of this call, as the next two are; NaN without one
    return_std: float  # over its episodes
    episodes: int
    total_steps: int  # over all environments of all ranks
    seconds: float  # of wall time, over all resumes of the run
    best_return: float  # the highest mean of an evaluation; NaN if there was none
    best_total_steps: int | None  # after which it was measured
    run_dir: Path

    @functools.cached_property
    def policy(self) -> Policy:
        """The policy of the best evaluation, loaded from the run directory on first use."""
        return policy_of_run(Run(self.run_dir), best=True)


class Evaluation(NamedTuple):
    """Returns over `episodes` episodes of the weights after `total_steps`: the environment's own."""

    total_steps: int
    episodes: int
    return_mean: float
    return_std: float
    return_min: float
    return_max: float
    length_mean: float  # in steps


def warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def train_in_world(
    config: Config,
    name: str,
    run: Run,
    world: World,
    stop: Callable[[], bool],
    *,
    resume: bool = False,
    start_from: Path | None = None,
    progress: bool = True,
) -> Result:
    """Trains to the end, or until a rank is asked to stop. A collective."""
    say = tell if progress else warn
    checkpoints = Checkpoints(run.path, world, config.checkpoint.keep, config.checkpoint.compress)
    start = starting_weights(run, config, world, start_from, resume, say)
    snapshot = newest(checkpoints, run, config, world, say) if resume else None
    with _results(world) if progress else contextlib.nullcontext() as results:
        trainer = in_step(world, lambda: Trainer(config, world, snapshot, stop, start=start))
        with contextlib.closing(trainer):
            return _go_on(trainer, name, run, snapshot, checkpoints, start, results)


def train_elastically(
    config: Config, name: str, run: Run, stop: Callable[[], bool], *, resume: bool, start_from: Path | None = None
) -> Result:
    """The same in an elastic job, whose number of ranks may change. A generation is the time between two changes.

    Horovod: a rank may join at any time, so `furthest` must be the first collective. A rank that fails ends alone.
    """
    world = ElasticWorld()
    sys.stdout = sys.__stdout__  # any rank may become the chief, which prints the results
    with _results(world) as results:
        return _train_in_generations(config, name, run, world, stop, results, resume=resume, start_from=start_from)


def _train_in_generations(
    config: Config,
    name: str,
    run: Run,
    world: ElasticWorld,
    stop: Callable[[], bool],
    results: TextIO,
    *,
    resume: bool,
    start_from: Path | None,
) -> Result:
    checkpoints = Checkpoints(run.path, world, config.checkpoint.keep, config.checkpoint.compress)
    trainer: Trainer | None = None
    while True:
        try:
            held = trainer.committed if trainer else None
            snapshot, joined = world.furthest(held and (held, config.digest()), held.total_steps if held else -1)
            again = world.any(trainer is not None)  # ranks of this job have already made the run directory
            start = None
            if snapshot is None:  # the job begins
                start = starting_weights(run, config, world, start_from, resume, tell)
                # The weights alone: every rank fills a new replay.
                found = newest(checkpoints, run, config, world, tell)._replace(complete=False) if resume else None
            else:
                found, digest = snapshot
                if digest != config.digest():
                    world.abort("This rank was started with other settings than those that are training.")
            if trainer is not None and found is not None and trainer.committed is not None:
                trainer.worker.regroup(found, joined)
            else:
                if trainer is not None:  # it never began, and was made for another number of ranks
                    trainer.close()
                trainer = Trainer(config, world, found, stop, joins=snapshot is not None, start=start)
            return _go_on(trainer, name, run, found, checkpoints, start, results, again)
        except Exception as error:
            if not world.recovers_from(error):
                raise
            world.regroup()


def _results(world: World) -> contextlib.AbstractContextManager[TextIO]:
    """The stream for results. Inside, what environments print is kept short, and only the chief's is shown."""
    return few_printed_lines(MOST_LINES if world.rank == 0 else 0)


def _go_on(
    trainer: Trainer,
    name: str,
    run: Run,
    snapshot: Snapshot | None,
    checkpoints: Checkpoints,
    start: Snapshot | None,
    results: TextIO | None,
    again: bool = False,
) -> Result:
    def opened() -> Session:
        started_from = None if start is None else start.path
        try:
            return open_session(run, name, trainer, snapshot, results, again, started_from)
        except OSError as error:
            raise InputError(f"Cannot write the run directory {run.path}: {error.strerror}.") from None

    check_equal(
        trainer.world,
        trainer.worker.environment(),
        "Each host must have the same version of the environment's package.",
    )
    session = in_step(trainer.world, opened)
    last, evaluation = None, {"return_mean": math.nan, "return_std": math.nan, "episodes": 0}
    # Closing: if a record cannot be shown, the training ends at once and says goodbye to the other ranks.
    with session, contextlib.closing(trainer.train(checkpoints)) as records:
        for record in records:
            last = record
            if record.kind == "evaluation":
                evaluation = record.row
            try:
                session.show(record)
            except OSError as error:
                raise RunError(f"{run.path} cannot be written: {error}. Free space and use --resume.") from None
            except InputError as error:  # a run that has begun does not end with "bad input"
                raise RunError(str(error)) from None
    assert last is not None
    best_return, best_total_steps = trainer.worker.best or (math.nan, None)
    return Result(
        "stopped" if last.kind == "stopped" else "finished",
        return_mean=evaluation["return_mean"],
        return_std=evaluation["return_std"],
        episodes=int(evaluation["episodes"]),
        total_steps=int(last.row["total_steps"]),
        seconds=last.row["seconds"],
        best_return=best_return,
        best_total_steps=best_total_steps,
        run_dir=run.path,
    )


def newest(checkpoints: Checkpoints, run: Run, config: Config, world: World, say: Callable[[str], None]) -> Snapshot:
    """The checkpoint to resume from. A collective. Raises InputError if there is none, or if it is of another task."""
    in_step(world, lambda: check_same_task(run, config) if world.rank == 0 else None)
    snapshot = checkpoints.newest(say if world.rank == 0 else lambda text: None)
    if snapshot is None:
        raise InputError(f"There is nothing to resume in {run.path}: it has no complete checkpoint.")
    return snapshot if world.elastic else surveyed(snapshot, config, world)  # an elastic job fills new replays


def starting_weights(
    run: Run, config: Config, world: World, start_from: Path | None, resume: bool, say: Callable[[str], None]
) -> Snapshot | None:
    """The weights that a new run starts from; None if it starts from random weights, or is resumed. A collective.

    They are those of the best evaluation, else the newest. Raises InputError if they cannot be read or do not fit.
    """
    if start_from is None:
        return None
    source = Run(start_from)

    def check() -> None:
        if world.rank != 0:
            return
        if not resume:
            _check_same_network(source, config)
        # A batch system restarts a job with the same arguments and adds --resume.
        elif run.about().get("started_from", {}).get("run") != str(start_from.resolve()):
            raise InputError(
                f"--from starts a new run, and --resume continues {run.path}, which did not start from {start_from}: "
                "leave one of them out."
            )

    in_step(world, check)
    return None if resume else weights_of_run(source, world, best=True, say=say)


def _check_same_network(source: Run, config: Config) -> None:
    """Weights are one vector. Its length does not tell whether the layers had 3 and 5 or 5 and 3 neurons."""
    before, now = source.config(), config
    names = ["env.normalize_observation", "env.observation_scale", "env.action_bins", "agent.factored"]
    names += ["agent.objective", "agent.atoms", "agent.support", "agent.quantiles"]
    if ":" not in before.agent.network or ":" not in now.agent.network:
        names += ["agent.network", "agent.hidden", "agent.dueling"]
    for name in names:
        old, new = attrgetter(name)(before), attrgetter(name)(now)
        if old != new:
            raise InputError(
                f"The weights of {source.path} do not fit these settings: `{name}` is {old!r} there and {new!r} here. "
                "Make them equal, or start without --from."
            )


def weights_of_run(run: Run, world: World, *, best: bool, say: Callable[[str], None]) -> Snapshot:
    """The newest weights of a run, or those of its best evaluation if there was one. The chief reads them. A collective.

    Raises InputError if there is no run, or its weights cannot be read.
    """

    def read() -> Snapshot | None:
        if world.rank != 0:
            return None
        checkpoints, damage = Checkpoints(run.path, world), list[str]()
        snapshot = checkpoints.weights(None, damage.append)
        if best and snapshot is not None and snapshot.state["best"]:
            snapshot = checkpoints.weights(int(snapshot.state["best"][1]), damage.append)
        if snapshot is None:
            raise InputError(f"There are no weights in {run.path}. {' '.join(damage) or 'It has no checkpoint.'}")
        for text in damage:
            say(text)
        return snapshot

    snapshot = world.gather(in_step(world, read))[0]
    assert snapshot is not None
    return snapshot


def evaluation_settings(config: Config, episodes: int, seed: int, epsilon: float) -> Config:
    """A run's settings, changed for evaluating it with other episodes. Raises InputError."""
    return configure(config, {"seed": seed, "evaluation": {"episodes": episodes, "epsilon": epsilon}})


def evaluate_in_world(config: Config, world: World, snapshot: Snapshot) -> Evaluation:
    """Runs the evaluation that `config` describes, with the weights of a checkpoint. A collective."""

    def build() -> tuple[Network, Evaluator]:
        with contextlib.closing(make_one(config, world)) as envs:
            network = trained_network(config, envs, world, snapshot)
        evaluator = make_evaluator(config, world, network.q_values)
        mean = read_statistics(config, evaluator.envs, snapshot).mean
        evaluator.envs.readings.neutral = evaluator.envs.frames.layout.neutral(mean)
        return network, evaluator

    network, evaluator = in_step(world, build)
    BroadcastHook(world, {variable.name: variable for variable in network.variables})()
    network.refresh()
    with contextlib.closing(evaluator):
        row: dict[str, Any] | None = evaluator.evaluate(config.evaluation.episodes, round=0)
    assert row is not None  # this evaluator has no `stop`
    return Evaluation(snapshot.total_steps, **row)


def policy_of_run(run: Run, *, best: bool, seed: int | None = None) -> Policy:
    """The policy of a run's best evaluation or newest checkpoint. Makes one environment, to read its spaces."""
    config, snapshot = run.config(), weights_of_run(run, Solo(), best=best, say=warn)
    with contextlib.closing(make_one(config, Solo())) as envs:
        network = trained_network(config, envs, Solo(), snapshot)
        policy = make_policy(envs, network.q_values, seed)
        policy.choose(envs.observation)  # traces the graph, if the network has one
    return policy
