"""Actions of every space, and masks: what they mean, what is refused, and that they go on bit by bit after a restore."""

import contextlib

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper

from hvd_dqn.envs.actions import ActionMap, ActionSettings
from hvd_dqn.errors import InputError, RunError
from tests.unit.envs import test_environments
from tests.unit.envs.test_wrappers import checkpointed, seen


@contextlib.contextmanager
def made(*args, **kwargs):
    with test_environments.made(*args, **kwargs) as envs:
        envs.find_masks()
        yield envs


BOX = spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))
TWO = spaces.MultiDiscrete([2, 3], start=[5, 0])

#     space                             bins  factored  agent's action  means
MEANINGS = [
    (spaces.Discrete(4, start=-1),      None, None,     2,              1),
    (TWO,                               None, None,     5,              [6, 2]),
    (TWO,                               None, True,     [1, 2],         [6, 2]),
    (spaces.MultiDiscrete([[2, 3]]),    None, True,     [1, 2],         [[1, 2]]),
    (spaces.MultiBinary(3),             None, None,     6,              [1, 1, 0]),
    (BOX,                               2,    None,     0,              [-1.0, 0.0]),  # both ends, not centres of bins
    (BOX,                               2,    None,     3,              [1.0, 4.0]),
    (BOX,                               3,    True,     [1, 2],         [0.0, 4.0]),
    (spaces.Box(-2, 2, ()),             5,    None,     3,              1.0),
    (spaces.Box(0, 1, (1,), np.uint8),  9,    None,     1,              [1]),  # only two values
]  # fmt: skip


@pytest.mark.parametrize(("space", "bins", "factored", "action", "expected"), MEANINGS)
def test_an_action_means_one_of_the_environments_own(space, bins, factored, action, expected):
    actions = ActionMap("Env-v0", space, ActionSettings(bins, factored))
    own = actions.own(np.array(action))
    assert own.tolist() == expected
    assert own in space or own.tolist() in space
    assert actions.own(np.array([action] * 3)).tolist() == [expected] * 3
    assert actions.own(np.array([action])).dtype == space.dtype


#     space                          bins  factored  sizes
SIZES = [
    (spaces.MultiDiscrete([2] * 7),  None, None,     (128,)),
    (spaces.MultiDiscrete([2] * 8),  None, None,     (2,) * 8),
    (spaces.MultiDiscrete([2] * 8),  None, False,    (256,)),
    (spaces.Box(-1, 1, (6,)),        2,    None,     (64,)),
    (spaces.Box(-1, 1, (6,)),        3,    None,     (3,) * 6),
    (spaces.Discrete(100_000),       None, None,     (100_000,)),
]  # fmt: skip


@pytest.mark.parametrize(("space", "bins", "factored", "sizes"), SIZES)
def test_many_combinations_are_factored(space, bins, factored, sizes):
    assert ActionMap("Env-v0", space, ActionSettings(bins, factored)).choices.sizes == sizes


#     space                             bins  factored  the line says
REFUSED = [
    (BOX,                               None, None,     "continuous actions.*--env.action_bins 3"),
    (spaces.Discrete(3),                2,    None,     "--env.action_bins is for continuous"),
    (TWO,                               2,    None,     "--env.action_bins is for continuous"),
    (spaces.Box(-np.inf, np.inf, (1,)), 2,    None,     "no finite bounds.*TransformAction"),
    (spaces.Discrete(3),                None, True,     "several dimensions"),
    (spaces.Box(-1, 1, (1,)),           3,    True,     "several dimensions"),
    (spaces.Box(-1, 1, (5,)),           10,   False,    "100,000 combinations.*10,000.*--agent.factored True"),
    (spaces.Dict({"a": BOX}),           None, None,     "Dict actions"),
]  # fmt: skip


@pytest.mark.parametrize(("space", "bins", "factored", "line"), REFUSED)
def test_what_cannot_be_chosen_from_is_refused_in_one_line(space, bins, factored, line):
    with pytest.raises(InputError, match=line) as refused:
        ActionMap("Env-v0", space, ActionSettings(bins, factored))
    assert len(str(refused.value).splitlines()) == 1


T, F = True, False
#     space, factored                     mask                                      read
MASKS = [
    (spaces.Discrete(3, start=4), None,   np.array([0, 1, 1], np.int8),             [F, T, T]),
    (TWO, True,                           ([1, 0], [1, 0, 1]),                      [T, F, T, F, T]),
    (TWO, True,                           [1, 0, 1, 0, 1],                          [T, F, T, F, T]),
    (TWO, None,                           ([1, 0], [1, 0, 1]),                      [T, F, T, F, F, F]),
]  # fmt: skip


@pytest.mark.parametrize(("space", "factored", "mask", "expected"), MASKS)
def test_masks_are_read_in_the_environments_own_form(space, factored, mask, expected):
    assert ActionMap("Env-v0", space, ActionSettings(None, factored)).read_mask(mask).tolist() == expected


class Doors(gymnasium.Env):
    """Two of five doors are open, and which ones is random; a closed one raises. Ends after four steps."""

    def __init__(self, kind="info", ends="truncated", start=0, dead=0) -> None:
        self.observation_space, self.kind, self.ends, self.dead = spaces.Box(0, 1, (5,)), kind, ends, dead
        self.action_space = spaces.MultiDiscrete([2, 3]) if kind == "tuple" else spaces.Discrete(5, start=start)
        self.start = start

    def _draw(self):
        self.open = np.zeros(5, np.int8)
        self.open[[self.np_random.integers(2), 2 + self.np_random.integers(3)]] = 1
        mask = self.open
        if self.t == 4 and self.ends == "terminated":
            mask = np.zeros(5, np.int8)  # does not matter
        if self.dead and self.t == self.dead:
            mask = np.zeros(5, np.int8)
        told = {"info": mask, "tuple": (mask[:2], mask[2:]), "method": None, "none": None, "short": mask[1:]}[self.kind]
        return self.open.astype(np.float32), {} if told is None else {"action_mask": told}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._draw()

    def step(self, action):
        assert all(self.open[np.atleast_1d(action) + ([0, 2] if self.kind == "tuple" else -self.start)]), (
            "a closed door"
        )
        self.t += 1
        observation, info = self._draw()
        return (
            observation,
            1.0,
            self.ends == "terminated" and self.t == 4,
            self.ends == "truncated" and self.t == 4,
            info,
        )


class DoorsWithMethod(Doors):
    def action_masks(self):
        return self.open.tolist()


gymnasium.register("Doors-v0", Doors)
gymnasium.register("DoorsWithMethod-v0", DoorsWithMethod)
WAYS = [
    ("Doors-v0", {"kind": "info", "start": 3}, None),
    ("Doors-v0", {"kind": "info", "ends": "terminated"}, None),
    ("Doors-v0", {"kind": "tuple"}, True),
    ("DoorsWithMethod-v0", {"kind": "method"}, None),
]


def draw(envs, rng, steps):
    """Random allowed actions of the copies, one step after another, and their transitions."""
    for _ in range(steps):
        yield envs.step(envs.choices.random(rng, envs.copies, envs.mask))[0]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(("id", "kwargs", "factored"), WAYS)
def test_masks_belong_to_their_observations_also_to_the_last_one_of_an_episode(id, kwargs, factored, vectorization):
    settings = ActionSettings(None, factored)
    with made(id, 3, kwargs=kwargs, vectorization=vectorization, actions=settings) as envs:
        assert envs.masked
        envs.reset([1, 2, 3])
        ended = 0
        for transition in draw(envs, np.random.default_rng(0), 9):  # a closed door would raise
            np.testing.assert_array_equal(transition.mask, transition.observation == 1)
            goes_on = ~transition.terminated
            np.testing.assert_array_equal(transition.next_mask[goes_on], (transition.next_observation == 1)[goes_on])
            assert transition.next_mask[~goes_on].all()
            np.testing.assert_array_equal(envs.mask, envs.observation == 1)
            ended += np.count_nonzero(transition.terminated | transition.truncated)
        assert ended == 6


@pytest.mark.parametrize(("id", "kwargs", "factored"), WAYS)
def test_masked_and_factored_environments_go_on_bit_by_bit(id, kwargs, factored):
    settings = ActionSettings(None, factored)
    with made(id, 2, kwargs=kwargs, actions=settings) as one, made(id, 2, kwargs=kwargs, actions=settings) as other:
        assert one.probe()
        one.reset([1, 2])
        for before in (2, 5):
            list(draw(one, np.random.default_rng(before), before))
            state = one.state()
            assert other.load_state(checkpointed(state)).all()
            np.testing.assert_array_equal(other.mask, one.mask)
            for a, b in zip(
                draw(one, np.random.default_rng(9), 9), draw(other, np.random.default_rng(9), 9), strict=True
            ):
                assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_continuous_actions_go_on_bit_by_bit():
    settings = ActionSettings(3, None)
    with made("Pendulum-v1", 2, actions=settings) as one, made("Pendulum-v1", 2, actions=settings) as other:
        assert one.probe()
        one.reset([1, 2])
        play = np.random.default_rng(0).integers(3, size=(20, 2))
        seen(one, play)
        assert other.load_state(checkpointed(one.state())).all()
        assert seen(one, play) == seen(other, play)


def test_masks_can_be_turned_off_and_are_off_where_there_are_none():
    with made("Doors-v0", 2, actions=ActionSettings(mask=False)) as envs:
        assert envs.mask is None
        envs.reset([1, 2])
        assert envs.mask is None
    with made("Doors-v0", 2, kwargs={"kind": "none"}) as envs:
        assert envs.mask is None
        assert not envs.masked


def test_a_state_without_a_valid_action_is_named_with_copy_rank_and_step():
    with made("Doors-v0", 2, kwargs={"dead": 2}, first_index=6, rank=3) as envs:
        envs.reset([1, 2])
        with pytest.raises(RunError, match=r"Environment 6, 7 \(Doors-v0\) on rank 3 allows no action in step 2: "):
            list(draw(envs, np.random.default_rng(0), 3))


def test_a_mask_of_another_form_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"a mask of 4 values .*--env.action_mask off") as refused:
        made("Doors-v0", 1, kwargs={"kind": "short"}).__enter__()
    assert len(str(refused.value).splitlines()) == 1


class LateDoors(VectorWrapper):
    """A vector class of the environment's own, which resets one step late; without masks on request."""

    def __init__(self, num_envs, masks=True, **kwargs) -> None:
        super().__init__(SyncVectorEnv([lambda: Doors(**kwargs)] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP))
        self.masks = masks

    def _told(self, result):
        return result if self.masks else (*result[:-1], {})

    def reset(self, **arguments):
        return self._told(super().reset(**arguments))

    def step(self, actions):
        return self._told(super().step(actions))


gymnasium.register("LateDoors-v0", Doors, vector_entry_point=LateDoors)


def test_a_vector_class_that_resets_late_gives_the_masks_or_is_not_used():
    with made("LateDoors-v0", 3, kwargs={"start": 2}) as envs:
        assert isinstance(envs._vector, LateDoors)
        envs.reset([1, 2, 3])
        rows = list(draw(envs, np.random.default_rng(0), 11))
        assert sum(np.count_nonzero(row.truncated) for row in rows) == 6
        for transition in rows:
            np.testing.assert_array_equal(transition.next_mask, transition.next_observation == 1)
    gymnasium.register(
        "Maskless-v0", Doors, vector_entry_point=lambda num_envs, **k: LateDoors(num_envs, masks=False, **k)
    )
    with made("Maskless-v0", 2) as envs:
        assert envs.masked
        assert not isinstance(envs._vector, LateDoors)
    with made("Maskless-v0", 2, actions=ActionSettings(mask=False)) as envs:
        assert isinstance(envs._vector, LateDoors)
