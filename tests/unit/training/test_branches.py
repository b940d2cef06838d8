"""Where a run branches, all ranks take the same branch: two ranks as two threads, whose collectives are real and recorded."""

import contextlib
import errno
import os
import re
import threading

import gymnasium
import numpy as np
import pytest
import tensorflow as tf

import hvd_dqn
import hvd_dqn.commands.train
from hvd_dqn.config import Config
from hvd_dqn.errors import InputError, JobError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.storage.checkpoint import Checkpoints
from hvd_dqn.training.trainer import Trainer
from tests.unit.envs.test_environments import register

RANKS = 2


class Meeting:
    """Where the ranks meet: everybody's values by rank, and who asked for what. Whoever comes alone breaks it after seconds."""

    def __init__(self):
        self.barrier = threading.Barrier(RANKS, timeout=30)
        self.values = [None] * RANKS

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        everyone = list(self.values)
        self.barrier.wait()  # nobody overwrites what another still reads
        return everyone


class ThreadWorld(Solo):
    """A rank that is a thread."""

    def __init__(self, rank, meeting):
        super().__init__(rank)
        self.size = self.local_size = RANKS
        self.local_rank, self.tape, self._meeting = rank, [], meeting

    def _exchange(self, name, value):
        self.tape.append(name)
        asked = self._meeting.exchange(self.rank, (name, value))
        assert len({each for each, _ in asked}) == 1, f"the ranks met in different collectives: {asked}"
        return [each for _, each in asked]

    def broadcast(self, variables):
        for variable, value in zip(
            variables, self._exchange("broadcast", [v.numpy() for v in variables])[0], strict=True
        ):
            variable.assign(value)

    def average(self, tensors):
        def mean(*mine):
            everyone = self._exchange(f"average {[x.shape for x in mine]}", mine)
            return [np.mean(each, axis=0, dtype=np.float32) for each in zip(*everyone, strict=True)]

        means = tf.numpy_function(mean, list(tensors), [t.dtype for t in tensors])
        return [tf.ensure_shape(m, t.shape) for m, t in zip(means, tensors, strict=True)]

    def sum(self, values):
        return np.sum(self._exchange(f"sum {np.shape(values)}", np.asarray(values, np.float64)), axis=0)

    def max(self, values):
        return np.max(self._exchange(f"max {np.shape(values)}", np.asarray(values, np.float64)), axis=0)

    def any(self, flag):
        return any(self._exchange("any", bool(flag)))

    def gather(self, value):
        return self._exchange("gather", value)

    def barrier(self):
        self._exchange("barrier", None)


def settings(**changes) -> Config:
    base = {
        "total_steps": 400,
        "env": {"id": "CartPole-v1", "envs_per_rank": 4, "vectorization": "sync"},
        "agent": {"hidden": (8,)},
        "replay": {"capacity": 1_000},
        "learner": {"batch_size": 8, "learn_start": 40, "train_period": 40, "target_period": 80},
        "ranks": {"sync": "parameters", "silence_seconds": None, "vote_period": 40, "drift_check_period": 80},
        "evaluation": {"period": 120, "episodes": 3, "final_episodes": 4, "max_episode_steps": 30},
        "report": {"period": 80},
        "checkpoint": {"period": 160},
    }
    for section, values in changes.items():
        base[section] = {**base[section], **values}
    return Config.model_validate(base)


def in_threads(rank_main):
    """Runs `rank_main(rank, world)` on all ranks at once. Returns what they made of it or their errors, and the tape."""
    meeting = Meeting()
    worlds = [ThreadWorld(rank, meeting) for rank in range(RANKS)]
    outcomes = [None] * RANKS

    def main(rank):
        try:
            outcomes[rank] = rank_main(rank, worlds[rank])
        except Exception as error:
            outcomes[rank] = error
            if not isinstance(error, JobError | InputError):  # those that all raise alike
                meeting.barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    tapes = [world.tape for world in worlds]
    assert tapes[0] == tapes[1]
    return outcomes, tapes[0]


def run_ranks(config, path, *, stop=lambda rank: lambda: False, prepare=lambda rank, trainer, checkpoints: None):
    """Trains on all ranks at once. Returns the records or the error of each, and the tape."""

    def train(rank, world):
        checkpoints = Checkpoints(path, world)
        with contextlib.closing(Trainer(config, world, stop=stop(rank))) as trainer:
            prepare(rank, trainer, checkpoints)
            return list(trainer.train(checkpoints))

    outcomes, tape = in_threads(train)
    assert len(tape) > 5
    return outcomes, tape


def kinds(outcome) -> list[str]:
    assert not isinstance(outcome, Exception), outcome
    return [record.kind for record in outcome]


@pytest.mark.parametrize("exponent", [0.0, 0.6])
def test_a_run_that_nothing_happens_to_ends_on_all_ranks_alike(exponent, tmp_path):
    (first, second), tape = run_ranks(settings(replay={"priority_exponent": exponent}), tmp_path)
    assert kinds(first) == kinds(second)
    assert kinds(first)[-1] == "result"
    assert any(entry.startswith("average") for entry in tape)


@pytest.mark.parametrize("asked", [0, 1])
def test_one_rank_that_is_asked_to_stop_stops_all(asked, tmp_path):
    calls = []
    stop = lambda rank: lambda: rank == asked and calls.append(None) is None and len(calls) > 3  # noqa: E731
    (first, second), _ = run_ranks(settings(evaluation={"period": 10_000}), tmp_path, stop=stop)
    assert kinds(first)[-1] == kinds(second)[-1] == "stopped"
    assert first[-1].row["total_steps"] == second[-1].row["total_steps"] < 400
    assert Checkpoints(tmp_path, Solo()).newest(print).total_steps == first[-1].row["total_steps"]


@pytest.mark.parametrize("asked", [0, 1])
def test_an_evaluation_that_one_rank_breaks_off_is_broken_off_by_all(asked, tmp_path):
    playing = threading.Event()

    def prepare(rank, trainer, checkpoints):
        evaluate = trainer.worker.evaluate
        trainer.worker.evaluate = lambda *values, **named: playing.set() or evaluate(*values, **named)

    stop = lambda rank: lambda: rank == asked and playing.is_set()  # noqa: E731
    (first, second), _ = run_ranks(settings(ranks={"vote_period": 10_000}), tmp_path, stop=stop, prepare=prepare)
    assert kinds(first)[-1] == kinds(second)[-1] == "stopped"
    assert "evaluation" not in kinds(first)


def test_a_target_that_is_reached_ends_all_ranks_at_once(tmp_path):
    (first, second), _ = run_ranks(settings(evaluation={"target_return": 1.0}), tmp_path)
    assert kinds(first)[-1] == kinds(second)[-1] == "result"
    assert first[-1].row["total_steps"] == second[-1].row["total_steps"] == 120
    assert kinds(first).count("evaluation") == 2  # the one that reached it, and the one that confirmed it


@pytest.mark.parametrize("odd", [0, 1])
def test_weights_that_drift_apart_end_all_ranks_with_the_same_words(odd, tmp_path):
    def prepare(rank, trainer, checkpoints):
        learn = trainer.worker.begin_phase

        def drift(cycle):
            learn(cycle)
            if rank == odd:
                theta = trainer.worker.learner.target.variables[0]
                theta.assign(theta + 1e-3)

        trainer.worker.begin_phase = drift

    (first, second), _ = run_ranks(settings(learner={"target_period": 10_000}), tmp_path, prepare=prepare)
    assert isinstance(first, JobError)
    assert str(first) == str(second)
    assert "on rank 1 the variables target/0" in str(first)  # rank 0's are what others are compared with


@pytest.mark.parametrize("policy", ["stop", "continue"])
@pytest.mark.parametrize("full", [0, 1])
def test_a_rank_whose_disk_is_full_ends_all_or_none(full, policy, tmp_path):
    def prepare(rank, trainer, checkpoints):
        def fail(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if rank == full:
            checkpoints._write_part = fail

    config = settings(checkpoint={"on_failure": policy}, evaluation={"period": 10_000})
    (first, second), _ = run_ranks(config, tmp_path, prepare=prepare)
    if policy == "stop":
        assert isinstance(first, JobError)
        assert str(first) == str(second)
        assert f"rank {full} on" in str(first)
    else:
        assert kinds(first) == kinds(second)
        assert kinds(first)[-1] == "result"
        assert sum("cannot be written" in record.text for record in first) >= 2


@pytest.mark.parametrize(
    "words",
    [["--seed", "2"], ["--resume"], ["--elastic"], ["--from", "elsewhere"], ["--timeline", "file"]],
    ids=" ".join,
)
def test_ranks_that_were_started_differently_are_refused_together(words, tmp_path):
    common = ["identity", "--run-dir", str(tmp_path)]
    if words == ["--resume"]:
        hvd_dqn.train("identity", total_steps=250, run_dir=tmp_path)
    (first, second), _ = in_threads(lambda rank, world: hvd_dqn.commands.train.run(common + words * rank, world))
    assert isinstance(first, InputError)
    assert str(first) == str(second)
    assert re.search(r"started with different .*ranks \[1\] differ from rank 0", str(first))


class OddEnv(gymnasium.Env):
    """Is another environment on rank 1, as it is where hosts have other versions of a package."""

    HERE = threading.local()

    def __init__(self, odd):
        self.odd = odd if self.HERE.rank == 1 else ""
        self.observation_space = gymnasium.spaces.Box(-1, 1, (3 if self.odd == "space" else 2,))
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        masks = {"action_mask": np.ones(2, np.int8)} if self.odd == "mask" else {}
        return np.zeros(self.observation_space.shape, np.float32), masks

    def step(self, action):
        return *self.reset()[:1], 0.0, True, False, self.reset()[1]


@pytest.mark.parametrize(("odd", "name"), [("space", "observation space"), ("mask", "use of action masks")])
def test_ranks_whose_environments_differ_are_refused_together(odd, name, tmp_path):
    register("PerRank-v0", OddEnv)
    words = ["identity", "--env.id", "PerRank-v0", "--env.kwargs", f"odd={odd}", "--env.vectorization", "sync"]

    def train(rank, world):
        OddEnv.HERE.rank = rank
        return hvd_dqn.commands.train.run([*words, "--run-dir", str(tmp_path)], world)

    (first, second), _ = in_threads(train)
    assert isinstance(first, InputError)
    assert str(first) == str(second)
    assert f"must have the same {name}" in str(first)
