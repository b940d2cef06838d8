"""The benchmark of whole training: its settings on any number of ranks, and what it counts."""

import itertools
import json
import sys
from types import SimpleNamespace

import pytest

from hvd_dqn.agent.learner import Learner
from hvd_dqn.bench import loop as bench_loop
from hvd_dqn.bench.loop import TRAINING_CASES, case_config
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.training.plan import Plan


@pytest.mark.parametrize(
    ("case", "cycles", "updates"), [("cartpole-zoo", 256, 128), ("cartpole-16", 1, 4), ("pixels", 1, 4)]
)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_rank_of_many_does_in_each_phase_what_one_alone_does(case, cycles, updates, ranks):
    config = case_config(case, ranks)
    plan = Plan(config, ranks)
    learning = [cycle for cycle in range(plan.cycles) if plan.learns_at(cycle)]
    late = learning[2:12]  # after those that are not measured
    assert all(b - a == cycles for a, b in itertools.pairwise(late))
    assert [plan.updates_at(cycle) for cycle in late] == [updates] * len(late)
    assert (plan.envs_per_rank, plan.batch_per_rank) == (
        config.env.envs_per_rank,
        TRAINING_CASES[case].settings["learner"]["batch_size"],
    )
    # Between copies into the target a rank takes as many updates as alone.
    assert config.learner.target_period == ranks * TRAINING_CASES[case].settings["learner"]["target_period"]
    assert plan.slots_per_env == Plan(case_config(case, 1), 1).slots_per_env


def test_the_zoos_settings_are_the_zoos():
    config = case_config("cartpole-zoo", 1)
    learner, agent = config.learner, config.agent
    assert (learner.learning_rate, learner.batch_size, learner.learn_start) == (2.3e-3, 64, 1000)
    plan = Plan(config, 1)
    cycle = next(c for c in range(3_000, plan.cycles) if plan.learns_at(c))
    # Its period of 10 steps is over whenever a phase begins, and never within one.
    assert plan.updates_at(cycle) == 128
    assert plan.target_copies_at(cycle).sum() == 1
    assert (agent.hidden, agent.double, agent.loss, agent.gamma, agent.epsilon_end) == (
        (256, 256),
        False,
        "huber",
        0.99,
        0.04,
    )
    assert agent.epsilon_steps == 0.16 * 50_000


def test_another_batch_keeps_the_samples_per_insert_and_the_updates_of_a_phase():
    plan = Plan(case_config("cartpole-16", 2, batch=32, envs=8), 2)
    assert (plan.global_batch, plan.envs_per_rank, plan.config.learner.train_period) == (64, 8, 16)
    assert plan.config.learner.samples_per_insert == case_config("cartpole-16", 1).learner.samples_per_insert
    assert plan.updates_at(plan.cycles - 1) == 4


@pytest.mark.parametrize(
    "arguments", [{"batch": 128}, {"batch": 256}, {"envs": 4}, {"envs": 64}, {"batch": 8, "envs": 2}]
)
def test_what_is_compiled_makes_as_many_updates_in_every_phase(arguments):
    plan = Plan(case_config("cartpole-16", 1, **arguments), 1)
    counts = [plan.updates_at(cycle) for cycle in range(plan.cycles) if plan.learns_at(cycle)]
    assert len(set(counts[1:])) == 1


def test_more_environments_have_room():
    assert Plan(case_config("pixels", 1, envs=1_000), 1).envs == 1_000


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"name": "pixel"}, "no case 'pixel'. Did you mean `pixels`"),
        ({"name": "pixels", "total_steps": 512}, "--total-steps must be at least 608, .* 512"),
        ({"name": "pixels", "total_steps": 0}, "--total-steps must be at least 608, .* 0"),
        ({"name": "cartpole-16", "batch": 96}, "in the proportion of 64 to 16. Received: 96 and 16"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, line):
    with pytest.raises(InputError, match=line):
        case_config(ranks=1, **arguments)


class FasterClock:
    """Each look at it takes a second."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def test_steps_and_updates_after_the_second_phase_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(bench_loop, "time", FasterClock())
    phases, ready = [], []
    update = Learner.update
    monkeypatch.setattr(Learner, "update", lambda *arguments: phases.append(1) or update(*arguments))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=lambda: ready.append(len(phases))))
    result = bench_loop.measure(Solo(), "cartpole-16", total_steps=1_200, batch=8, envs=8, gate=True)
    assert capsys.readouterr().out == "ready\n"
    (row,) = json.loads(json.dumps(result))["results"]
    assert bench_loop.render(result).row_count == 9
    assert (row["case"], row["batch"], row["envs"], ready) == ("cartpole-16", 8, 8, [2])
    # Learning begins after 1,024 steps; phases end after 1,032 (the first), 1,040, ... 1,200: 20 whole ones are measured.
    assert (row["total_steps"], row["updates"]) == (160, 320)  # 16 * 8 / 8: two updates per step
    assert row["seconds"] == 20
    assert (row["steps_per_second"], row["updates_per_second"]) == (8, 16)
    assert row["phase"] == {
        "count": 20, "updates": 16.0, "seconds": 1.0, "least": 1.0, "deviation": 0.0, "message_bytes": 4 * 4_610,
    }  # fmt: skip
    assert [name for name, seconds in row["time"].items() if seconds > 0] == ["act", "env", "sample", "update"]
    assert row["time"]["communicate"] == row["time"]["idle"] == 0  # with whom?


def test_the_images_can_be_trained_on():
    (row,) = bench_loop.measure(Solo(), "pixels", total_steps=608)["results"]
    assert (row["total_steps"], row["updates"]) == (64, 16)  # four cycles, the least that is measured
    assert row["phase"]["message_bytes"] == 4 * 1_687_206  # the Nature CNN's
