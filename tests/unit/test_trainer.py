"""The loop: its collectives are the same on all ranks, one seed gives one run, and a run can be continued."""

from pathlib import Path

import numpy as np
import pytest

from hvd_dqn.checkpoint import Checkpoints
from hvd_dqn.config import Config
from hvd_dqn.distributed import Solo
from hvd_dqn.errors import InputError
from hvd_dqn.trainer import Trainer


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
        "learner": {"batch_size": 24, "replay_ratio": 2, "learn_start": 240, "train_period": 48, "target_period": 96},
        "evaluation": {"period": 300, "episodes": 3, "final_episodes": 5, "target_return": 5.0},
        "report": {"period": 120, "checkpoint_period": 400},
        "ranks": {"drift_check_period": 250},
    }
    for name, values in changes.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return Config.model_validate(base)


def play(config: Config, world, path: Path, snapshot=None):
    """Trains to the end; returns the records and the trainer. The tape, if any, also gets each phase's number of updates."""
    trainer = Trainer(config, world, snapshot)
    update = trainer.learner.update

    def recorded(batch, learning_rate, copies):
        if isinstance(world, TapeWorld):
            world.tape.append(f"updates {len(copies)} {learning_rate:.9f} {copies.tolist()}")
        return update(batch, learning_rate, copies)

    trainer.learner.update = recorded
    trainer.played, count = [], trainer.ledger.episodes
    trainer.ledger.episodes = lambda returns, lengths: (
        count(returns, lengths),
        trainer.played.extend(lengths.tolist()),
    )
    records = list(trainer.train(Checkpoints(path, world)))
    trainer.close()
    return records, trainer


@pytest.mark.parametrize("scaling", ["weak", "strong"])
@pytest.mark.parametrize("sync", ["gradients", "parameters"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_enter_the_same_collectives_although_their_episodes_differ(size, sync, scaling, tmp_path):
    settings = config(ranks={"sync": sync, "scaling": scaling}, env={"normalize_observation": sync == "parameters"})
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


def without_times(records) -> list:
    keep = lambda name: not name.startswith("time") and "seconds" not in name and "per_second" not in name  # noqa: E731
    return [(r.kind, {name: value for name, value in r.row.items() if keep(name)}) for r in records]


def test_one_seed_gives_one_run_and_another_seed_another(tmp_path):
    first, second = (without_times(play(config(), Solo(), tmp_path / str(i))[0]) for i in range(2))
    other = without_times(play(config(seed=1), Solo(), tmp_path / "other")[0])
    assert str(first) == str(second)  # as text, so that NaN equals NaN
    assert str(first) != str(other)


def test_a_run_reports_evaluates_and_ends_with_a_result(tmp_path):
    records, trainer = play(config(evaluation={"target_return": None}), Solo(), tmp_path)
    kinds = [record.kind for record in records]
    assert kinds.count("report") == 8
    assert kinds.count("evaluation") == 4  # at 300, 600, 900 and the last one
    assert kinds[-1] == "result"
    assert records[-1].row["episodes"] == 5
    assert records[-1].row["total_steps"] == 960
    assert trainer.updates == trainer.plan.updates_after(trainer.plan.cycles - 1)


def test_a_run_stops_at_the_target_when_the_final_evaluation_confirms_it(tmp_path):
    records, _ = play(config(), Solo(), tmp_path)  # CartPole never returns less than 5
    assert [(r.kind, r.row["episodes"]) for r in records[-3:]] == [("evaluation", 3), ("evaluation", 5), ("result", 5)]
    assert records[-1].row["total_steps"] == 300


def test_checkpoints_are_kept_and_continued_from(tmp_path):
    settings = config(evaluation={"target_return": None})
    _, trainer = play(settings, Solo(), tmp_path)
    snapshot = Checkpoints(tmp_path, Solo()).newest(print)
    assert snapshot.total_steps == 960
    assert all(np.array_equal(array, snapshot.arrays[name]) for name, array in trainer.learner.state().items())

    longer = settings.model_copy(update={"total_steps": 1_920})
    records, resumed = play(longer, Solo(), tmp_path, snapshot)
    assert records[0].row["total_steps"] > 960
    assert records[0].row["updates"] == trainer.updates  # nothing is learned from an empty replay
    assert resumed.updates > trainer.updates
    assert records[-1].row["seconds"] > trainer.ledger.state()["seconds"] / 2


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    play(config(), Solo(), tmp_path)
    snapshot = Checkpoints(tmp_path, Solo()).newest(print)
    with pytest.raises(InputError, match="does not fit these settings"):
        Trainer(config(agent={"hidden": [9]}), Solo(), snapshot)


@pytest.mark.parametrize("id", ["FrozenLake-v1", "hvd_dqn.envs:Identity-v0"])
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
        {"agent": {"network": "tests.unit.test_networks:keras_model"}, "learner": {"xla": True}},
    ],
    ids=["states", "stack", "native", "async", "keras"],
)
def test_every_kind_of_setting_trains(changes, tmp_path):
    records, _ = play(config(**changes), Solo(), tmp_path)
    assert records[-1].kind == "result"
