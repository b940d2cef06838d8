"""One training from its settings to its end, by ranks that stay or that come and go; and what it has learned, played."""

import contextlib
import sys

import numpy as np

from hvd_dqn.agent.learner import Learner
from hvd_dqn.config import Config
from hvd_dqn.errors import InputError, RunError, tell
from hvd_dqn.ranks.elastic import ElasticWorld
from hvd_dqn.ranks.lockstep import BroadcastHook, in_step
from hvd_dqn.ranks.signals import StopRequest
from hvd_dqn.ranks.world import World
from hvd_dqn.reporting.session import Session, open_session
from hvd_dqn.storage.checkpoint import Checkpoints, Snapshot
from hvd_dqn.storage.run_directory import Run
from hvd_dqn.training.build import (
    make_environments,
    make_evaluator,
    make_learner,
    make_preprocess,
    make_statistics,
    restore_weights,
)
from hvd_dqn.training.evaluation import Evaluator
from hvd_dqn.training.ledger import Row
from hvd_dqn.training.trainer import Trainer
from hvd_dqn.training.worker import WEIGHTS


def train(config: Config, name: str, run: Run, world: World, stop: StopRequest, *, resume: bool) -> bool:
    """Trains to the end. Returns whether it was stopped on request instead."""
    checkpoints = Checkpoints(run.path, world, config.checkpoint.keep, config.checkpoint.compress)
    snapshot = newest(checkpoints, run, world) if resume else None
    trainer = in_step(world, lambda: Trainer(config, world, snapshot, stop))
    with contextlib.closing(trainer):
        return _go_on(trainer, name, run, snapshot, checkpoints)


def train_elastically(config: Config, name: str, run: Run, stop: StopRequest, *, resume: bool) -> bool:
    """The same by as many ranks as there are from time to time: a generation ends when that number changes.

    Horovod: a rank may join at any time, so that nothing here is a collective before `furthest`, and a rank that fails on
    its own account ends alone.
    """
    world = ElasticWorld()
    sys.stdout = sys.__stdout__  # any rank may become the chief, whose results are printed
    checkpoints = Checkpoints(run.path, world, config.checkpoint.keep, config.checkpoint.compress)
    trainer: Trainer | None = None
    while True:
        try:
            held = trainer.committed if trainer else None
            snapshot, joined = world.furthest(held and (held, config.digest()), held.total_steps if held else -1)
            again = world.any(trainer is not None)  # of this job's own ranks some have made the run directory
            if snapshot is None:  # the job begins
                found = newest(checkpoints, run, world).without_parts() if resume else None
            else:
                found, digest = snapshot
                if digest != config.digest():
                    world.abort("This rank was started with other settings than those that are training.")
            if trainer is not None and found is not None and trainer.committed is not None:
                trainer.agent.regroup(found, joined)
            else:
                if trainer is not None:  # of a generation that ended before it began: made for another number of ranks
                    trainer.close()
                trainer = Trainer(config, world, found, stop, joins=snapshot is not None)
            return _go_on(trainer, name, run, found, checkpoints, again)
        except Exception as error:
            if not world.recovers_from(error):
                raise
            world.regroup()


def _go_on(
    trainer: Trainer, name: str, run: Run, snapshot: Snapshot | None, checkpoints: Checkpoints, again: bool = False
) -> bool:
    session = in_step(trainer.world, lambda: _opened(run, name, trainer, snapshot, again))
    record = None
    # Closing: a record that cannot be shown ends the training there and then, its goodbyes to the other ranks included.
    with session, contextlib.closing(trainer.train(checkpoints)) as records:
        for record in records:
            try:
                session.show(record)
            except OSError as error:
                raise RunError(f"{run.path} cannot be written: {error}. Make room and go on with --resume.") from None
            except InputError as error:  # what was begun is no bad input any more
                raise RunError(str(error)) from None
    return record is not None and record.kind == "stopped"


def _opened(run: Run, name: str, trainer: Trainer, snapshot: Snapshot | None, again: bool) -> Session:
    try:
        return open_session(run, name, trainer, snapshot, again)
    except OSError as error:
        raise InputError(f"Cannot write the run directory {run.path}: {error.strerror}.") from None


def newest(checkpoints: Checkpoints, run: Run, world: World) -> Snapshot:
    """The checkpoint to go on from. A collective. Raises InputError where there is none."""
    snapshot = checkpoints.newest(tell if world.rank == 0 else lambda text: None)
    if snapshot is None:
        raise InputError(f"There is nothing to resume in {run.path}: it has no complete checkpoint.")
    return snapshot


def evaluate(config: Config, world: World, snapshot: Snapshot) -> Row:
    """Plays the evaluation that `config` describes with the weights of a checkpoint. A collective."""
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(world.rank, WEIGHTS)))

    def build() -> tuple[Learner, Evaluator]:
        with contextlib.closing(make_environments(config, world, 1, "sync")) as envs:
            statistics, preprocess = make_statistics(config, envs), make_preprocess(config, envs)
            learner = make_learner(config, envs, preprocess, world, rng)
        restore_weights(learner, preprocess, statistics, snapshot)
        return learner, make_evaluator(config, world, learner.online.q_values)

    learner, evaluator = in_step(world, build)
    BroadcastHook(world, learner.variables)()
    learner.online.refresh()
    with contextlib.closing(evaluator):
        row = evaluator.evaluate(config.evaluation.episodes, round=0)
    assert row is not None  # nobody asks an evaluation alone to stop
    return {"total_steps": snapshot.total_steps, **row}
