"""Exact state: what is put back goes on bit by bit, and what cannot be put back is found out and begins anew."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

import hvd_dqn
from hvd_dqn.envs import wrappers as copies
from hvd_dqn.envs.environments import Environments
from tests.unit.envs.plane import Plane
from tests.unit.envs.test_environments import actions, made, register

register("Plane-v0", Plane)
SETTINGS = {
    "native CartPole": ("CartPole-v1", "auto", {}),
    "short native CartPole": ("CartPole-v1", "auto", {"max_episode_steps": 7}),
    "CartPole": ("CartPole-v1", "sync", {}),
    "MountainCar": ("MountainCar-v0", "sync", {"max_episode_steps": 25}),
    "Acrobot": ("Acrobot-v1", "sync", {"max_episode_steps": 30}),
    "FrozenLake": ("FrozenLake-v1", "sync", {}),
    "Blackjack": ("Blackjack-v1", "sync", {}),
    "dictionaries in reused arrays": ("Plane-v0", "sync", {}),
    "Identity": ("hvd_dqn.envs.identity:Identity-v0", "sync", {}),
}


def checkpointed(state):
    """The state after its way through the files of a checkpoint: .npz without pickle, and JSON."""
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    assert all(array.flags.c_contiguous for array in arrays.values())  # the reader of checkpoints takes no other
    file = io.BytesIO()
    np.savez(file, **arrays)
    rest = json.loads(json.dumps({name: value for name, value in state.items() if name not in arrays}))
    with np.load(io.BytesIO(file.getvalue()), allow_pickle=False) as read:
        return {**rest, **{name: read[name] for name in read.files}}


def seen(envs, play):
    """All that steps with these actions show, as bytes."""
    shown = [envs.observation.tobytes()]
    for action in play:
        transition, episodes = envs.step(action)
        arrays = (*transition, *episodes, envs.observation, envs.returns, envs.mask)
        shown += [array.tobytes() for array in arrays if array is not None]
    return shown


@settings(max_examples=80)
@given(
    name=st.sampled_from(sorted(SETTINGS)),
    number=st.integers(1, 3),
    stack=st.integers(1, 3),
    before=st.integers(0, 70),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_saved_run_goes_on_bit_by_bit_also_through_later_resets(name, number, stack, before, seed):
    id, vectorization, kwargs = SETTINGS[name]
    arguments = {"vectorization": vectorization, "kwargs": kwargs, "frame_stack": stack}
    with made(id, number, **arguments) as one, made(id, number, **arguments) as other:
        assert one.probe()
        one.reset(range(seed, seed + number))
        seen(one, actions(one, before, seed))
        state = one.state()
        play = actions(one, 70, seed + 1)
        expected = seen(one, play)  # before the state is written: it must not change with the run
        assert other.load_state(checkpointed(state)).all()
        assert seen(other, play) == expected
        # Saved once more, it is the state of a run that was never interrupted.
        assert str(checkpointed(other.state())) == str(checkpointed(one.state()))


@pytest.mark.parametrize("before", [1, 150])
def test_a_physics_engine_goes_on_bit_by_bit(before):
    pytest.importorskip("Box2D")
    with made("LunarLander-v3", 2, frame_stack=2) as one, made("LunarLander-v3", 2, frame_stack=2) as other:
        assert one.probe()
        one.reset([3, 4])
        seen(one, actions(one, before))
        state = checkpointed(one.state())
        assert other.load_state(state).all()
        play = actions(one, 200, 2)
        assert seen(other, play) == seen(one, play)


def test_worker_processes_go_on_bit_by_bit_and_so_does_one_process_in_their_place():
    arguments = {"frame_stack": 2, "kwargs": {"max_episode_steps": 15}}
    with (
        made("CartPole-v1", 2, vectorization="async", **arguments) as one,
        made("CartPole-v1", 2, vectorization="async", **arguments) as other,
        made("CartPole-v1", 2, vectorization="sync", **arguments) as alone,
    ):
        assert isinstance(other._vector, AsyncVectorEnv)
        assert one.probe()
        one.reset([3, 4])
        seen(one, actions(one, 40))
        state = checkpointed(one.state())
        play = actions(one, 40, 2)
        expected = seen(one, play)
        for envs in (other, alone):
            assert envs.load_state(state).all()
            assert seen(envs, play) == expected


def test_a_fresh_process_goes_on_bit_by_bit(tmp_path):
    pytest.importorskip("Box2D")
    program = (
        "import sys, numpy as np\n"
        "from tests.unit.envs.test_wrappers import *\n"
        "for id in ('CartPole-v1', 'LunarLander-v3'):\n"
        "    with np.load(f'{id}.npz') as file: state = dict(file)\n"
        "    state |= json.loads(Path(f'{id}.json').read_text())\n"
        "    with made(id, 3) as envs:\n"
        "        assert envs.load_state(state).all()\n"
        "        print(hashlib.sha256(b''.join(seen(envs, actions(envs, 90, 2)))).hexdigest())\n"
    )
    expected = []
    for id in ("CartPole-v1", "LunarLander-v3"):
        with made(id, 3) as envs:
            envs.probe()
            envs.reset([1, 2, 3])
            seen(envs, actions(envs, 90))
            state = envs.state()
            arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
            np.savez(tmp_path / f"{id}.npz", **arrays)
            (tmp_path / f"{id}.json").write_text(json.dumps({k: v for k, v in state.items() if k not in arrays}))
            expected.append(hashlib.sha256(b"".join(seen(envs, actions(envs, 90, 2)))).hexdigest())
    environment = {**os.environ, "PYTHONPATH": str(Path(hvd_dqn.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.split() == expected, result.stderr


class Walk(gymnasium.Env):
    """Walks to one side or the other by a random length, for ten steps; `source` says where randomness comes from."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(2)
    made = 0

    def __init__(self, source="np_random", longest=10):
        Walk.made += 1
        self.source, self.longest = source, longest
        self.own = np.random.default_rng()
        self.resets = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        assert options is None  # as usual, also where only some of the copies begin anew
        if self.source == "raises once" and self.resets == 2:
            self.source = ""
            raise ValueError("Not now.")
        if seed is not None and self.source == "from the seed":
            self.seeded = np.random.default_rng(seed)
        if seed is not None and self.source == "fixed by the seed":
            self.fixed = np.random.default_rng(seed).random()
        self.steps, self.place = 0, 0.0
        self.resets += 1
        return self._observation(), {}

    def _random(self):
        if self.source == "dies" and self.steps == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {
            "time": time.perf_counter_ns,
            "random": random.random,
            "numpy": np.random.random,
            "own": self.own.random,
            "from the seed": lambda: self.seeded.random(),
            "fixed by the seed": lambda: self.fixed,
            "none": lambda: 0.5,
        }.get(self.source, self.np_random.random)()

    def _observation(self):
        # Some change with the episodes they have seen: two of them, or more than the probe plays.
        changes = {"counts": self.resets, "grows": max(self.resets, 100)}.get(self.source, 0)
        return np.array([self.place, changes])

    def step(self, action):
        self.steps += 1
        if not (self.source == "only rewards" and self.steps > 0):
            self.place += (2 * action - 1) * self._random()
        reward = self.own.random() if self.source == "only rewards" else self.place
        return self._observation(), reward, False, self.steps == self.longest or (self.longest < 0 and action == 1), {}


class Unseeded(Walk):
    """Neither has a generator nor needs one."""

    def reset(self, *, seed=None, options=None):
        self.steps, self.place = 0, 0.0
        return self._observation(), {}


register("Walk-v0", Walk)
register("Unseeded-v0", Unseeded, kwargs={"source": "none"})


@pytest.mark.parametrize(
    ("source", "restorable"),
    [
        ("np_random", True),
        ("none", True),
        ("fixed by the seed", True),  # the trace keeps the last seed, however long ago it was
        ("from the seed", False),
        ("time", False),
        ("random", False),
        ("numpy", False),
        ("own", False),
        ("only rewards", False),  # the observations alone would not tell
        ("counts", False),
        ("raises once", False),
    ],
)
def test_environments_that_cannot_be_put_back_are_found_out_and_begin_new_episodes(source, restorable):
    arguments = {"frame_stack": 2, "kwargs": {"source": source}}
    with made("Walk-v0", 2, **arguments) as one, made("Walk-v0", 2, **arguments) as other:
        assert one.restorable is False
        assert one.probe() == one.restorable == restorable
        one.reset([1, 2])
        play = actions(one, 26)
        seen(one, play[:14])
        state = checkpointed(one.state())
        restored = other.load_state(state)
        assert restored.tolist() == [restorable] * 2
        if restorable:
            assert seen(other, play[14:]) == seen(one, play[14:])
            return
        np.testing.assert_array_equal(other.observation[:, :2], other.observation[:, 2:])
        np.testing.assert_array_equal(other.observation[:, 0], 0)
        assert not other.returns.any()
        ends = [other.step(action)[1].lengths.tolist() for action in play[:10]]
        assert ends == [[]] * 9 + [[10, 10]]


def test_an_environment_without_a_generator_can_be_restore():
    with made("Unseeded-v0", 2) as one, made("Unseeded-v0", 2) as other:
        assert one.probe()
        one.reset([1, 2])
        seen(one, actions(one, 14))
        assert other.load_state(checkpointed(one.state())).all()
        assert seen(other, actions(one, 30)) == seen(one, actions(one, 30))


def test_each_copy_is_compared_when_it_is_put_back_and_only_those_that_differ_begin_anew():
    # Copy 1 ends its episodes at once and is at its 150th; the probe has seen too few to find out what comes after 100.
    arguments = {"frame_stack": 2, "kwargs": {"source": "grows", "longest": -1}}
    play = np.stack([np.zeros(150, int), np.ones(150, int)], axis=1)
    one, other, third = (Environments("Walk-v0", 2, **arguments) for _ in range(3))
    with closing(one), closing(other), closing(third):
        assert one.probe()
        one.reset([1, 2])
        seen(one, play)
        state = checkpointed(one.state())
        assert other.load_state(state).tolist() == [True, False]
        np.testing.assert_array_equal(other.observation[0], one.observation[0])
        assert other.observation[1].tolist() == [0, 100, 0, 100]
        assert other.returns.tolist() == [one.returns[0], 0]
        for action in play[:5]:
            results = [envs.step(action)[0] for envs in (one, other)]
            for field in ("observation", "reward", "next_observation"):
                np.testing.assert_array_equal(*(getattr(result, field)[0] for result in results))
        # The new seeds are a function of the state, so that a resumed run can be repeated.
        third.load_state(state)
        again = seen(third, play[:5])
        other.load_state(state)
        assert seen(other, play[:5]) == again


def test_a_wrong_observation_return_or_generator_is_noticed():
    with made("CartPole-v1", 2, vectorization="sync") as one, made("CartPole-v1", 2, vectorization="sync") as other:
        one.probe()
        one.reset([1, 2])
        seen(one, actions(one, 50))
        for name in ("frame", "returns", "now"):
            state = checkpointed(one.state())
            if name == "now":
                state["traces"][1]["now"]["state"]["state"] += 1
            else:
                # The smallest difference there is.
                state[name][1] = np.nextafter(state[name][1], np.inf)
            assert other.load_state(state).tolist() == [True, False]
            # The second copy really stands where it is said to: at the beginning of a new episode.
            places = [copy.unwrapped.state for copy in other._vector.envs]
            np.testing.assert_array_equal(other.observation, np.array(places, np.float32))
            assert np.abs(places[1]).max() <= 0.05


def test_a_class_that_resets_late_goes_on_bit_by_bit_also_from_a_step_that_ended_an_episode():
    arguments = {"kwargs": {"max_episode_steps": 4}, "frame_stack": 2}
    with made("CartPole-v1", 2, **arguments) as one, made("CartPole-v1", 2, **arguments) as other:
        one.probe()
        one.reset([1, 2])
        for step in range(1, 11):
            transition, _ = one.step(np.array([0, 1]))
            assert (transition.truncated[0], transition.valid[0]) == (step % 5 == 4, step % 5 != 0)
            state = checkpointed(one.state())
            expected = seen(one, [np.array([1, 1])] * 6)
            assert other.load_state(state).all()
            assert seen(other, [np.array([1, 1])] * 6) == expected
            one.load_state(state)


@pytest.mark.parametrize("vectorization", ["auto", "sync"])
def test_other_settings_begin_new_episodes(vectorization):
    with made("CartPole-v1", 2, vectorization=vectorization, kwargs={"sutton_barto_reward": True}) as one:
        one.probe()
        one.reset([1, 2])
        seen(one, actions(one, 5))
        state = checkpointed(one.state())
        assert one.load_state(state).all()
    for number, changes in [(2, {}), (3, {"kwargs": {"sutton_barto_reward": True}}),
                            (2, {"kwargs": {"sutton_barto_reward": True}, "frame_stack": 2})]:  # fmt: skip
        with made("CartPole-v1", number, vectorization=vectorization, **changes) as other:
            assert other.load_state(state).tolist() == [False] * number
            assert other.step(np.zeros(number, int))[0].reward.tolist() == ([0] if changes else [1]) * number
    another = "async" if vectorization == "auto" else "auto"
    with made("CartPole-v1", 2, vectorization=another, kwargs={"sutton_barto_reward": True}) as other:
        assert not other.load_state(state).any()


def test_new_episodes_after_a_restore_are_neither_the_first_ones_again_nor_those_of_another_restore():
    with made("CartPole-v1", 2, vectorization="sync") as one, made("CartPole-v1", 2, vectorization="sync") as other:
        one.reset([1, 2])
        begun = [one.observation.tobytes()]
        for _ in range(2):
            one.step(np.array([0, 0]))
            assert not other.load_state(checkpointed(one.state())).any()  # no probe, so it remembers nothing
            begun.append(other.observation.tobytes())
        assert len(set(begun)) == 3


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_probe_leaves_no_trace(name):
    id, vectorization, kwargs = SETTINGS[name]
    with made(id, 3, vectorization=vectorization, kwargs=kwargs) as one:
        one.reset([1, 2, 3])
        expected = seen(one, actions(one, 60))
    with made(id, 3, vectorization=vectorization, kwargs=kwargs) as other:
        assert other.probe()
        other.reset([1, 2, 3])
        assert seen(other, actions(other, 60)) == expected


@pytest.mark.parametrize("source", ["random", "numpy"])
def test_a_probe_leaves_no_trace_in_global_generators_and_makes_no_other_environment(source):
    runs = []
    for probes in (False, True):
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        with made("Walk-v0", 2, kwargs={"source": source}) as envs:
            Walk.made = 0
            if probes:
                assert not envs.probe()
                assert [copy.unwrapped.resets > 0 for copy in envs._vector.envs] == [True, False]
            envs.reset([1, 2])
            runs.append(seen(envs, actions(envs, 30)))
            assert Walk.made == 0
    assert runs[0] == runs[1]


def test_a_probe_that_kills_the_worker_process_does_not_kill_the_run():
    with made("Walk-v0", 1, vectorization="async", kwargs={"source": "dies"}) as envs:
        assert envs.probe() is False
        assert envs.restarted == 0
        envs.reset([0])
        envs.step(np.array([0]))
        assert envs.load_state(checkpointed(envs.state())).tolist() == [False]


def test_a_slow_environment_is_not_probed_for_long(monkeypatch):
    monkeypatch.setattr(copies, "PROBE_SECONDS", -1)
    monkeypatch.setattr("hvd_dqn.envs.restore.PROBE_SECONDS", -1)
    for vectorization in ("auto", "sync"):
        with made("CartPole-v1", 2, vectorization=vectorization) as envs:
            assert envs.probe() is False


def test_without_a_probe_nothing_is_remembered_and_an_endless_episode_is_forgotten(monkeypatch):
    monkeypatch.setattr(copies, "MOST_ACTIONS", 20)
    with made("Walk-v0", 1, kwargs={"longest": 1000}) as envs:
        (copy,) = envs._vector.envs
        left = np.array([0])
        envs.reset([1])
        seen(envs, [left] * 5)
        assert (copy._actions, envs.state().get("traces")) == ([], None)
        assert envs.probe()
        for steps, restored in [(19, True), (20, False), (25, False)]:
            envs.reset([1])
            seen(envs, [left] * steps)
            assert envs._lengths[0] == steps
            assert len(copy._actions) <= 20
            assert envs.load_state(checkpointed(envs.state())).tolist() == [restored]


class Vector(gymnasium.vector.VectorEnv):
    """A vector class of its own; keeps its place in an attribute of the kind that `keeps` says."""

    def __init__(self, num_envs, keeps="array", **_):
        self.num_envs, self.keeps = num_envs, keeps
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
        self.single_action_space = spaces.Discrete(2, start=3)
        self.metadata = {"autoreset_mode": "NextStep"}
        self.offset, self.flag, self.nothing, self.scalar = 0.25, True, None, np.float32(0.1)

    def _keep(self, place):
        self.place = {"list": list(place), "fortran": np.asfortranarray([place, place])}.get(self.keeps, place)
        return place.reshape(-1, 1).copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.scalar = np.float32(0.1)
        self.noise = self.np_random if self.keeps != "generator" else np.random.Generator(np.random.MT19937(seed))
        return self._keep(np.zeros(self.num_envs)), {}

    def step(self, actions):
        assert set(actions) <= {3, 4}
        self.scalar += np.float32(0.1)
        noise = (random if self.keeps == "global" else self.noise).random()
        place = self.place[1] if self.keeps == "fortran" else np.array(self.place)
        frame = self._keep(place + actions + self.offset + noise + self.scalar)
        if self.keeps == "raises" and self.scalar > 0.3:
            raise ValueError("the vector broke")
        no = np.zeros(self.num_envs, bool)
        return frame, np.full(self.num_envs, self.scalar), no, no, {}


register("Vector-v0", vector_entry_point=Vector)


@pytest.mark.parametrize(
    ("keeps", "restorable"),
    [("array", True), ("fortran", True), ("generator", True), ("list", False), ("global", False), ("raises", False)],
)
def test_an_own_vector_class_can_be_put_back_where_its_plain_attributes_tell_all(keeps, restorable):
    arguments = {"kwargs": {"keeps": keeps}, "vectorization": "native"}
    with made("Vector-v0", 2, **arguments) as one, made("Vector-v0", 2, **arguments) as other:
        assert one.probe() == restorable
        one.reset([5, 6])
        play = actions(one, 12)
        seen(one, play[: 1 if keeps == "raises" else 5])
        state = checkpointed(one.state())
        assert other.load_state(state).tolist() == [restorable] * 2
        if restorable:
            assert seen(other, play) == seen(one, play)
            del state["vector.place"]
            state["vector"]["numbers"]["unheard_of"] = 1
            assert not other.load_state(state).any()  # refused rather than half believed
            assert not other.observation.any()


def test_copies_whose_process_is_gone_when_they_are_saved_begin_anew():
    with made("CartPole-v1", 2, vectorization="async", restarts=1) as envs:
        envs.probe()
        envs.reset([1, 2])
        seen(envs, actions(envs, 3))
        os.kill(envs._vector.processes[1].pid, signal.SIGKILL)
        envs._vector.processes[1].join(5)
        state = checkpointed(envs.state())
        assert "traces" not in state
        assert envs.step(np.array([0, 0]))[0].truncated.all()
        assert not envs.load_state(state).any()
