"""One environment: a vector class of its own stands for the environment only where it shows the same spaces."""

import re
from contextlib import closing

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import hvd_dqn
from hvd_dqn.config import Config
from hvd_dqn.config_files import configure
from hvd_dqn.envs.environments import Environments
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.training.build import make_evaluator, make_one
from hvd_dqn.training.worker import Worker
from tests.unit.envs.test_environments import made, register


class Plain(gymnasium.Env):
    def __init__(self, size=2, actions=2):
        self.observation_space, self.action_space = spaces.Box(0, 1, (size,), np.float32), spaces.Discrete(actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.low, {}

    def step(self, action):
        return self.observation_space.low.copy(), 1.0, True, False, {}


class Own(gymnasium.vector.VectorEnv):
    closed_ones = 0

    def __init__(self, num_envs, size=2, actions=2, shown=None, acts=None, high=1):
        self.num_envs, shape = num_envs, (shown or size,)
        self.single_observation_space = spaces.Box(0, high, shape, np.float32)
        self.single_action_space = spaces.Discrete(acts or actions)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def reset(self, *, seed=None, options=None):
        return np.zeros((self.num_envs, *self.single_observation_space.shape), np.float32), {}

    def step(self, action):
        ends, none = np.ones(self.num_envs, bool), np.zeros(self.num_envs, bool)
        return self.reset()[0], np.ones(self.num_envs), ends, none, {}

    def close(self, **_):
        Own.closed_ones += 1


def registered(name, **differs):
    register(name, Plain, vector_entry_point=lambda num_envs, **kwargs: Own(num_envs, **{**kwargs, **differs}))
    return name


@pytest.mark.parametrize(
    ("name", "differs", "why_not"),
    [
        ("Alike-v0", {}, None),
        ("Wide-v0", {"shown": 3}, r"it has other observations, \(3,\) float32 from 0 to 1 instead of \(2,\) float32"),
        ("High-v0", {"high": 2}, r"it has other observations, \(2,\) float32 from 0 to 2 instead"),
        ("Acts-v0", {"acts": 3}, r"it has other actions, Discrete\(3\) instead of Discrete\(2\)"),
    ],
)
def test_a_vector_class_is_used_only_with_the_spaces_of_the_environment_or_by_name(name, differs, why_not):
    registered(name, **differs)
    Own.closed_ones = 0
    with made(name, 2) as envs:
        assert isinstance(envs._vector, SyncVectorEnv if why_not else Own)
        if why_not:
            (note,) = envs.notes
            assert re.search(why_not, note)
            assert "--env.vectorization native takes it for both" in note
            assert Own.closed_ones == 1  # the class that was looked at is closed
            assert envs.observation_space == Plain().observation_space
    with made(name, 2, vectorization="native") as envs:
        assert isinstance(envs._vector, Own)
        assert envs.notes == []


def test_asked_for_by_name_a_vector_class_is_evaluated_too_with_one_copy_for_each_seed():
    registered("Named-v0", shown=3)
    config = configure(Config(), {"env": {"id": "Named-v0", "vectorization": "native"}})
    for envs in (make_evaluator(config, Solo(), lambda seen: np.zeros((len(seen), 2))).envs, make_one(config, Solo())):
        with closing(envs):
            assert (type(envs._vector), envs.copies, envs.frames.shape) == (Own, 1, (3,))


def test_a_run_by_a_vector_class_that_is_asked_for_by_name_trains_evaluates_and_is_loaded(tmp_path):
    words = {"env.id": "CartPole-v1", "env.vectorization": "native", "env.envs_per_rank": 4, "total_steps": 400}
    few = {
        "learner.learn_start": 100,
        "evaluation.episodes": 3,
        "evaluation.final_episodes": 3,
        "env.max_episode_steps": 9,
    }
    result = hvd_dqn.train(run_dir=tmp_path / "run", **words, **few)
    assert result.episodes == 3
    assert 1 <= result.return_mean <= 9  # the limit truncates in evaluation too
    assert hvd_dqn.evaluate(tmp_path / "run", episodes=4).length_mean <= 9
    assert result.policy.act(np.zeros(4)) in (0, 1)


@pytest.mark.parametrize(
    ("id", "arguments", "line"),
    [
        ("Acrobot-v1", {}, r"needs a vector class, and `Acrobot-v1` has none"),
        ("CartPole-v1", {"wrappers": ["FlattenObservation"]}, r"takes no wrappers.*--env.vectorization sync"),
        (
            "CartPole-v1",
            {"kwargs": {"gravitas": 2}},
            r"cannot be used: it cannot be made with .*gravitas.*vectorization sync",
        ),
    ],
)
def test_a_vector_class_that_cannot_be_had_is_refused_when_asked_for_by_name(id, arguments, line):
    with pytest.raises(InputError, match=line):
        Environments(id, 2, vectorization="native", **arguments)


class Moody(Plain):
    """Declares another space each time it is made."""

    made = 0

    def __init__(self):
        Moody.made += 1
        super().__init__(size=Moody.made)


def test_training_and_evaluation_with_different_spaces_are_refused_before_the_first_step():
    register("Moody-v0", Moody)
    Moody.made = 0
    config = configure(Config(), {"env": {"id": "Moody-v0", "envs_per_rank": 1}, "evaluation.episodes": 1})
    with pytest.raises(
        InputError, match=r"same observations of Moody-v0. Received: \(1,\) float32.*\(2,\) float32.*in eval"
    ):
        Worker(config, Solo())


def test_a_time_limit_by_setting_truncates_wherever_the_environment_is_stepped():
    for vectorization, copies in (("auto", 2), ("sync", 2), ("sync", 1)):
        with made("CartPole-v1", copies, vectorization=vectorization, max_episode_steps=3) as envs:
            envs.reset(range(copies))
            steps = [envs.step(np.zeros(copies, np.int64))[0] for _ in range(3)]
            assert [step.truncated.all() for step in steps] == [False, False, True]
            assert not any(step.terminated.any() for step in steps)
    with pytest.raises(InputError, match=r"--env.max_episode_steps is given again in --env.kwargs"):
        Environments("CartPole-v1", 2, kwargs={"max_episode_steps": 3}, max_episode_steps=3)
