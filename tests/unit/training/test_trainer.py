"""The loop: its collectives are the same on all ranks, one seed gives one run, and a run can be continued."""

import contextlib
import errno
import functools
import json
import operator
import os
import re
import shutil
import sys
import threading
import time
import zipfile
from concurrent.futures import Future
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dqn import job
from hvd_dqn.agent.learner import Learner, Phase
from hvd_dqn.agent.preprocess import Preprocess
from hvd_dqn.agent.replay import NOTHING, TRUNCATED
from hvd_dqn.commands import evaluate
from hvd_dqn.config import Config
from hvd_dqn.errors import InputError, JobError, RunError
from hvd_dqn.ranks.signals import StopRequest
from hvd_dqn.ranks.watchdog import NullWatchdog
from hvd_dqn.ranks.world import Solo
from hvd_dqn.reporting.session import open_session
from hvd_dqn.reporting.writers import CsvWriter, read_csv
from hvd_dqn.storage.arrays import entry_of
from hvd_dqn.storage.checkpoint import Checkpoints, divide, load
from hvd_dqn.storage.run_directory import Run
from hvd_dqn.training.evaluation import Evaluator
from hvd_dqn.training.trainer import Trainer


class TapeWorld(Solo):
    """A rank of many without the others: it records every collective it is asked for.

    Its answers are the same on every rank, as those of real collectives are, and tell nothing of the rank's own values.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size, self.tape = rank, size, []

    def wrap(self, optimizer, compression):
        self.tape.append("wrap")
        return optimizer

    def broadcast(self, variables):
        self.tape.append(f"broadcast {[tuple(v.shape) for v in variables]}")

    def average(self, tensors):
        self.tape.append(f"average {len(tensors)}")
        return list(tensors)

    def sum(self, values):
        self.tape.append(f"sum {np.shape(values)}")
        return np.full(np.shape(values), float(self.size))

    def max(self, values):
        self.tape.append(f"max {np.shape(values)}")
        return np.zeros(np.shape(values))

    def any(self, flag):
        self.tape.append("any")
        return False

    def gather(self, value):
        self.tape.append("gather")
        return [None] * self.size

    def barrier(self):
        self.tape.append("barrier")


def config(**changes) -> Config:
    base = {
        "total_steps": 960,
        "env": {"id": "CartPole-v1", "envs_per_rank": 12, "vectorization": "sync"},
        "agent": {"hidden": [8]},
        "learner": {
            "batch_size": 24,
            "samples_per_insert": 2,
            "learn_start": 240,
            "train_period": 48,
            "target_period": 96,
        },
        "evaluation": {"period": 300, "episodes": 3, "final_episodes": 5, "target_return": 5.0},
        "report": {"period": 120},
        "checkpoint": {"period": 400},
        "ranks": {"drift_check_period": 250, "vote_period": 100, "silence_seconds": None},
    }
    for name, values in changes.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return Config.model_validate(base)


def arrays_of(trainer) -> dict[str, np.ndarray]:
    """Everything that a rank has and that goes on: as arrays and plain values by their paths."""
    rest, arrays = divide({"learner": trainer.worker.learner.state(), "part": trainer.worker.part()})
    rest["part"]["window"].pop("timers"), rest["part"]["window"].pop("seconds")
    return arrays | {"rest": rest}


def play(config: Config, world, path: Path, snapshot=None):
    """Trains to the end; returns the records and the trainer. The tape, if any, also gets each phase's number of updates."""
    trainer = Trainer(config, world, snapshot)
    update = trainer.worker.learner.update

    def recorded(batch, learning_rate, copies):
        if isinstance(world, TapeWorld):
            world.tape.append(f"updates {len(copies)} {learning_rate:.9f} {copies.tolist()}")
        return update(batch, learning_rate, copies)

    trainer.worker.learner.update = recorded
    trainer.played, count = [], trainer.worker.ledger.episodes
    trainer.worker.ledger.episodes = lambda returns, lengths: (
        count(returns, lengths),
        trainer.played.extend(lengths.tolist()),
    )
    records = list(trainer.train(Checkpoints(path, world, config.checkpoint.keep, config.checkpoint.compress)))
    trainer.arrays = arrays_of(trainer)
    trainer.close()
    return records, trainer


class Gaps(gymnasium.Wrapper):
    """CartPole whose second sensor fails now and then."""

    def reset(self, **named):
        observation, info = self.env.reset(**named)
        return self._with_gaps(observation), info

    def step(self, action):
        observation, *others = self.env.step(action)
        return self._with_gaps(observation), *others

    def _with_gaps(self, observation):
        gap = np.nan if abs(observation[1]) * 1e4 % 10 < 2 else observation[1]
        return np.array([observation[0], gap, *observation[2:]], np.float32)


class Endless(gymnasium.Wrapper):
    """CartPole whose episodes end after `ends_after` steps."""

    ends_after = 10**9

    def reset(self, **named):
        self.steps = 0
        return self.env.reset(**named)

    def step(self, action):
        self.steps += 1
        ends = self.steps >= Endless.ends_after
        return np.zeros(4, np.float32), 1.0, ends, False, {}


class Crashes(gymnasium.Wrapper):
    """CartPole that raises an error in the step of the process whose number is `at`."""

    at, steps = -1, 0

    def step(self, action):
        Crashes.steps += 1
        if Crashes.steps == Crashes.at:
            raise RuntimeError("out of licences")
        return self.env.step(action)


for wrapper in (Gaps, Crashes):
    gymnasium.register(f"{wrapper.__name__}-v0", lambda wrapper=wrapper: wrapper(gymnasium.make("CartPole-v1")))
gymnasium.register("Endless-v0", lambda: Endless(gymnasium.make("CartPole-v1").unwrapped))


@pytest.mark.parametrize("scaling", ["weak", "strong"])
@pytest.mark.parametrize("sync", ["gradients", "parameters"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_enter_the_same_collectives_although_their_episodes_differ(size, sync, scaling, tmp_path):
    settings = config(
        ranks={"sync": sync, "scaling": scaling},
        env={"id": "Gaps-v0", "on_nonfinite": "hold", "restart_failed_envs": 1}
        | {"normalize_observation": sync == "parameters", "normalize_reward": scaling == "strong"},
        learner={"overlap": scaling == "strong"},
    )
    tapes, episodes = [], []
    for rank in range(size):
        world = TapeWorld(rank, size)
        # With fewer episodes (3) than ranks (4), one rank evaluates nothing and must take part all the same.
        _, trainer = play(settings, world, tmp_path / str(rank))
        tapes.append(world.tape)
        episodes.append(trainer.played)
    assert len(tapes[0]) > 30
    assert any(entry.startswith("updates") for entry in tapes[0])
    for tape in tapes[1:]:
        assert tape == tapes[0]
    assert size == 1 or episodes[0] != episodes[1]  # or the test would have shown nothing


@pytest.mark.parametrize("sync", ["gradients", "parameters"])
def test_a_rank_that_alone_skips_an_update_still_enters_the_same_collectives(sync, tmp_path):
    tapes = []
    for rank in range(2):
        world = TapeWorld(rank, 2)
        trainer = Trainer(config(ranks={"sync": sync}, evaluation={"target_return": None}), world)
        update = trainer.worker.learner.update
        # With averaged gradients every rank skips; with averaged parameters each for itself.
        skips = rank == 1 if sync == "parameters" else True
        trainer.worker.learner.update = lambda *a, update=update, skips=skips: update(*a)._replace(skipped=int(skips))
        with contextlib.suppress(JobError):
            list(trainer.train(Checkpoints(tmp_path / str(rank), world)))
        trainer.close()
        tapes.append(world.tape)
    assert tapes[0] == tapes[1]


def without_times(records) -> list:
    keep = lambda name: not name.startswith("time") and "seconds" not in name and "per_second" not in name  # noqa: E731
    return [(r.kind, {name: value for name, value in r.row.items() if keep(name)}) for r in records]


def test_one_seed_gives_one_run_and_another_seed_another(tmp_path):
    first, second = (without_times(play(config(), Solo(), tmp_path / str(i))[0]) for i in range(2))
    other = without_times(play(config(seed=1), Solo(), tmp_path / "other")[0])
    assert str(first) == str(second)  # as text, so that NaN equals NaN
    assert str(first) != str(other)


class Immediate:
    """An executor that has done the work before anybody goes on."""

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, wait):
        pass


@pytest.mark.parametrize("network", ["mlp", "tests.unit.agent.test_networks:keras_model"])
def test_a_phase_that_overlaps_acting_gives_the_same_run_however_long_it_takes(network, tmp_path, monkeypatch):
    settings = config(
        learner={"overlap": True},
        agent={"network": network, "epsilon_end": 0.0, "epsilon_steps": 0},
        evaluation={"target_return": None},
    )
    monkeypatch.setattr("hvd_dqn.training.worker.ThreadPoolExecutor", lambda *_: Immediate())
    expected, at_once = play(settings, Solo(), tmp_path / "at once")
    monkeypatch.undo()
    update = Learner.update
    monkeypatch.setattr(Learner, "update", lambda *a: (time.sleep(0.02), update(*a), time.sleep(0.02))[1])
    records, slow = play(settings, Solo(), tmp_path / "slow")
    assert str(without_times(records)) == str(without_times(expected))
    assert_same(slow.arrays, at_once.arrays)
    # Or there would have been nothing to be seen:
    assert not np.array_equal(slow.arrays["learner/online/0"], slow.arrays["learner/acting/0"])


def test_environments_step_while_a_phase_goes_on(tmp_path, monkeypatch):
    trainer, stepped = Trainer(config(learner={"overlap": True}), Solo()), threading.Event()
    agent, update = trainer.worker, Learner.update
    first = next(cycle for cycle in range(agent.plan.cycles) if agent.plan.learns_at(cycle))
    assert not agent.plan.finishes_phase_at(first)

    def waiting(*arguments):
        assert stepped.wait(60), "no step was taken"
        return update(*arguments)

    monkeypatch.setattr(Learner, "update", waiting)
    step = agent.step
    agent.step = lambda cycle: (step(cycle), stepped.set() if cycle > first else None)
    records = list(trainer.train(Checkpoints(tmp_path, Solo())))
    trainer.close()
    assert records[-1].kind == "result"


def test_of_an_overlapping_phase_only_the_waiting_for_its_end_counts():
    trainer = Trainer(config(learner={"overlap": True}), Solo())
    trainer.worker._phase = lambda: Phase(
        1, 0.0, 0.0, 0.0, 0, 0, False, seconds=1_000.0, allreduce_seconds=500.0, priority=None
    )
    trainer.worker.finish_phase()
    trainer.close()
    spent = trainer.worker.ledger.spent
    assert spent["update"] + spent["communicate"] < 10
    assert spent["update"] == pytest.approx(spent["communicate"])  # in the proportion of the whole phase


def test_what_fails_in_an_overlapping_phase_fails_the_run(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Learner, "update", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        play(config(learner={"overlap": True}), Solo(), tmp_path)


def test_a_run_reports_evaluates_and_ends_with_a_result(tmp_path):
    records, trainer = play(config(evaluation={"target_return": None}), Solo(), tmp_path)
    kinds = [record.kind for record in records]
    assert kinds.count("report") == 8
    assert kinds.count("evaluation") == 4  # at 300, 600, 900 and the last one
    assert kinds[-1] == "result"
    assert records[-1].row["episodes"] == 5
    assert records[-1].row["total_steps"] == 960
    assert trainer.worker.updates == trainer.worker.plan.updates_after(trainer.worker.plan.cycles - 1)


def test_a_run_stops_at_the_target_when_the_final_evaluation_confirms_it(tmp_path):
    records, _ = play(config(), Solo(), tmp_path)  # CartPole never returns less than 5
    numbers = [r for r in records if r.kind != "message"]
    assert [(r.kind, r.row["episodes"]) for r in numbers[-3:]] == [("evaluation", 3), ("evaluation", 5), ("result", 5)]
    assert records[-1].row["total_steps"] == 300


def test_a_target_that_the_final_evaluation_does_not_confirm_ends_no_run(tmp_path):
    trainer = Trainer(config(), Solo())
    evaluate, returns = trainer.worker.evaluate, {3: 9.0, 5: 1.0}  # by the number of episodes
    firsts = []

    def returning(cycle, episodes, first=0, longest=None):
        firsts.append((episodes, first))
        return evaluate(cycle, episodes, first) | {"return_mean": returns[episodes]}

    trainer.worker.evaluate = returning
    records = list(trainer.train(Checkpoints(tmp_path, Solo())))
    trainer.close()
    assert firsts[:2] == [(3, 0), (5, 3)]  # episodes that were lucky are not asked again
    evaluations = [(r.row["total_steps"], r.row["episodes"]) for r in records if r.kind == "evaluation"]
    assert evaluations == [(300, 3), (300, 5), (600, 3), (600, 5), (900, 3), (900, 5), (960, 5)]


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.array_equal(value, other[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"env": {"id": "FrozenLake-v1"}, "agent": {"epsilon_zeta": 2.0}},
        {"env": {"id": "MountainCar-v0", "frame_stack": 3, "normalize_observation": True}, "agent": {"n_step": 3}},
        {"env": {"id": "Blackjack-v1", "frame_stack": 2}},
        {"env": {"vectorization": "auto"}, "evaluation": {"epsilon": 0.5}},
        {"env": {"id": "Acrobot-v1", "vectorization": "async", "envs_per_rank": 2}},
        {"env": {"id": "LunarLander-v3"}, "agent": {"network": "tests.unit.agent.test_networks:keras_model"}},
        {"checkpoint": {"compress": True}, "replay": {"capacity": 400}},
        {"learner": {"overlap": True}},
        {
            "env": {"id": "Gaps-v0", "on_nonfinite": "hold", "normalize_reward": True, "reward_clip": 0.5}
            | {"normalize_observation": True, "clip_observation": 1.5},
            "agent": {"n_step": 2},
        },
        {"replay": {"priority_exponent": 0.6}, "agent": {"n_step": 3}, "env": {"frame_stack": 2}},
        {"replay": {"priority_exponent": 0.6, "capacity": 400}, "learner": {"overlap": True}},
        {"agent": {"objective": "c51", "support": (0, 60)}},
    ],
    ids=[
        *(
            "sync",
            "states",
            "stack",
            "tuple",
            "native",
            "async",
            "lander",
            "full ring",
            "overlap",
            "gaps",
            "prioritized",
        ),
        *("prioritized overlap", "c51"),
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(changes, tmp_path):
    settings = config(**{**changes, "evaluation": {"target_return": None, **changes.get("evaluation", {})}})
    whole, trainer = play(settings, Solo(), tmp_path / "whole")

    first = Checkpoints(tmp_path / "parts", Solo())
    stopped_at = 480  # in no episode's end, between two reports and two evaluations
    begun = Trainer(
        settings, Solo(), None, lambda: begun.worker.plan.total_steps_after(begun.steps_done - 1) >= stopped_at
    )
    begun.steps_done, step = 0, begun.worker.step
    begun.worker.step = lambda cycle: (step(cycle), setattr(begun, "steps_done", cycle + 1))
    before = list(begun.train(first))
    begun.close()
    assert before[-1].kind == "stopped"
    assert stopped_at <= before[-1].row["total_steps"] < 960

    after, resumed = play(settings, Solo(), tmp_path / "parts", first.newest(print))
    numbers = [r for r in before + after if r.kind in ("report", "evaluation", "result")]
    expected = [r for r in whole if r.kind in ("report", "evaluation", "result")]
    assert str(without_times(numbers)) == str(without_times(expected))
    assert not [r.text for r in after if "new episodes" in r.text]
    assert_same(resumed.arrays, trainer.arrays)


def test_a_run_stopped_in_an_evaluation_makes_it_again(tmp_path):
    settings = config(evaluation={"target_return": None})
    whole, trainer = play(settings, Solo(), tmp_path / "whole")
    checkpoints = Checkpoints(tmp_path / "parts", Solo())
    for stopped_at in (600, 900):  # each in the second evaluation that it makes
        snapshot = checkpoints.newest(print)
        begun = Trainer(settings, Solo(), snapshot)
        evaluations, play_episodes = [0], begun.worker.evaluator._play

        def interrupted(*arguments, evaluations=evaluations, play_episodes=play_episodes):
            evaluations[0] += 1
            return play_episodes(*arguments)

        begun.worker.evaluator._play = interrupted
        begun._stop = begun.worker.evaluator._stop = lambda evaluations=evaluations: evaluations[0] >= 2
        records = list(begun.train(checkpoints))
        begun.close()
        assert records[-1].kind == "stopped"
        assert records[-1].row["total_steps"] == stopped_at
        assert sum(r.kind == "evaluation" for r in records) == 1
    assert checkpoints.newest(print).state["evaluation_due"]
    after, resumed = play(settings, Solo(), tmp_path / "parts", checkpoints.newest(print))
    assert not checkpoints.newest(print).state["evaluation_due"]
    assert str(without_times(after)[-1]) == str(without_times(whole)[-1])
    assert_same(resumed.arrays, trainer.arrays)


def newest_stays_resumable(checkpoints):
    """Every save leaves a checkpoint to go on from, if there was one."""
    save, seen = checkpoints.save, []

    def watched(total_steps, *arguments, **options):
        saved = save(total_steps, *arguments, **options)
        newest = checkpoints.newest(print)
        seen.append(newest and newest.total_steps)
        assert newest is not None or not any(seen)
        return saved

    checkpoints.save = watched
    return seen


def test_an_evaluation_takes_no_checkpoint_away(tmp_path):
    # Each evaluation is the best so far, or as good; the last is made where the last checkpoint was.
    settings = config(
        evaluation={"target_return": None, "epsilon": 1.0, "max_episode_steps": 2},
        checkpoint={"period": 480, "keep": 1},
    )
    checkpoints = Checkpoints(tmp_path, Solo(), keep=1)
    seen = newest_stays_resumable(checkpoints)
    trainer = Trainer(settings, Solo())
    assert list(trainer.train(checkpoints))[-1].kind == "result"
    trainer.close()
    assert seen == [300, 480, 480, 480, 960]  # at 600 and 900 weights alone
    assert trainer.worker.best == (2.0, 960)
    assert checkpoints.weights(960, print) is not None


def test_the_evaluation_that_a_resumed_run_makes_again_leaves_what_it_came_from(tmp_path):
    settings, checkpoints = config(evaluation={"target_return": None}), Checkpoints(tmp_path, Solo())
    begun = Trainer(settings, Solo())
    begun._stop = begun.worker.evaluator._stop = lambda: (
        begun.worker.plan.total_steps_after(0) and begun.worker.updates > 0
    )
    assert list(begun.train(checkpoints))[-1].kind == "stopped"
    begun.close()
    snapshot = checkpoints.newest(print)
    snapshot.state["evaluation_due"] = True
    resumed = Trainer(settings, Solo(), snapshot)
    records = resumed.train(checkpoints)
    while next(records).kind != "evaluation":
        pass
    next(records)  # past what keeps the best evaluation; here the job is killed
    resumed.close()
    assert resumed.worker.best is not None
    assert resumed.worker.best[1] == snapshot.total_steps
    assert checkpoints.newest(print).total_steps == snapshot.total_steps


def test_weights_that_could_not_be_written_are_not_the_best(tmp_path):
    settings = config(
        evaluation={"target_return": None, "epsilon": 1.0, "max_episode_steps": 2},
        checkpoint={"on_failure": "continue"},
    )
    checkpoints = Checkpoints(tmp_path, Solo())
    save = checkpoints.save

    def full_at_600(total_steps, *arguments, **options):
        if total_steps == 600:
            raise JobError("No space left on device.")
        return save(total_steps, *arguments, **options)

    checkpoints.save = full_at_600
    trainer = Trainer(settings, Solo())
    for record in trainer.train(checkpoints):
        if record.kind == "report" and 600 < record.row["total_steps"] < 900:
            assert trainer.worker.best == (2.0, 300)
            assert checkpoints.weights(300, print) is not None
    trainer.close()
    assert trainer.worker.best == (2.0, 960)


def test_a_run_that_was_filling_its_replay_goes_on_filling_it(tmp_path):
    settings = config(evaluation={"target_return": None})
    play(settings, Solo(), tmp_path)
    snapshot = Checkpoints(tmp_path, Solo()).newest(print)._replace(complete=False)
    longer = settings.model_copy(update={"total_steps": 1_920})
    resumed = Trainer(longer, Solo(), snapshot)
    assert resumed.worker.plan.learns_from == 960 + 240
    held = snapshot._replace(total_steps=1_000, state=resumed.worker.state(1_000, finished=False))
    resumed.worker.regroup(held, joined=False)  # as an elastic job does that has lost a rank meanwhile
    resumed.close()
    assert resumed.worker.plan.learns_from == 960 + 240


def test_a_job_that_lost_ranks_saves_again_where_it_had_saved_with_them(tmp_path):
    checkpoints = Checkpoints(tmp_path, Solo())
    settings = config(evaluation={"target_return": None}, checkpoint={"period": 960})
    trainer = Trainer(settings, Solo(), None, lambda: trainer.worker.updates > 0)
    state, weights = trainer.worker.state(0, finished=False), trainer.worker.learner.state()
    assert list(trainer.train(checkpoints))[-1].kind == "stopped"
    saved = checkpoints.newest(print)
    shutil.rmtree(saved.path)
    assert trainer.worker.updates > 0
    trainer.worker.regroup(saved._replace(total_steps=0, state=state, arrays=weights), joined=False)
    assert trainer.worker.updates == 0
    assert_same(trainer.worker.learner.state(), weights)
    assert list(trainer.train(checkpoints))[-1].row["total_steps"] == saved.total_steps
    trainer.close()
    assert checkpoints.newest(print).total_steps == saved.total_steps


def test_without_its_replay_a_resumed_run_fills_a_new_one_before_it_learns(tmp_path):
    settings = config(evaluation={"target_return": None}, checkpoint={"save_replay": False})
    _, trainer = play(settings, Solo(), tmp_path)
    snapshot = Checkpoints(tmp_path, Solo()).newest(print)
    assert snapshot.total_steps == 960
    assert all(np.array_equal(array, snapshot.arrays[name]) for name, array in trainer.worker.learner.state().items())

    longer = settings.model_copy(update={"total_steps": 1_920})
    records, resumed = play(longer, Solo(), tmp_path, snapshot)
    assert "filled again" in records[0].text
    assert records[1].row["total_steps"] > 960
    assert records[1].row["updates"] == trainer.worker.updates  # nothing is learned from an empty replay
    assert resumed.worker.updates > trainer.worker.updates
    assert records[-1].row["seconds"] > trainer.worker.ledger.state()["seconds"] / 2


@pytest.mark.parametrize("changes", [{"env": {"envs_per_rank": 6}}, {"replay": {"capacity": 1_200}}])
def test_rings_of_another_size_are_dealt_the_same_transitions(changes, tmp_path):
    settings = config(evaluation={"target_return": None}, replay={"capacity": 5_000})
    _, trainer = play(settings, Solo(), tmp_path)
    longer = config(
        **{"replay": {"capacity": 5_000}, "evaluation": {"target_return": None}, "total_steps": 1_440, **changes}
    )
    records, _ = play(longer, Solo(), tmp_path, Checkpoints(tmp_path, Solo()).newest(print))
    assert "960 transitions of 1 rank redistributed to 1: 960" in records[0].text
    learned = [r.row["updates"] for r in records if r.kind == "report"]
    assert learned[0] > trainer.worker.updates  # at once


def test_each_of_two_ranks_takes_its_own_share_of_what_one_has_stored(tmp_path):
    settings = config(evaluation={"target_return": None})
    _, trainer = play(settings, Solo(), tmp_path)
    shares = []
    for rank in (0, 1):
        snapshot = Checkpoints(tmp_path, Solo()).newest(print)
        taken = Trainer(settings.model_copy(update={"total_steps": 1_920}), TapeWorld(rank, 2), snapshot)
        shares.append(stored(taken.worker.replay))
        taken.close()
    assert min(len(share) for share in shares) > 400
    assert sorted(shares[0] + shares[1]) == sorted(stored(trainer.worker.replay))


def stored(replay) -> list[bytes]:
    """The observations of all transitions."""
    arrays = replay.arrays()
    return [frame.tobytes() for frame in arrays["frames"][arrays["step_types"] != NOTHING]]


def test_a_smaller_replay_is_dealt_the_newest_of_what_was_stored(tmp_path):
    settings = config(evaluation={"target_return": None}, replay={"capacity": 5_000})
    play(settings, Solo(), tmp_path)
    smaller = config(evaluation={"target_return": None}, replay={"capacity": 600}, total_steps=1_440)
    snapshot = Checkpoints(tmp_path, Solo()).newest(print)
    trainer = Trainer(smaller, Solo(), snapshot)
    trainer.close()
    assert trainer.worker.replay.state()["slots"] == trainer.worker.plan.slots_per_env < 80
    assert "dropped" in trainer.worker.messages[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    small = config(total_steps=408, evaluation={"target_return": None}, env={"envs_per_rank": 2, "normalize_observation": True},
                   agent={"epsilon_zeta": 2.0})  # fmt: skip
    play(small, Solo(), folder)
    return folder / "checkpoints" / "408", small


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def places(tree, depth=2):
    """The ways to all values of `tree`, to a depth: tuples of keys."""
    for key in tree if isinstance(tree, dict) else ():
        yield (key,)
        if depth > 1:
            yield from ((key, *rest) for rest in places(tree[key], depth - 1))


@given(data=st.data(), file=st.sampled_from(["rank-00000.json", "state.json"]), value=JSON)
@settings(max_examples=40)
def test_a_checkpoint_with_other_contents_is_refused_in_words_or_taken(saved, tmp_path_factory, data, file, value):
    source, small = saved
    path = tmp_path_factory.mktemp("fuzz") / "checkpoints" / "408"
    shutil.copytree(source, path)
    tree = json.loads((path / file).read_text())
    *way, last = data.draw(st.sampled_from(list(places(tree))))
    functools.reduce(operator.getitem, way, tree)[last] = value
    (path / file).write_text(json.dumps(tree))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"][file] = entry_of(path / file)._asdict()
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    snapshot = Checkpoints(path.parent.parent, Solo()).newest(print)
    if snapshot is not None:
        with contextlib.suppress(InputError, RunError):
            Trainer(small.model_copy(update={"total_steps": 960}), Solo(), snapshot).close()


class Voting(TapeWorld):
    """Whose other ranks vote as `others` says, whatever this one does."""

    others = 0.0

    def max(self, values):
        return np.full(np.shape(values), self.others)


@pytest.mark.parametrize("others", [0.0, 1.0])
def test_all_ranks_stop_or_none_does(others, tmp_path):
    world = Voting(1, 2)
    world.others = others
    trainer = Trainer(config(evaluation={"target_return": None}), world, None, lambda: not others)
    records = list(trainer.train(Checkpoints(tmp_path, world)))
    trainer.close()
    assert records[-1].kind == ("stopped" if others else "result")
    # The first vote: a period of 100 total steps is one of 144, those of three phases.
    assert records[-1].row["total_steps"] == (144 if others else 960)


class Quiet(Solo):
    """Asks `busy` whether a phase is under way whenever the main thread enters a collective."""

    size = 2

    def __init__(self):
        super().__init__()
        self.busy, self.asked = lambda: False, 0

    def _check(self):
        if threading.current_thread() is threading.main_thread():
            self.asked += 1
            assert not self.busy()

    def sum(self, values):
        self._check()
        return super().sum(values)

    def max(self, values):
        self._check()
        return super().max(values)

    def gather(self, value):
        self._check()
        return [value] * 2

    def barrier(self):
        self._check()


@pytest.mark.parametrize("samples_per_insert", [0.5, 1])  # an update in every second period, or in each
@pytest.mark.parametrize("sync", ["gradients", "parameters"])
def test_ranks_meet_in_no_collective_while_a_phase_is_under_way(sync, samples_per_insert, tmp_path):
    world = Quiet()
    settings = config(
        learner={"overlap": True, "samples_per_insert": samples_per_insert},
        ranks={"sync": sync, "vote_period": 48}, evaluation={"target_return": None}, report={"period": 500},
    )  # fmt: skip
    trainer = Trainer(settings, world, None, lambda: trainer.worker.updates >= 4)
    world.busy = lambda: trainer.worker._phase is not None
    records = list(trainer.train(Checkpoints(tmp_path, world)))
    trainer.close()
    assert records[-1].kind == "stopped"
    assert 4 <= trainer.worker.updates < trainer.worker.plan.updates_after(trainer.worker.plan.cycles - 1)
    assert world.asked > 10


def test_of_equal_evaluations_the_newest_is_the_best(tmp_path):
    # Episodes of Identity have a length of one step, and this return whatever is done.
    always = config(env={"id": "hvd_dqn.envs.identity:Identity-v0", "kwargs": {"n": 1, "length": 2}})
    trainer = Trainer(always.model_copy(update={"total_steps": 720}), Solo())
    records = list(trainer.train(Checkpoints(tmp_path, Solo())))
    trainer.close()
    assert [r.row["total_steps"] for r in records if r.kind == "evaluation"] == [300, 600, 720]
    assert trainer.worker.best == (2.0, 720)


@pytest.mark.parametrize(
    ("nonfinite", "told"), [(0, "The gradient on rank 1 is not"), (1, "The loss on rank 1 is not")]
)
def test_all_ranks_are_told_which_one_skipped_updates(nonfinite, told):
    world = TapeWorld(0, 2)
    world.gather = lambda mine: [mine, (nonfinite, 2)]
    trainer = Trainer(config(ranks={"sync": "parameters"}), world)
    trainer.worker._phase = lambda: Phase(4, 0.0, 0.0, 0.0, 0, 0, True, 1.0, 0.0, None)
    with pytest.raises(JobError, match=f"{told} finite after .* total steps: 2 of 4 updates"):
        trainer._finish_phase()
    trainer.close()


def test_the_running_mean_is_that_of_all_observations(tmp_path):
    _, trainer = play(config(env={"normalize_observation": True}, evaluation={"target_return": None}), Solo(), tmp_path)
    assert trainer.worker.statistics.state()["count"] == 960
    assert np.any(trainer.worker.statistics.mean)


def test_a_run_that_cannot_go_on_exactly_draws_other_numbers_than_at_its_start(tmp_path):
    settings = config(evaluation={"target_return": None}, checkpoint={"save_replay": False})
    _, first = play(settings, Solo(), tmp_path)
    longer = settings.model_copy(update={"total_steps": 1_920})
    resumed = Trainer(longer, Solo(), Checkpoints(tmp_path, Solo()).newest(print))
    resumed.close()
    assert resumed.worker._rng(0).random() != first.worker._rng(0).random()


def test_environments_that_cannot_be_put_back_end_their_episodes_in_the_replay(tmp_path, monkeypatch):
    settings = config(evaluation={"target_return": None})
    _, trainer = play(settings, Solo(), tmp_path)
    monkeypatch.setattr("hvd_dqn.envs.environments.Environments.probe", lambda self: False)
    longer = settings.model_copy(update={"total_steps": 1_920})
    records, resumed = play(longer, Solo(), tmp_path, Checkpoints(tmp_path, Solo()).newest(print))
    assert "12 of 12 environments start new episodes" in records[0].text

    def count(worker):
        return int(np.count_nonzero(worker.replay.arrays()["step_types"] == TRUNCATED))

    assert count(trainer.worker) == 0  # CartPole is never truncated so early
    assert count(resumed.worker) > 0


def test_a_finished_run_has_nothing_left_to_train(tmp_path):
    play(config(evaluation={"target_return": None}), Solo(), tmp_path)
    with pytest.raises(InputError, match="nothing left to train"):
        Trainer(config(), Solo(), Checkpoints(tmp_path, Solo()).newest(print))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_what_is_not_finite_stops_the_job_or_is_skipped_and_counted(policy, tmp_path):
    settings = config(evaluation={"target_return": None}, learner={"on_nonfinite": policy})
    trainer = Trainer(settings, Solo())
    gather, calls = trainer.worker.replay.gather, []

    def infinite(draw):
        batch = gather(draw)
        calls.append(draw)
        if len(calls) == 3:
            batch.reward[0, 0] = np.inf
        return batch

    trainer.worker.replay.gather = infinite
    if policy == "stop":
        with pytest.raises(JobError, match=r"The loss on rank 0 is not finite after .* total steps: 1 of \d+ updates"):
            list(trainer.train(Checkpoints(tmp_path, Solo())))
    else:
        records = list(trainer.train(Checkpoints(tmp_path, Solo())))
        assert sum(r.row["skipped_updates"] for r in records if r.kind == "report") == 1
    assert all(np.isfinite(array).all() for array in trainer.worker.learner.state().values())
    trainer.close()


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_checkpoint_that_cannot_be_written_stops_the_job_or_is_done_without(policy, tmp_path, monkeypatch):
    settings = config(evaluation={"target_return": None}, checkpoint={"on_failure": policy})
    save, saves = Checkpoints._write_part, []

    def full(self, target, part):
        saves.append(target.name)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        return save(self, target, part)

    monkeypatch.setattr(Checkpoints, "_write_part", full)
    trainer = Trainer(settings, Solo())
    if policy == "stop":
        with pytest.raises(JobError, match=r"No space left on device.*Free space and use --resume"):
            list(trainer.train(Checkpoints(tmp_path, Solo())))
        assert Checkpoints(tmp_path, Solo()).newest(print).total_steps == 300
    else:
        records = list(trainer.train(Checkpoints(tmp_path, Solo())))
        assert [r.text for r in records if "continues without it" in r.text]
        assert Checkpoints(tmp_path, Solo()).newest(print).total_steps == 960
    trainer.close()


def test_who_asks_to_stop_is_told_where_no_checkpoint_could_be_written(tmp_path, monkeypatch):
    def full(self, target, part):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_write_part", full)
    settings = config(evaluation={"target_return": None}, checkpoint={"on_failure": "continue"})
    trainer = Trainer(settings, Solo(), None, lambda: True)
    with pytest.raises(JobError, match="Asked to stop after 144 total steps, and no checkpoint could be written"):
        list(trainer.train(Checkpoints(tmp_path, Solo())))
    trainer.close()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    play(config(), Solo(), tmp_path)
    snapshot = Checkpoints(tmp_path, Solo()).newest(print)
    with pytest.raises(InputError, match="does not fit these settings"):
        Trainer(config(agent={"hidden": [9]}), Solo(), snapshot)


@pytest.mark.parametrize("id", ["FrozenLake-v1", "hvd_dqn.envs.identity:Identity-v0"])
def test_observations_that_are_states_cannot_be_normalised(id):
    with pytest.raises(InputError, match="normalize_observation is for observations of real numbers"):
        Trainer(config(env={"id": id, "normalize_observation": True}), Solo())


@pytest.mark.parametrize(
    "changes",
    [
        {"env": {"id": "FrozenLake-v1"}},
        {"env": {"frame_stack": 3, "normalize_observation": True}, "agent": {"n_step": 3, "dueling": True}},
        {"env": {"vectorization": "auto", "reward_clip": 0.5}, "agent": {"epsilon_ladder": 7.0, "loss": "squared"}},
        {"env": {"vectorization": "async", "envs_per_rank": 2}, "ranks": {"backward_passes_per_step": 2}},
        {"agent": {"network": "tests.unit.agent.test_networks:keras_model"}, "learner": {"xla": True}},
    ],
    ids=["states", "stack", "native", "async", "keras"],
)
def test_every_kind_of_setting_trains(changes, tmp_path):
    records, trainer = play(config(**changes), Solo(), tmp_path)
    assert records[-1].kind == "result"
    assert trainer.worker.learner.compiled == changes.get("learner", {}).get("xla", False)


def test_a_run_keeps_what_its_settings_say_and_its_best_can_be_evaluated(tmp_path, capsys):
    run = Run(tmp_path / "run")
    settings = config(evaluation={"target_return": None}, checkpoint={"period": 200, "keep": 1, "compress": True})
    job.train_in_world(settings, "cartpole", run, Solo(), StopRequest(), resume=False)
    best = run.about()["best"][1]
    assert {path.name for path in (run.path / "checkpoints").iterdir()} == {"960", str(best)}
    with zipfile.ZipFile(run.path / "checkpoints" / "960" / "replay-00000-of-00001.npz") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_DEFLATED}
    assert best != 960
    for words, steps in (([], 960), (["--best"], best)):
        capsys.readouterr()
        evaluate.run([str(run.path), "--episodes", "1", "--json", *words], Solo())
        assert json.loads(capsys.readouterr().out)["total_steps"] == steps


@pytest.mark.parametrize("due", [False, True])
def test_an_evaluation_that_was_broken_off_is_told_once(due, tmp_path):
    run, settings = Run(tmp_path / "run"), config(evaluation={"target_return": None})
    job.train_in_world(settings, "cartpole", run, Solo(), StopRequest(), resume=False)
    snapshot = Checkpoints(run.path, Solo()).newest(print)
    snapshot = snapshot._replace(total_steps=600, state=snapshot.state | {"evaluation_due": due})
    trainer = Trainer(settings, Solo())
    with open_session(run, "cartpole", trainer, snapshot, sys.stdout):
        pass
    trainer.close()
    assert read_csv(run.path / "evaluations.csv")["total_steps"].tolist() == ([300] if due else [300, 600])


@pytest.mark.parametrize(("elastic", "silence"), [(False, 7.0), (True, None)])
def test_the_watchdog_has_the_patience_that_is_set(elastic, silence, tmp_path, monkeypatch):
    given, world, watchdog, beats = [], Solo(), NullWatchdog(), []
    watchdog.beat = beats.append
    world.elastic = elastic  # there Horovod finds out who is gone
    monkeypatch.setattr("hvd_dqn.training.trainer.open_watchdog", lambda *asked: given.append(asked) or watchdog)
    trainer = Trainer(config(ranks={"silence_seconds": 7.0, "stall_seconds": 70.0}), world)
    records = list(trainer.train(Checkpoints(tmp_path, world)))
    trainer.close()
    assert given == [(world, silence, 70.0)]
    # It hears of each step, of training and of an evaluation.
    assert [beat for beat in beats if beat.startswith("cycle")] == [f"cycle {cycle}" for cycle in range(25)]
    assert beats.count("evaluation") >= 2 * records[-1].row["length_mean"]
    assert trainer.worker.ledger.spent["evaluate"] > 0 < trainer.worker.ledger.spent["save"]


def test_a_rank_with_other_settings_does_not_join(tmp_path, monkeypatch):
    settings = config()
    play(settings, Solo(), tmp_path)
    theirs = Checkpoints(tmp_path, Solo()).newest(print)

    class Joined(Solo):
        elastic = True

        def furthest(self, held, total_steps):
            return (theirs, config(seed=1).digest()), True

        def recovers_from(self, error):
            return False

        def abort(self, reason):
            raise RunError(reason)

    monkeypatch.setattr(job, "ElasticWorld", Joined)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with pytest.raises(RunError, match="started with other settings than those that are training"):
        job.train_elastically(settings, "cartpole", Run(tmp_path / "run"), StopRequest(), resume=False)


def test_what_was_learned_is_evaluated_as_it_was_in_training(tmp_path, monkeypatch):
    settings = config(env={"normalize_observation": True}, evaluation={"target_return": None, "epsilon": 0.2})
    play(settings, Solo(), tmp_path)
    checkpoints, seen = Checkpoints(tmp_path, Solo()), []
    again = Trainer(settings.model_copy(update={"total_steps": 1_920}), Solo(), checkpoints.newest(print))
    expected = again.worker.evaluator.evaluate(3, round=0)
    again.close()
    array = Preprocess.array
    monkeypatch.setattr(Preprocess, "array", lambda self, raw: seen.append(array(self, raw)) or seen[-1])
    row = job.evaluate_in_world(settings, Solo(), checkpoints.weights(None, print))
    assert row._asdict() == {"total_steps": 960, **expected}
    assert len(seen) >= row.length_mean  # by what it saw, as well as by what came of it


@pytest.mark.parametrize(
    ("method", "error", "line"),
    [
        ("write", RunError, r"run cannot be written: .*No space left on device\. Free space and use --resume"),
        ("__init__", InputError, r"Cannot write the run directory .*run: No space left on device"),
    ],
)
def test_files_that_cannot_be_written_end_a_run_with_one_line(method, error, line, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CsvWriter, method, full)
    with pytest.raises(error, match=line):
        job.train_in_world(config(), "cartpole", Run(tmp_path / "run"), Solo(), StopRequest(), resume=False)
    if method == "write":
        assert Run(tmp_path / "run").about()["ended"].startswith("failed: RunError")


LONG = {"target_return": None}


@pytest.mark.parametrize("last", [False, True])
def test_a_run_that_an_evaluation_ends_is_resumed_from_just_before_it(last, tmp_path, monkeypatch):
    # 960 steps of training with three evaluations in it, then the last one.
    settings = config(env={"id": "Crashes-v0"}, evaluation=LONG, checkpoint={"period": 10_000})
    whole, trainer = play(settings, Solo(), tmp_path / "whole")
    evaluations = [(r.row["total_steps"], r.row["return_mean"]) for r in whole if r.kind == "evaluation"]
    assert [steps for steps, _ in evaluations] == [300, 600, 900, 960]

    play_episodes, evaluated = Evaluator._play, []

    def crashing(self, *arguments):
        evaluated.append(None)
        if len(evaluated) == (4 if last else 1):
            Crashes.at = Crashes.steps + 4
        return play_episodes(self, *arguments)

    monkeypatch.setattr(Crashes, "at", -1)
    monkeypatch.setattr(Evaluator, "_play", crashing)
    with pytest.raises(RunError, match=r"in an evaluation, failed .*out of licences"):
        play(settings, Solo(), tmp_path / "parts")

    checkpoints = Checkpoints(tmp_path / "parts", Solo())
    snapshot = checkpoints.newest(print)
    assert snapshot.total_steps == (960 if last else 300)
    assert snapshot.state["evaluation_due"] != last  # the last one needs no note
    after, resumed = play(settings, Solo(), tmp_path / "parts", snapshot)
    again = [(r.row["total_steps"], r.row["return_mean"]) for r in after if r.kind == "evaluation"]
    assert again == (evaluations[-1:] if last else evaluations)
    assert_same(resumed.arrays, trainer.arrays)


def test_between_the_first_and_the_last_evaluation_only_the_period_makes_checkpoints(tmp_path):
    records, _ = play(config(evaluation=LONG, checkpoint={"period": 500}), Solo(), tmp_path)
    saved = [r.text.split()[2] for r in records if r.text.startswith("checkpoint at")]
    assert saved == ["300", "504", "960"]  # and each is written once


def test_an_evaluation_that_is_over_is_not_made_again(tmp_path):
    settings = config(evaluation=LONG, checkpoint={"period": 300})
    play(settings, Solo(), tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        state = load(path).state
        assert (state["evaluation_due"], state["finished"]) == (False, path.name == "960")
        assert state["best"][1] <= int(path.name)


def test_episodes_that_do_not_end_are_told_once_and_do_not_take_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr("hvd_dqn.training.worker.ENDLESS_EVALUATION_STEPS", 40)
    records, trainer = play(config(env={"id": "Endless-v0"}, evaluation=LONG), Solo(), tmp_path)
    kinds = [r.kind for r in records]
    (told,) = [i for i, r in enumerate(records) if "No episode has ended" in r.text]
    assert told < kinds.index("evaluation")
    assert re.search(
        r"in 25 steps of each .* cut off after 40 steps.*--env.max-episode-steps.*--evaluation.max", records[told].text
    )
    assert {r.row["length_mean"] for r in records if r.kind == "evaluation"} == {40}
    assert trainer.worker.best is None
    assert records[-1].row["return_mean"] == 40


def test_once_an_episode_has_ended_evaluations_are_whole_and_count(tmp_path, monkeypatch):
    monkeypatch.setattr("hvd_dqn.training.worker.ENDLESS_EVALUATION_STEPS", 40)
    monkeypatch.setattr(Endless, "ends_after", 60)  # of 80 steps of each environment
    settings = config(env={"id": "Endless-v0"}, evaluation={"target_return": 30.0, "final_episodes": 3})
    records, trainer = play(settings, Solo(), tmp_path)
    lengths = [r.row["length_mean"] for r in records if r.kind == "evaluation"]
    assert lengths == [40, 40, 60, 60]  # and the first two did not reach the target
    assert trainer.worker.best == (60, 900)
    assert records[-1].row["total_steps"] == 900


@pytest.mark.parametrize("limit", [None, 100])
def test_a_report_tells_of_a_run_in_which_no_episode_ends(limit, tmp_path, monkeypatch):
    monkeypatch.setattr("hvd_dqn.training.worker.ENDLESS_STEPS", 50)
    kwargs = {} if limit is None else {"max_episode_steps": limit}
    settings = config(env={"id": "Endless-v0", "kwargs": kwargs}, evaluation={"period": 10_000, "max_episode_steps": 5})
    records, _ = play(settings, Solo(), tmp_path)
    told = [r.text for r in records if "No episode has ended" in r.text]
    assert [text.split(" steps of each")[0] for text in told] == ([] if limit else ["No episode has ended yet, in 50"])


def test_readings_that_were_held_are_counted_and_told_once(tmp_path):
    run = Run(tmp_path / "run")
    settings = config(env={"id": "Gaps-v0", "on_nonfinite": "hold"}, evaluation=LONG)
    job.train_in_world(settings, "gaps", run, Solo(), StopRequest(), resume=False)
    counted = read_csv(run.path / "metrics.csv")["held_readings"]
    assert (counted > 0).all()
    records, _ = play(settings, Solo(), tmp_path / "again")
    told = [r.text for r in records if "not finite" in r.text]
    assert len(told) == 1
    assert re.search(r"The first: environment \d+ \(Gaps-v0\) on rank 0 in step \d+: nan at index \[1\]\.", told[0])
    assert [r.row["held_readings"] for r in records if r.kind == "report"] == counted.tolist()


def test_an_old_run_may_go_on_with_more_columns_and_back(tmp_path):
    run, settings = Run(tmp_path / "run"), config(evaluation=LONG)
    for steps, restarts in [(480, 0), (720, 3), (960, 0)]:
        now = settings.model_copy(
            update={"total_steps": steps, "env": settings.env.model_copy(update={"restart_failed_envs": restarts})}
        )
        job.train_in_world(now, "cartpole", run, Solo(), StopRequest(), resume=steps > 480)
    table = read_csv(run.path / "metrics.csv")
    assert table["total_steps"].tolist() == [120, 240, 360, 480, 600, 720, 840, 960]
    assert np.isnan(table["env_restarts"]).tolist() == [True] * 4 + [False] * 2 + [True] * 2


def test_the_running_mean_leaves_out_rows_that_are_no_transitions(tmp_path):
    settings = config(env={"normalize_observation": True, "vectorization": "auto"}, evaluation=LONG)
    records, trainer = play(settings, Solo(), tmp_path)
    resets = sum(r.row["episodes"] for r in records if r.kind == "report")
    assert trainer.worker.statistics.state()["count"] == trainer.worker.replay._step_types.astype(bool).sum()
    assert 960 - resets <= trainer.worker.statistics.state()["count"] <= 960 - resets + 12 < 960


@pytest.mark.parametrize("part", ["observations/mean", "rewards/scale"])
def test_statistics_that_differ_between_ranks_are_drift(part):
    class Other(Solo):
        size = 2

        def max(self, values):
            half = len(values) // 2
            return np.concatenate([values[:half], values[half:] + (np.arange(half) == self.odd)])

        def gather(self, value):
            return [value, value + (np.arange(len(value)) == self.odd)]

    world = Other()
    trainer = Trainer(config(env={"normalize_observation": True, "normalize_reward": True}), world)
    names = [*trainer.worker.learner.variables, *trainer.worker.shared()]
    world.odd = names.index(part)
    with pytest.raises(JobError, match=f"on rank 1 the variables {part} differ"):
        trainer._check_drift("now")
    trainer.close()


def test_rewards_are_learned_in_deviations_of_the_return_and_reported_as_they_are(tmp_path):
    plain, normal = (
        play(config(env={"normalize_reward": on}, evaluation=LONG), Solo(), tmp_path / str(on))[1]
        for on in (False, True)
    )
    rewards = normal.worker.replay.arrays()["rewards"]
    np.testing.assert_array_equal(rewards, plain.worker.replay.arrays()["rewards"])
    learned = normal.worker.rewards.learned(np.float32([1.0]))
    # CartPole's discounted returns grow from 1 to about 10 in an episode.
    assert 0.1 < learned[0] < 0.5
    assert not np.array_equal(plain.arrays["learner/online/0"], normal.arrays["learner/online/0"])


def test_settings_of_cleaning_that_would_have_no_effect_are_refused():
    #    settings                                                    message
    for env, message in [
        ({"clip_observation": 5.0}, "clip_observation is in deviations.*Received: 5"),
        ({"id": "FrozenLake-v1", "on_nonfinite": "hold"}, "hold is for observations of real numbers. Received: one-hot"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            Trainer(config(env=env), Solo())


def test_a_held_action_ends_with_its_episode(tmp_path):
    trainer = Trainer(config(agent={"epsilon_zeta": 1.0001}), Solo())  # actions are held for very long
    worker, actor = trainer.worker, trainer.worker.actor
    worker.begin_episodes()
    ended = 0
    for cycle in range(80):
        before = worker.envs._lengths.copy()
        worker.step(cycle)
        over = worker.envs._lengths <= before
        ended += over.sum()
        assert not actor._left[over].any()
        assert actor._left[~over].max() > 100
    assert ended > 10
    trainer.close()
