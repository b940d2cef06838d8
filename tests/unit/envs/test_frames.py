"""Frames of every space: what is stored, what the network sees of it, and observations that have no frame."""

from contextlib import closing

import numpy as np
import pytest
import tensorflow as tf
from gymnasium import spaces
from gymnasium.spaces.utils import flatten

from hvd_dqn.agent.preprocess import Preprocess
from hvd_dqn.envs.environments import Environments
from hvd_dqn.envs.frames import Frames, Misfit
from hvd_dqn.errors import RunError
from tests.unit.envs.plane import Plane, PlaneVector
from tests.unit.envs.test_environments import register

Box, Discrete = spaces.Box, spaces.Discrete
REAL = Box(-1, 1, (3,), np.float32)
NESTED = spaces.Dict(
    {
        "where": spaces.Tuple((Discrete(300, start=-5), spaces.MultiBinary(3))),
        "speed": Box(-9, 9, (2,), np.float64),
        "image": Box(0, 255, (7, 8, 3), np.uint8),
        "gear": spaces.MultiDiscrete([[2, 3], [4, 2]]),
    }
)


def vector_of(space, observations):
    """As a vector class returns them: a dictionary or tuple of arrays."""
    if isinstance(space, spaces.Dict):
        return {key: vector_of(each, [o[key] for o in observations]) for key, each in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(vector_of(each, [o[i] for o in observations]) for i, each in enumerate(space.spaces))
    return np.array(observations)


def samples(space, count=4):
    space.seed(1)
    return [space.sample() for _ in range(count)]


#    space                                           stored as          divided by
STORED = [
    (REAL,                                           (np.float32, 3),   None),
    (Box(-1, 1, (), np.float64),                     (np.float32, 1),   None),
    (Box(-np.inf, np.inf, (2,), np.int64),           (np.float32, 2),   None),
    (Box(0, 2**31 - 1, (2,), np.int64),              (np.float32, 2),   None),  # "no bound"
    (Box(0, 1000, (2,), np.int64),                   (np.float32, 2),   1000),
    (Box(-9, 4, (2,), np.int32),                     (np.int32, 2),     9),
    (Box(np.array([0, 0]), np.array([2, 8]), dtype=np.int16), (np.int16, 2), [2, 8]),
    (Box(-128, 127, (2,), np.int8),                  (np.int8, 2),      128),
    (Box(0, 1, (8,), np.uint8),                      (np.uint8, 8),     None),
    (Box(0, 255, (4, 5), np.uint8),                  (np.uint8, 20),    255),
    (Box(0, 0, (2,), np.uint8),                      (np.uint8, 2),     None),
    (Box(0, 1, (10, 10, 4), np.bool_),               (np.uint8, 400),   None),
    (spaces.MultiBinary((2, 2)),                     (np.int8, 4),      None),
    (Discrete(5, start=-2),                          (np.int32, 1),     None),
    (spaces.MultiDiscrete([2, 300]),                 (np.uint16, 2),    None),
    (spaces.Tuple((Discrete(32), Discrete(11), Discrete(2))), (np.uint8, 3), None),
    (spaces.Dict({"a": REAL, "b": REAL}),            (np.float32, 6),   None),
    (spaces.Dict({"a": REAL}),                       (np.float32, 3),   None),
    (NESTED,                                         (np.uint8, 4 + 168 + 2 * 4 + 2 + 3), 255),
]  # fmt: skip


@pytest.mark.parametrize(("space", "stored", "divisor"), STORED, ids=[str(row[0])[:60] for row in STORED])
@pytest.mark.parametrize("stack", [1, 3])
def test_what_the_network_sees_is_what_gymnasium_flattens_divided_by_what_the_space_declares(
    space, stored, divisor, stack
):
    frames, observations = Frames(space, stack), samples(space)
    frame = frames.read(vector_of(space, observations))
    assert (frame.dtype, frame[0].size) == stored
    np.testing.assert_array_equal(frames.read(observations), frame)
    preprocess, seen = Preprocess(frames.layout), frames.begin(frame)
    assert seen.shape == (4, *frames.observation_shape)
    inputs = preprocess.array(seen)
    assert (inputs.shape, inputs.dtype) == ((4, *preprocess.input_shape), np.float32)
    np.testing.assert_array_equal(preprocess(tf.constant(seen)).numpy(), inputs)
    if space is NESTED:
        expected = np.stack([flatten(space, o) for o in observations]).astype(np.float64)
        expected[:, 11 : 11 + 168] /= 255  # gear: 2 + 3 + 4 + 2 states
    else:
        expected = np.stack([np.ravel(flatten(space, o)) for o in observations]) / (1 if divisor is None else divisor)
    if stack == 1:
        np.testing.assert_allclose(inputs.reshape(4, -1), expected, rtol=1e-6)
    else:  # each frame is there as often as it is stacked
        np.testing.assert_allclose(np.sort(inputs.reshape(4, -1)), np.sort(np.repeat(expected, 3, axis=1)), rtol=1e-6)


def test_each_part_of_packed_stacks_is_stacked_as_it_is_alone():
    episodes = [samples(NESTED, 3), samples(NESTED, 7)[4:]]
    steps = [vector_of(NESTED, together) for together in zip(*episodes, strict=True)]
    frames = Frames(NESTED, 3)
    alone = {"gear": NESTED["gear"], "image": NESTED["image"], "speed": NESTED["speed"]}
    alone |= {"0": NESTED["where"][0], "1": NESTED["where"][1]}
    parts = {name: Frames(space, 3) for name, space in alone.items()}
    value = lambda step, name: step["where"][int(name)] if name.isdigit() else step[name]  # noqa: E731

    def stacked(of, steps):
        seen = of.begin(of.read(steps[0]))
        for step in steps[1:]:
            seen = of.push(seen, of.read(step), np.zeros(2, np.bool_))
        return Preprocess(of.layout).array(seen).reshape(2, -1)

    expected = [stacked(of, [value(step, name) for step in steps]) for name, of in parts.items()]
    np.testing.assert_array_equal(stacked(frames, steps), np.concatenate(expected, axis=1))


def test_wide_numbers_keep_their_digits_where_they_are_normalised():
    for dtype, stored in [
        (np.float64, np.float64),
        (np.int64, np.float64),
        (np.int32, np.int32),
        (np.float32, np.float32),
    ]:
        frames = Frames(Box(0, 2_000_000_000, (1,), dtype), normalize=True)
        assert (frames.dtype, frames.layout.parts[0].divisor) == (stored, None)
        preprocess = Preprocess(frames.layout)
        preprocess.set_statistics(np.array([1.7e9]), np.array([0.5]))
        frame = frames.read(np.array([[1_700_000_003], [1_699_999_999]], dtype))
        expected = [[0], [0]] if dtype == np.float32 else [[1.5], [-0.5]]
        np.testing.assert_array_equal(preprocess.array(frame), expected)
        np.testing.assert_array_equal(preprocess(tf.constant(frame)), expected)
    # One byte is enough for numbers of one byte and for states, and they are not normalised.
    assert [part.normalized for part in Frames(NESTED, normalize=True).layout.parts] == [False, False, True] + [
        False
    ] * 2


def test_a_scale_divides_integers_and_nothing_else():
    parts = Frames(NESTED, scale=10.0).layout.parts
    assert [(part.name, part.divisor) for part in parts if part.divisor is not None] == [("image", 10.0)]
    assert not any(part.declared for part in parts)
    whole = Frames(Box(0, 255, (2,), np.uint8), scale=10.0)
    np.testing.assert_allclose(Preprocess(whole.layout).array(np.uint8([[5, 10]])), [[0.5, 1.0]])
    assert Frames(Box(-np.inf, np.inf, (2,), np.int64), scale=3.0).layout.parts[0].divisor == 3
    assert Frames(REAL, scale=3.0).layout.parts[0].divisor is None


#    shape             channels
AXES = [
    ((84, 84, 4),      "last"),
    ((210, 160, 3),    "last"),
    ((10, 10, 4),      "last"),  # MinAtar
    ((10, 10, 10),     "last"),
    ((8, 8, 111),      "last"),  # boards with many planes
    ((7, 7, 3),        "last"),
    ((4, 84, 84),      "first"),
    ((3, 210, 160),    "first"),
    ((1, 28, 28),      "first"),
    ((16, 32, 40),     "first"),
    ((7, 11, 11),      "unsure"),
    ((12, 8, 8),       "unsure"),
    ((64, 128, 100),   "unsure"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "channels"), AXES)
def test_the_axis_of_the_channels_is_told_by_the_shape(shape, channels):
    space = Box(0, 255, shape, np.uint8)
    frames, observation = Frames(space), samples(space, 1)[0]
    (part,) = frames.layout.parts
    assert (part.channels_first, bool(part.unsure)) == (channels == "first", channels == "unsure")
    frame = frames.read([observation])[0]
    np.testing.assert_array_equal(frame, np.moveaxis(observation, 0, -1) if channels == "first" else observation)
    assert frame.flags.c_contiguous
    assert ("moved from first to last" in frames.layout.describe()) == (channels == "first")


#    space                              observations                    row  what the line says
MISFITS = [
    (Box(-np.inf, np.inf, (2,), np.float64), [[1, 2], [3, -1e39]],     1,   r"does not fit float32: -1e\+39 at index \[1\]"),
    (spaces.Dict({"a": Box(-np.inf, np.inf, (), np.float64), "b": REAL}),
     {"a": np.array([0.0, 1e200]), "b": np.zeros((2, 3), np.float32)}, 1,   r"observation `a` .*: 1e\+200;"),
    (Discrete(4),                       [0, 4],                        1,   r"a state outside its space: 4, not 0 to 3"),
    (Discrete(4, start=2),              [1, 2],                        0,   r"1, not 2 to 5"),
    (spaces.MultiDiscrete([2, 300]),    [[1, 5], [1, -1]],             1,   r"-1 at index \[1\], not 0 to 299"),
    (spaces.Tuple((Discrete(2), Discrete(2))), ([0, 1], [256, 0]),     0,   r"state `1` .*256, not 0 to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("space", "observations", "row", "line"), MISFITS, ids=[row[-1] for row in MISFITS])
def test_what_has_no_frame_is_named_with_its_value(space, observations, row, line):
    with pytest.raises(Misfit, match=line) as raised:
        Frames(space).read(observations)
    assert raised.value.row == row


register("Plane-v0", Plane)
register("PlaneVector-v0", Plane, vector_entry_point=PlaneVector)


@pytest.mark.parametrize(("id", "mode"), [("Plane-v0", "sync"), ("Plane-v0", "async"), ("PlaneVector-v0", "auto")])
@pytest.mark.filterwarnings("ignore:.*share an object")
def test_dictionaries_reach_the_replay_up_to_the_true_last_one(id, mode):
    with closing(Environments(id, 2, vectorization=mode)) as envs:
        envs.reset([0, 1])
        kept = [envs.step(np.array([0, 0]))[0] for _ in range(5)]
    show = lambda frame: [view[0].tolist() for view in envs.frames.layout.views(frame)]  # noqa: E731
    assert [show(t.observation) for t in kept] == [[[i, 0], [i]] for i in (0, 1, 2, 0, 1)]
    assert [show(t.next_observation) for t in kept] == [[[i, 0], [i]] for i in (1, 2, 3, 1, 2)]


@pytest.mark.parametrize(
    ("bad", "length", "line"),
    [
        (
            "large",
            3,
            r"Environment 9 .* on rank 3 returned an observation `far` that does not fit float32 in step 2: 1e\+39",
        ),
        ("large", 2, r"Environment 9 .* that does not fit float32 in step 2: 1e\+39 at index \[1\]"),
        ("infinite", 3, r"Environment 9 .* returned a non-finite observation `far` in step 2: inf at index \[1\]"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_number_that_does_not_fit_stops_the_run_with_its_environment_rank_and_step(bad, length, line):
    arguments = {"kwargs": {"bad": bad, "length": length}, "first_index": 9, "rank": 3}
    with closing(Environments("Plane-v0", 2, **arguments)) as envs:
        envs.reset([0, 1])
        envs.step(np.array([0, 0]))
        with pytest.raises(RunError, match=line) as caught:
            envs.step(np.array([0, 0]))
    assert "\n" not in str(caught.value)
