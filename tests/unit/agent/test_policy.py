"""A policy: one observation or many, the environment's own action numbers, masks, stacks, and what it refuses."""

import numpy as np
import pytest
from gymnasium import spaces

from hvd_dqn.agent.policy import Policy
from hvd_dqn.envs.actions import ActionMap, ActionSettings
from hvd_dqn.envs.frames import Frames
from hvd_dqn.errors import InputError

PLANE = spaces.Box(-1, 1, (2,))
IMAGE = spaces.Box(0, 255, (3, 4, 2), np.uint8)


def policy(space=PLANE, stack=1, actions=None, values=None, rng=0):
    """Values [B, A]: by default the first A numbers of what is seen, so that a test can read off what was."""
    actions = actions or spaces.Discrete(2)
    values = values or (lambda seen: seen[:, : actions.n])
    return Policy(values, Frames(space, stack), space, ActionMap("Env-v0", actions, ActionSettings()), rng)


#     observation                     action
SEEN = [([0.1, 0.9],                  1),
        (np.array([3.0, -1.0]),       0),
        ([[0.1, 0.9], [0.5, 0.2]],    [1, 0]),
        (np.zeros((0, 2)),            [])]  # fmt: skip


@pytest.mark.parametrize(("observation", "expected"), SEEN)
def test_one_observation_has_one_action_and_a_batch_has_many(observation, expected):
    action = policy().act(observation)
    q = policy().q_values(observation)
    assert q.dtype == np.float32
    np.testing.assert_allclose(q, np.asarray(observation, np.float32))
    if isinstance(expected, int):
        assert (type(action), action) == (int, expected)
    else:
        assert (action.dtype, action.tolist()) == (np.int64, expected)


def test_actions_and_states_have_the_numbers_of_their_spaces():
    states = spaces.Discrete(3, start=-1)
    one = policy(states, actions=spaces.Discrete(3, start=5), values=lambda seen: np.eye(3)[seen[:, 0]])
    assert [one.act(state) for state in (-1, 0, 1)] == [5, 6, 7]
    assert one.act(np.array([1, -1])).tolist() == [7, 5]
    assert one.act(np.int32(1)) == 7  # as an environment with a NumPy state gives it


def test_all_actions_are_random_but_those_that_the_mask_forbids():
    one = policy(actions=spaces.Discrete(4), values=lambda seen: np.tile([4.0, 3.0, 2.0, 1.0], (len(seen), 1)))
    seen = np.zeros((4_000, 2))
    for mask, allowed in ((None, [0, 1, 2, 3]), ([False, True, False, True], [1, 3])):
        masks = None if mask is None else np.tile(mask, (4_000, 1))
        counts = np.bincount(one.act(seen, 1.0, masks), minlength=4)
        assert np.flatnonzero(counts).tolist() == allowed
        expected = 4_000 / len(allowed)
        assert np.all(np.abs(counts[allowed] - expected) < 5 * np.sqrt(expected))
    half = one.act(seen, 0.5)
    assert abs(np.mean(half != 0) - 0.375) < 5 * np.sqrt(0.375 * 0.625 / 4_000)  # a quarter of the random ones is 0 too
    assert one.act(np.zeros(2), mask=np.array([False, False, True, True])) == 2  # the best of what is left
    assert policy().act([-2.0, -1.0], mask=[True, False]) == 0  # also where all values are negative
    assert one.act(np.zeros((2, 2)), mask=[[True] * 4, [False, True, False, False]]).tolist() == [0, 1]


def test_random_actions_follow_from_the_seed_or_the_generator():
    seen = np.zeros((50, 2))
    first, again, given = (policy(rng=rng).act(seen, 0.5).tolist() for rng in (3, 3, np.random.default_rng(3)))
    assert first == again == given != policy(rng=4).act(seen, 0.5).tolist()


def test_the_network_is_not_asked_where_all_actions_are_random():
    policy(values=lambda seen: 1 / 0).act(np.zeros((5, 2)), 1.0)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "three"])
@pytest.mark.parametrize(
    "space",
    [PLANE, IMAGE, spaces.Box(0, 1, (3, 4)), spaces.Box(0, 1, ()), spaces.Discrete(9, start=2)],
    ids=["plane", "image", "grey", "number", "state"],
)
@pytest.mark.parametrize("stack", [1, 3])
def test_stacks_are_those_that_training_sees(space, stack, batch):
    space.seed(1)
    frames = Frames(space, stack)
    count = int(np.prod(batch))
    steps = [np.array([space.sample() for _ in range(count)]) for _ in range(4)]
    given = []
    one = policy(space, stack, values=lambda seen: given.append(seen) or np.zeros((len(seen), 2)))
    expected = frames.begin(frames.read(steps[0]))
    seen = one.begin(steps[0].reshape((*batch, *space.shape)))
    for step in steps[1:]:
        expected = frames.push(expected, frames.read(step), np.zeros(count, np.bool_))
        seen = one.push(seen, step.reshape((*batch, *space.shape)))
    one.act(seen)
    assert given[0].dtype == expected.dtype
    assert np.array_equal(given[0], expected)
    assert seen.shape == (*batch, *one.observation_shape)


NO_SECOND = [[True, True], [False, False]]
#    space, stack                what it is asked                                  the line says
REFUSED = [
    (PLANE, 1,                     lambda p: p.act([1.0, 2.0, 3.0]),                  r"\(2,\) or B .* \(3,\)"),
    (PLANE, 1,                     lambda p: p.act(1.0),                              r"\(2,\) or B .* \(\)"),
    (PLANE, 1,                     lambda p: p.act(np.zeros((1, 1, 2))),              r"\(1, 1, 2\)"),
    (PLANE, 3,                     lambda p: p.q_values([1.0, 2.0]),                  r"\(6,\), a stack .*begin.* \(2,\)"),
    (PLANE, 3,                     lambda p: p.begin([1.0]),                          r"\(2,\) or B .*\(1,\)"),
    (PLANE, 3,                     lambda p: p.push(np.zeros(6), np.zeros((1, 1, 2))), r"\(1, 1, 2\)"),
    (IMAGE, 1,                     lambda p: p.act(np.zeros((3, 4, 2))),              r"whole numbers .*float64"),
    (spaces.Discrete(4), 1,        lambda p: p.act(1.0),                              r"whole numbers .*float64"),
    (spaces.Discrete(4), 1,        lambda p: p.act(4),                                r"of Discrete\(4\).* 4, not 0 to 3"),
    (spaces.Discrete(4, start=1), 1, lambda p: p.act(0),                                r"of .*start=1\).* 0, not 1 to 4"),
    (PLANE, 1,                     lambda p: p.act([1.0, 2.0], 1.5),                  r"probability.* 1.5"),
    (PLANE, 1,                     lambda p: p.act([1.0, 2.0], float("nan")),         r"probability.* nan"),
    (PLANE, 1,                     lambda p: p.act([1.0, 2.0], mask=[True]),          r"a mask of 1 values"),
    (PLANE, 1,                     lambda p: p.act([1.0, 2.0], mask=["a", "b"]),      r"2 values of type <U1"),
    (PLANE, 1,                     lambda p: p.act([[1.0, 2.0]], mask=[True, False]), r"each of 1 observations.* 2\."),
    (PLANE, 1,                     lambda p: p.act([1.0, 2.0], mask=[False, False]),  r"at least one action"),
    (PLANE, 1,                     lambda p: p.act(np.zeros((2, 2)), 1.0, NO_SECOND), r"at least one action"),
]  # fmt: skip


@pytest.mark.parametrize(("space", "stack", "ask", "line"), REFUSED, ids=[row[-1] for row in REFUSED])
def test_what_does_not_fit_is_refused_in_one_line(space, stack, ask, line):
    with pytest.raises(InputError, match=line) as refused:
        ask(policy(space, stack))
    assert len(str(refused.value).splitlines()) == 1


CARD = spaces.Tuple((spaces.Discrete(32), spaces.Box(-1, 1, (2,), np.float64)))
ROOM = spaces.Dict({"cell": spaces.Box(0, 255, (3, 4, 2), np.uint8), "door": spaces.MultiBinary(2)})


@pytest.mark.parametrize("space", [CARD, ROOM], ids=["tuple", "dictionary"])
@pytest.mark.parametrize("stack", [1, 3])
def test_dictionaries_and_tuples_come_alone_in_a_list_or_as_arrays(space, stack):
    space.seed(1)
    steps = [[space.sample() for _ in range(3)] for _ in range(4)]
    together = [
        {key: np.array([o[key] for o in step]) for key in space}
        if space is ROOM
        else tuple(np.array([o[i] for o in step]) for i in range(2))
        for step in steps
    ]
    given = []
    one = policy(space, stack, values=lambda seen: given.append(seen) or np.zeros((len(seen), 2)))
    frames = Frames(space, stack)
    expected = frames.begin(frames.read(steps[0]))
    for step in steps[1:]:
        expected = frames.push(expected, frames.read(step), np.zeros(3, np.bool_))
    for batch in (steps, together):
        seen = one.begin(batch[0])
        for step in batch[1:]:
            seen = one.push(seen, step)
        assert one.act(seen).tolist() == [0, 0, 0]
        assert np.array_equal(given[-1], expected)
    seen = one.begin(steps[0][1])
    for step in steps[1:]:
        seen = one.push(seen, step[1])
    assert one.act(seen) == 0
    assert np.array_equal(given[-1], expected[1:2])


@pytest.mark.parametrize(
    ("space", "observation", "line"),
    [
        (ROOM, {"cell": np.zeros((3, 4, 2), np.uint8)}, r"a dictionary of `cell`, which has no `door`"),
        (ROOM, [1.0, 2.0], r"list, which has no `cell`"),
        (ROOM, {"cell": np.zeros((3, 4), np.uint8), "door": [0, 1]}, r"`cell` of shape \(3, 4, 2\).*\(3, 4\)"),
        (ROOM, {"cell": np.zeros((2, 3, 4, 2), np.uint8), "door": [0, 1]}, r"parts of different lengths"),
        (CARD, (3.0, [0.0, 0.0]), r"whole numbers `0` .*float64"),
        (CARD, (40, [0.0, 0.0]), r"40, not 0 to 31"),
        (CARD, (4, [0.0, 1e39]), r"1e\+39 at index \[1\]"),
        (CARD, (4,), r"tuple, which has no `1`"),
    ],
)
def test_a_part_that_does_not_fit_is_named(space, observation, line):
    with pytest.raises(InputError, match=line) as refused:
        policy(space).act(observation)
    assert len(str(refused.value).splitlines()) == 1
