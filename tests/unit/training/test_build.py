"""What a person sets reaches the part that it is meant for, and what a part says reaches the metrics."""

import contextlib
import inspect
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

import hvd_dqn.training.build
import hvd_dqn.training.worker
from hvd_dqn.agent.layout import single
from hvd_dqn.agent.learner import Phase
from hvd_dqn.agent.preprocess import Preprocess
from hvd_dqn.config import Config
from hvd_dqn.config_files import configure
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.training.build import make_environments, make_learner, make_replay, replay_memory
from hvd_dqn.training.worker import Worker

# Every value is another than the default.
SETTINGS = {
    "total_steps": 1_200,
    "env": {
        "id": "CartPole-v1",
        "kwargs": {"sutton_barto_reward": True},
        "envs_per_rank": 3,
        "vectorization": "async",
        "frame_stack": 2,
        "reward_scale": 0.5,
        "reward_clip": 2.0,
        "action_mask": "off",
        "restart_failed_envs": 4,
        "normalize_observation": True,
        "clip_observation": 4.0,
        "on_nonfinite": "hold",
    },
    "agent": {
        "hidden": [5],
        "dueling": True,
        "double": False,
        "n_step": 2,
        "gamma": 0.9,
        "loss": "squared",
        "epsilon_steps": 600,
        "epsilon_zeta": 2.5,
        "epsilon_ladder": 7.0,
    },
    "learner": {
        "batch_size": 4,
        "samples_per_insert": 2,
        "learn_start": 60,
        "train_period": 12,
        "target_period": 24,
        "learning_rate": 0.02,
        "learning_rate_end": 0.1,
        "adam_epsilon": 1e-3,
        "max_gradient_norm": 3.0,
        "xla": False,
        "overlap": True,
    },
    "ranks": {
        "sync": "parameters",
        "backward_passes_per_step": 2,
        "learning_rate_scaling": "linear",
        "warmup_steps": 300,
        "vote_period": 12,
    },
    "evaluation": {"episodes": 6, "max_episode_steps": 9, "epsilon": 0.25},
}


class SecondOfTwo(Solo):
    """A rank of two without the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size, self.local_size = 1, 2, 2


@pytest.fixture
def made(monkeypatch):
    """An agent of rank 1 of 2, and the arguments with which each part was made, by their names."""
    calls = {}

    def spy(module, name):
        part = getattr(module, name)

        def make(*values, **named):
            calls.setdefault(name, []).append(inspect.signature(part).bind(*values, **named).arguments)
            return part(*values, **named)

        for own, value in vars(part).items():
            if isinstance(value, staticmethod):
                setattr(make, own, value.__func__)
        monkeypatch.setattr(module, name, make)

    for name in ("Environments", "Learner", "build_network", "Evaluator", "Dqn", "Replay"):
        spy(hvd_dqn.training.build, name)
    spy(hvd_dqn.training.worker, "Actor")
    agent = Worker(Config.model_validate(SETTINGS), SecondOfTwo())
    yield agent, calls
    agent.close()


def test_every_setting_reaches_its_part(made):
    agent, calls = made
    env, learner = SETTINGS["env"], SETTINGS["learner"]
    trained, evaluated = calls["Environments"]
    shared = {
        name: env[name]
        for name in (
            "id",
            "kwargs",
            "vectorization",
            "frame_stack",
            "normalize_observation",
            "reward_scale",
            "reward_clip",
        )
    }
    shared["actions"] = (None, None, False)
    shared |= {"observation_scale": None}  # CartPole has nothing that it could divide
    shared |= {"wrappers": (), "max_episode_steps": None}
    shared |= {"copies": 3, "first_index": 3, "rank": 1, "restarts": 4, "holds": True}
    assert trained == {**shared, "evaluates": False}
    assert evaluated == {**shared, "evaluates": True}
    agent.preprocess.set_statistics(np.zeros(4, np.float32), np.ones(4, np.float32))
    assert agent.preprocess.array(np.full((1, 8), 9, np.float32)).max() == 4

    (replay,) = calls["Replay"]
    expected = {"n_step": 2, "gamma": 0.9, "frame_stack": 2}
    assert {name: replay[name] for name in expected} == expected

    (actor,) = calls["Actor"]
    assert 2.5 in actor.values()

    (made_learner,) = calls["Learner"]
    expected = {name: learner[name] for name in ("adam_epsilon", "max_gradient_norm", "xla", "overlap")}
    expected |= {"sync": "parameters", "compression": "none", "passes": 2}
    expected["planned"] = agent.plan.updates_after(agent.plan.cycles - 1)
    assert expected["planned"] > 100
    assert {name: made_learner[name] for name in expected} == expected

    assert calls["Dqn"] == [{"double": False, "loss": "squared", "sizes": (2,)}]
    assert len(calls["build_network"]) == 3  # online, target, and the one that acts while the others learn
    for network in calls["build_network"]:
        assert (network["hidden"], network["dueling"]) == ((5,), True)

    (evaluator,) = calls["Evaluator"]
    assert (evaluator["epsilon"], evaluator["max_length"]) == (0.25, 9)


def test_fp16_reaches_the_learner(monkeypatch):
    asked = []
    world = SecondOfTwo()
    world.wrap = lambda optimizer, compression: asked.append(compression) or optimizer
    config = Config.model_validate({"env": {"envs_per_rank": 1}, "ranks": {"compression": "fp16"}})
    Worker(config, world).close()
    assert asked == ["fp16"]


def test_a_rank_acts_with_its_own_part_of_the_ladder(made):
    agent, _ = made
    agent.begin_episodes()
    given, act = [], agent.actor.act
    agent.actor.act = lambda observation, epsilons, mask: given.append(epsilons) or act(observation, epsilons, mask)
    for cycle in (0, 30):
        agent.step(cycle)
        assert np.array_equal(given[-1], agent.plan.epsilons_at(cycle, 1))
    assert not np.array_equal(given[1], given[0])
    assert not np.array_equal(given[1], agent.plan.epsilons_at(30, 0))


def test_who_acts_and_who_learns_sees_normalised_observations(made):
    agent, _ = made
    agent.begin_episodes()
    seen, array = [], agent.preprocess.array
    agent.preprocess.array = lambda observation: seen.append(array(observation)) or seen[-1]
    agent.learner.update = lambda *_: Phase(1, 0.0, 0.0, 0.0, 0, 0, False, 1.0, 0.0, None)
    acted = 0
    for cycle in range(60):
        raw = agent.envs.observation
        mean, scale = (np.tile(x, 2) for x in (agent.statistics.mean, agent.statistics.scale))  # stacks of two
        agent.step(cycle)
        if seen:  # not where all actions are random
            acted += not np.array_equal(seen[-1], raw)
            np.testing.assert_allclose(seen.pop(), np.clip((raw - mean) * scale, -10, 10), rtol=1e-5)
        if agent.plan.learns_at(cycle):
            agent.begin_phase(cycle)
            agent.finish_phase()
            # The graph has the same statistics as whoever acts in NumPy.
            inputs = agent.preprocess(tf.constant(raw)).numpy()
            assert np.array_equal(inputs, array(raw))
            assert not np.array_equal(inputs, raw)
    assert acted > 10


def test_a_phase_gets_what_is_planned_and_what_it_says_is_reported(made):
    agent, _ = made
    agent.begin_episodes()
    given = []

    def update(batch, learning_rate, copies):
        given.append((batch.reward.shape, learning_rate, copies.tolist()))
        n = len(copies)
        return Phase(n, 2.0 * n, 3.0 * n, 4.0 * n, 6, 0, False, 1.0, 0.0, None)

    agent.learner.update = update
    expected = []
    for cycle in range(agent.plan.cycles):
        agent.step(cycle)
        if agent.plan.learns_at(cycle):
            agent.begin_phase(cycle)
            agent.finish_phase()
            updates = agent.plan.updates_at(cycle)
            shape = (updates, agent.plan.batch_per_rank * 2)
            expected.append((shape, agent.plan.learning_rate_at(cycle), agent.plan.target_copies_at(cycle).tolist()))
            row = agent.report(cycle)
            assert (row["epsilon"], row["learning_rate"]) == (agent.plan.epsilon_at(cycle), expected[-1][1])
            assert (row["updates"], row["replay_size"]) == (agent.plan.updates_after(cycle), len(agent.replay))
    assert given == expected
    rates = [rate for _, rate, _ in given]
    assert rates[0] < 0.025 < max(rates) <= 0.08  # warm-up to that of four batches
    assert rates[-1] < 0.3 * max(rates)
    assert (row["loss"], row["mean_q"], row["gradient_norm"]) == (2.0, 3.0, 4.0)
    assert row["skipped_updates"] == 3  # the mean of two ranks, of which one is there


def threads_of_an_agent(settings: dict, kind: str, said: dict[str, str]) -> str:
    """TensorFlow's number of threads inside operations ("intra") or for them ("inter"), and what the environment says."""
    name = f"TF_NUM_{kind.upper()}OP_THREADS"
    code = f"""
import os
from hvd_dqn.ranks import placement
os.environ.setdefault("{name}", "3")  # as set_thread_defaults may
import tensorflow as tf
from hvd_dqn.training.worker import Worker
from hvd_dqn.config import Config
from hvd_dqn.ranks.world import Solo
Worker(Config.model_validate({settings}), Solo()).close()
print(tf.config.threading.get_{kind}_op_parallelism_threads(), os.environ["{name}"])
"""
    clean = {key: value for key, value in os.environ.items() if key != name}
    done = subprocess.run([sys.executable, "-c", code], env=clean | said, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("said", "hidden", "threads"),
    [({}, (64, 64), "1 1"), ({}, (1024, 1024), "0 3"), ({"TF_NUM_INTRAOP_THREADS": "2"}, (64, 64), "0 2")],
)
def test_small_products_are_one_threads_unless_the_environment_says_otherwise(said, hidden, threads):
    settings = {"env": {"id": "CartPole-v1"}, "agent": {"hidden": hidden}}
    assert threads_of_an_agent(settings, "intra", said) == threads


@pytest.mark.parametrize(
    ("said", "network", "overlap", "threads"),
    [
        ({}, "mlp", True, "0 3"),
        ({}, "tests.unit.agent.test_networks:keras_model", False, "0 3"),
        ({}, "tests.unit.agent.test_networks:keras_model", True, "2 2"),
        ({"TF_NUM_INTEROP_THREADS": "1"}, "tests.unit.agent.test_networks:keras_model", True, "0 1"),
    ],
)
def test_a_network_that_acts_by_tensorflow_need_not_wait_for_the_phase_under_way(said, network, overlap, threads):
    settings = {"env": {"id": "CartPole-v1"}, "agent": {"network": network}, "learner": {"overlap": overlap}}
    assert threads_of_an_agent(settings, "inter", said) == threads


def test_what_counts_under_strong_scaling_is_a_ranks_own_batch(monkeypatch):
    alone = []
    monkeypatch.setattr("hvd_dqn.training.build.compute_alone", lambda: alone.append(True))
    for size in (1, 8):
        world = Solo()
        world.size = size
        settings = {"agent": {"hidden": (256, 256)}, "learner": {"batch_size": 512, "learn_start": 2_000}}
        config = Config.model_validate({"env": {"id": "CartPole-v1"}, "ranks": {"scaling": "strong"}, **settings})
        envs = make_environments(config, world, 1, "sync")
        make_learner(config, envs, Preprocess(single((4,))), world, np.random.default_rng(0))
        envs.close()
        assert alone == [True] * (size == 8)


def test_waiting_for_the_statistics_of_observations_counts_as_exchange(made):
    agent, _ = made
    agent.begin_episodes()
    agent.statistics.take = lambda reduced: time.sleep(0.05)
    for cycle in range(60):
        agent.step(cycle)
        if agent.plan.learns_at(cycle):
            agent.begin_phase(cycle)
            break
    assert agent.ledger.spent["communicate"] >= 0.05


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"agent.objective": "c51", "agent.loss": "squared"}, "--agent.loss has no effect with --agent.objective c51"),
        ({"agent.atoms": 21}, "--agent.atoms has no effect with --agent.objective dqn: it is for c51. Received: 21"),
        ({"agent.support": (0, 9)}, "--agent.support has no effect"),
        ({"agent.objective": "munchausen", "agent.quantiles": 9}, "--agent.quantiles has no effect"),
        ({"agent.objective": "c51", "agent.support": (9, 0)}, "a lowest and a highest return.*Received: 9,0"),
        (
            {"agent.objective": "quantile", "env.id": "HalfCheetah-v5", "env.action_bins": 2, "agent.factored": True},
            "factored",
        ),
        ({"replay.importance_end": 0.5}, "no effect without --replay.priority_exponent"),
    ],
)
def test_settings_of_other_objectives_are_refused(settings, line):
    config = configure(Config(), {"env.id": "CartPole-v1", "replay.capacity": 2_000} | settings)
    with pytest.raises(InputError, match=line):
        Worker(config, Solo())


def test_a_replay_for_priorities_is_counted_with_its_sums():
    for exponent in (0.0, 0.5):
        config = configure(Config(), {"env.id": "CartPole-v1", "replay.priority_exponent": exponent})
        with contextlib.closing(make_environments(config, Solo(), 4, "sync")) as envs:
            replay = make_replay(config, envs, 1_000, np.random.default_rng(0))
            needed = replay_memory(config, envs, 1_000)
        tree = sum(level.nbytes for level in replay._tree._levels[1:]) if exponent else 0
        assert replay.nbytes + tree <= needed <= 1.02 * (replay.nbytes + tree)
