"""Wrappers by setting: every copy is in them, in the given order, and whatever cannot be had is one line."""

from contextlib import closing
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from hvd_dqn.config import Config
from hvd_dqn.config_files import configure
from hvd_dqn.envs.environments import Environments
from hvd_dqn.envs.wrapping import described
from hvd_dqn.errors import InputError, RunError
from hvd_dqn.ranks.world import Solo
from tests.unit.envs.test_environments import actions, made, register

HERE = __name__


class Times(gymnasium.ObservationWrapper):
    def __init__(self, env, factor, pair=(0, 0), row=None, *, plain=None):
        super().__init__(env)
        assert isinstance(pair, tuple), "a list was not converted"
        assert isinstance(plain, list | None)
        self.factor = factor

    def observation(self, observation):
        return observation * self.factor


class Plus(gymnasium.ObservationWrapper):
    def __init__(self, env, term: "float | np.ndarray" = 1):
        super().__init__(env)
        self.term = term

    def observation(self, observation):
        return observation + self.term


class Refuses(gymnasium.Wrapper):
    def __init__(self, env):
        raise ValueError("not this\none")


class Fails(gymnasium.Wrapper):
    def step(self, action):
        raise ZeroDivisionError("in the wrapper")


class Ones(gymnasium.Env):
    observation_space, action_space = spaces.Box(-99, 99, (2,), np.float32), spaces.Discrete(2)
    made: ClassVar[list] = []

    def __init__(self, names=None):
        Ones.made.append(names)
        if names:
            names["changed"] = True  # as some environments do with what they are given

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(2, np.float32), {}

    def step(self, action):
        return np.ones(2, np.float32), 1.0, False, False, {}


register("Ones-v0", Ones)
THREEFOLD, PLUS = {f"{HERE}:Times": {"factor": 3}}, f"{HERE}:Plus"


@pytest.mark.parametrize(
    ("wrappers", "seen", "kind"),
    [
        ([THREEFOLD, PLUS], 4, SyncVectorEnv),
        ([PLUS, THREEFOLD], 6, SyncVectorEnv),
        ([], 1, SyncVectorEnv),
        ([THREEFOLD, PLUS], 4, AsyncVectorEnv),
    ],
)
def test_the_first_wrapper_is_the_innermost_in_every_copy_and_process(wrappers, seen, kind):
    vectorization = "sync" if kind is SyncVectorEnv else "async"
    with made("Ones-v0", 2, vectorization=vectorization, wrappers=wrappers) as envs:
        assert isinstance(envs._vector, kind)
        envs.reset([0, 1])
        assert envs.observation.tolist() == [[seen, seen]] * 2
        assert envs.step(np.array([0, 1]))[0].next_observation.tolist() == [[seen, seen]] * 2


def test_training_evaluation_and_a_policy_see_the_same_wrappers():
    # Imported here, because a worker process imports this module: it would load TensorFlow.
    from hvd_dqn.training.build import make_environments, make_evaluator, make_one

    config = configure(Config(), {"env": {"id": "Ones-v0", "wrappers": [THREEFOLD, PLUS], "envs_per_rank": 2}})
    makers = [
        lambda: make_environments(config, Solo(), 2, "auto"),
        lambda: make_evaluator(config, Solo(), lambda observation: observation).envs,
        lambda: make_one(config, Solo()),
    ]
    for make in makers:
        with closing(make()) as envs:
            envs.reset([0] * envs.copies)
            assert envs.observation[0].tolist() == [4, 4]


def test_lists_of_yaml_become_the_tuples_and_arrays_that_a_wrapper_asks_for():
    with made("Ones-v0", 1, wrappers=[{f"{HERE}:Plus": {"term": [5, 7]}}]) as envs:
        envs.reset([0])
        assert envs.observation.tolist() == [[6, 8]]
    made("Ones-v0", 1, wrappers=[{f"{HERE}:Times": {"factor": 1, "pair": [1, 2], "plain": [1]}}]).thing.close()
    with made("Ones-v0", 1, wrappers=[{"ReshapeObservation": {"shape": [1, 2, 1]}}]) as envs:
        assert envs.frames.shape == (1, 2, 1)


def test_a_copy_cannot_change_the_arguments_of_the_next_one():
    names = {"a": 1}
    Ones.made.clear()
    with made("Ones-v0", 3, kwargs={"names": names}):
        assert names == {"a": 1}
    assert Ones.made == [{"a": 1, "changed": True}] * 3
    assert len({id(each) for each in Ones.made}) == 3


@pytest.mark.parametrize(
    ("wrapper", "line"),
    [
        (
            "FlatenObservation",
            r"no wrapper `FlatenObservation` in gymnasium.wrappers. Did you mean `FlattenObservation`\?",
        ),
        ("FrameStack", r"Did you mean `FrameStackObservation`\?"),
        (f"{HERE}:Tmes", rf"no wrapper `Tmes` in {HERE}. Did you mean `Times`\?"),
        ("no_such_module:A", r"no module `no_such_module` to import for `no_such_module:A`"),
        ("os:getcwd", r"`os:getcwd` is no wrapper: expected a subclass of gymnasium.Wrapper, received <built-in"),
        (f"{HERE}:Ones", r"is no wrapper"),
        (f"{HERE}:Times", r"`.*Times` needs `factor`. Write: --env.wrappers '\[{.*:Times: {factor: ...}}\]'"),
        ({f"{HERE}:Times": {"facto": 3}}, r"takes no argument `facto`. Did you mean `factor`\? It takes: factor, pair"),
        ({"FlattenObservation": {"n": 3}}, r"`FlattenObservation` takes no argument `n`. It takes none."),
        (
            f"{HERE}:Refuses",
            r"Refuses` cannot wrap this environment: ValueError: not this one \(observations: Box.*Discr",
        ),
        (
            {"ResizeObservation": {"shape": [4, 4]}},
            r"`ResizeObservation\(shape=\[4, 4\]\)` cannot wrap .*2D or 3D image",
        ),
    ],
)
@pytest.mark.parametrize("vectorization", ["auto", "async"])
def test_a_wrapper_that_cannot_be_had_is_one_line_with_the_nearest_name(wrapper, line, vectorization):
    with pytest.raises(InputError, match=line) as caught:
        Environments("Ones-v0", 2, wrappers=[wrapper], vectorization=vectorization)
    assert str(caught.value).startswith("--env.wrappers: ")
    assert "\n" not in str(caught.value)


def test_a_wrapper_that_fails_in_a_step_is_named_with_its_copy_and_rank():
    with made("Ones-v0", 2, wrappers=[f"{HERE}:Fails"], first_index=4, rank=2) as envs:
        envs.try_out()  # which leaves it to the training
        envs.reset([0, 1])
        with pytest.raises(
            RunError, match=r"Environment 4 \(Ones-v0\) on rank 2 failed in step 1: ZeroDivisionError: in the"
        ):
            envs.step(np.array([0, 0]))


def test_an_environment_in_wrappers_is_restored_exactly_and_not_in_other_wrappers():
    stack = [{"FrameStackObservation": {"stack_size": 3}}, "FlattenObservation"]
    with made("CartPole-v1", 2, wrappers=stack) as one, made("CartPole-v1", 2, wrappers=stack) as other:
        assert isinstance(one._vector, SyncVectorEnv)  # its vector class takes no wrappers
        assert one.notes == ["The vector class of `CartPole-v1` is not used: it takes no wrappers."]
        assert one.probe()
        one.reset([3, 4])
        play = actions(one, 40)
        for action in play:
            one.step(action)
        assert other.load_state(one.state()).all()
        for action in play:
            for mine, theirs in zip(one.step(action)[0], other.step(action)[0], strict=True):
                np.testing.assert_array_equal(mine, theirs)
        with made(
            "CartPole-v1", 2, wrappers=[stack[0], "FlattenObservation", {"ClipReward": {"max_reward": 9}}]
        ) as third:
            assert not third.load_state(one.state()).any()


def test_a_wrapper_is_described_as_it_would_be_called():
    assert described("A") == "A"
    assert described({"m:A": {"shape": [8, 4], "x": None}}) == "m:A(shape=[8, 4], x=None)"
