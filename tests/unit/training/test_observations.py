"""Observations of every kind train: integers scaled by their space, time stamps, dictionaries, images beside vectors."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import hvd_dqn
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.storage.run_directory import Run
from hvd_dqn.training.trainer import Trainer
from tests.unit.training.test_trainer import TapeWorld, config, play


class Pick(gymnasium.Env):
    """Ten steps, one point for each action that is the number k which `observe(k, rng)` shows."""

    def __init__(self, kind="cells"):
        self.observation_space, self.observe = SHOWN[kind]
        self.action_space = spaces.Discrete(8 if "cells" in kind else 4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._next(), {}

    def _next(self):
        self.k = int(self.np_random.integers(self.action_space.n))
        return self.observe(self.k, self.np_random)

    def step(self, action):
        reward, self.t = float(action == self.k), self.t + 1
        return self._next(), reward, self.t >= 10, False, {}


def one_of(count, k, dtype):
    return (np.arange(count) == k).astype(dtype)


def beside(k, rng):
    """The number is the sum of what the image and the vector show."""
    column = int(rng.integers(k + 1))
    image = np.zeros((7, 7, 2), np.uint8)
    image[:, column] = 255
    return {"image": image, "vector": one_of(4, k - column, np.float32), "flag": rng.integers(2)}


Box = spaces.Box
SHOWN = {
    "cells": (Box(0, 1, (8,), np.uint8), lambda k, _: one_of(8, k, np.uint8)),
    "cells as floats": (Box(0, 1, (8,), np.float32), lambda k, _: one_of(8, k, np.float32)),
    "time": (Box(0, np.inf, (1,), np.float64), lambda k, _: np.array([1.6e9 + 5 * k])),
    "dictionary": (
        spaces.Dict({"which": spaces.Discrete(4), "noise": Box(-1, 1, (3,), np.float32)}),
        lambda k, rng: {"which": k, "noise": rng.uniform(-1, 1, 3).astype(np.float32)},
    ),
    "beside": (
        spaces.Dict({"image": Box(0, 255, (7, 7, 2), np.uint8), "vector": Box(0, 1, (4,)), "flag": spaces.Discrete(2)}),
        beside,
    ),
    "dim": (Box(0, 255, (4,), np.uint8), lambda k, _: 10 * one_of(4, k, np.uint8)),
}
gymnasium.register("Pick-v0", Pick)
ID = "tests.unit.training.test_observations:Pick-v0"


def trained(path, kind, **settings):
    base = {"env.id": ID, "env.kwargs": {"kind": kind}, "total_steps": 4_000, "evaluation.target_return": 10.0}
    return hvd_dqn.train("identity", run_dir=path, **(base | settings))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("time", {"env.normalize_observation": True}),
        ("dictionary", {}),
        ("beside", {"agent.network": "minatar", "total_steps": 6_000, "agent.hidden": (64,)}),
    ],
)
def test_it_is_solved(kind, settings, tmp_path):
    result = trained(tmp_path / "run", kind, **settings)
    assert result.return_mean == 10
    env = gymnasium.make(ID, kind=kind)
    policy = hvd_dqn.load_policy(tmp_path / "run")
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        assert policy.act(observation) == env.unwrapped.k
    assert policy.act([observation, observation]).tolist() == [env.unwrapped.k] * 2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_one_hot_of_bytes_is_learned_as_fast_as_its_twin_of_floats(seed, tmp_path):
    """It is the same run, to the last bit."""
    results, weights = [], []
    for kind in ("cells", "cells as floats"):
        result = trained(tmp_path / kind, kind, seed=seed)
        results.append((result.return_mean, result.total_steps))
        env = gymnasium.make(ID, kind=kind)
        weights.append(result.policy.q_values(env.reset(seed=0)[0]))
    assert results[0] == results[1]
    assert results[0][0] == 10
    np.testing.assert_array_equal(*weights)


def messages(path, world=None, **env):
    records, _ = play(config(env={"id": ID, **env}, evaluation={"target_return": None}), world or Solo(), path)
    return [record.text for record in records if record.kind == "message" and "tenth" in record.text]


def test_a_range_that_is_not_used_is_told_once(tmp_path):
    (told,) = messages(tmp_path / "dim", kwargs={"kind": "dim"})
    assert "at most 10 of 255 in 240 total steps" in told
    assert told.endswith("set --env.observation_scale 10.")
    assert messages(tmp_path / "scaled", kwargs={"kind": "dim"}, observation_scale=10.0) == []
    assert messages(tmp_path / "used", kwargs={"kind": "beside"}) == []


@pytest.mark.parametrize(("kind", "settings"), [("dim", {}), ("time", {"normalize_observation": True})])
def test_all_ranks_enter_the_same_collectives_also_for_ranges_and_origins(kind, settings, tmp_path):
    tapes = []
    for rank in range(2):
        world = TapeWorld(rank, 2)
        messages(tmp_path / str(rank), world, kwargs={"kind": kind}, **settings)
        tapes.append(world.tape)
    assert tapes[0] == tapes[1]
    assert ("max (1, 2)" in tapes[0]) == (kind == "dim")
    assert ("sum (2,)" in tapes[0]) == (kind == "time")  # once, before the first merge


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        ("cells as floats", {"observation_scale": 2.0}, "divides integers .* none.*8 float32"),
        ("dictionary", {"observation_scale": 2.0}, "divides integers"),
        ("cells", {"normalize_observation": True}, "for observations of real numbers.*8 uint8"),
    ],
)
def test_a_setting_without_effect_on_these_observations_is_refused(kind, settings, line):
    with pytest.raises(InputError, match=line):
        Trainer(config(env={"id": ID, "kwargs": {"kind": kind}, **settings}), Solo())


def test_the_plan_tells_what_the_network_sees(tmp_path):
    trained(tmp_path / "run", "beside", total_steps=200)
    shown = Run(tmp_path / "run").about()["plan"]["observations"]
    assert shown == "flag: one-hot, 2 states; image: 7 x 7 x 2 uint8 / 255; vector: 4 float32"
