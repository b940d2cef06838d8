import os
import re
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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import hvd_dqn
from hvd_dqn.envs.environments import Environments
from hvd_dqn.errors import InputError, RunError

# What Gymnasium's checker says about Counter's single array is what Counter is for.
pytestmark = pytest.mark.filterwarnings("ignore:.*share an object")


class Counter(gymnasium.Env):
    """Observes how many steps this episode and how many episodes there were, always in the same array."""

    def __init__(self, space=None, length=3, bad=None, terminates=False, wrong_class=False):
        self.observation_space = space or spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Discrete(3, start=5)
        self.length, self.bad, self.terminates = length, bad, terminates
        self.buffer = np.zeros(2)
        self.episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.episodes += 1
        return self._observation(), {}

    def _observation(self):
        self.buffer[:] = self.steps, self.episodes
        if self.bad == "observation" and self.steps == 2:
            self.buffer[1] = np.inf
        if isinstance(self.observation_space, spaces.Discrete):
            return int(self.observation_space.start) + self.steps
        if self.observation_space.shape != (2,):
            return np.full(self.observation_space.shape, self.steps, self.observation_space.dtype)
        return self.buffer

    def step(self, action):
        assert 5 <= action <= 7
        self.steps += 1
        if self.bad == "die" and self.steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.bad == "raise" and self.steps == 2:
            raise ValueError("the wheel came off")
        reward = np.nan if self.bad == "reward" and self.steps == 2 else 10.0 * (action - 6)
        ends = self.steps == self.length
        return self._observation(), reward, ends and self.terminates, ends and not self.terminates, {}


class LateVector(gymnasium.vector.VectorEnv):
    """A vector class whose way of resetting is told by its argument."""

    def __init__(self, num_envs, mode=None, **_):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0, 1, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.metadata = {"autoreset_mode": AutoresetMode(mode)} if mode else {}

    def reset(self, *, seed=None, options=None):
        return np.zeros((self.num_envs, 1), np.float32), {}

    def step(self, actions):
        done = np.ones(self.num_envs, bool)
        return np.zeros((self.num_envs, 1), np.float32), np.ones(self.num_envs), done, done, {}


class NeedsNothing(gymnasium.Env):
    observation_space = spaces.Dict({"a": spaces.Box(0, 1, (2,))})
    action_space = spaces.Discrete(2)

    def __init__(self, kind="dictionary"):
        if kind == "breaks":
            raise OSError("no simulator\nat port 80")
        if kind == "needs":
            import a_package_that_is_not_here  # noqa: F401
        self.observation_space = {
            "dictionary": self.observation_space,
            "text": spaces.Dict(
                {"a": spaces.Discrete(2), "b": spaces.Discrete(2), "inner": spaces.Dict({"note": spaces.Text(9)})}
            ),
            "graph": spaces.Graph(spaces.Discrete(2), None),
            "nothing": spaces.Dict({}),
            "deep": spaces.Dict({"a": spaces.Box(0, 1, (2, 2, 2, 2)), "b": spaces.Discrete(2)}),
            "volume": spaces.Box(0, 1, (2, 2, 2, 2)),
        }[kind]


def register(name, entry_point=Counter, **settings):
    if name not in gymnasium.registry:
        gymnasium.register(name, entry_point=entry_point, **settings)


register("Counter-v0")
register("Image-v0", kwargs={"space": spaces.Box(0, 255, (4, 5), np.uint8)})
register("Colour-v0", kwargs={"space": spaces.Box(0, 255, (4, 5, 3), np.uint8)})
register("Scalar-v0", kwargs={"space": spaces.Box(0, 9, (), np.int64)})
register("Offset-v0", kwargs={"space": spaces.Discrete(9, start=-4)})
register("Odd-v0", NeedsNothing)
register("OwnVector-v0", vector_entry_point=LateVector)
register("OwnVectorJax-v0", vector_entry_point="a_package_that_is_not_here:Vector")


def made(*args, **kwargs):
    return closing(Environments(*args, **kwargs))


def actions(envs, steps, seed=1):
    return np.random.default_rng(seed).integers(envs.actions, size=(steps, envs.copies))


@pytest.mark.parametrize(
    ("id", "kwargs"),
    [
        ("CartPole-v1", {}),
        ("CartPole-v1", {"max_episode_steps": 12}),  # ends by truncation mostly
        ("Acrobot-v1", {"max_episode_steps": 30}),
        ("MountainCar-v0", {}),
        ("FrozenLake-v1", {}),
        ("Taxi-v4", {}),
        ("hvd_dqn.envs.identity:Identity-v0", {}),
    ],
)
def test_each_copy_sees_what_the_same_environment_stepped_by_hand_shows_up_to_the_true_final_observation(id, kwargs):
    seeds, ends = [3, 4, 11], 0
    with made(id, 3, vectorization="sync", kwargs=kwargs) as envs:
        hands = [gymnasium.make(id, **kwargs) for _ in seeds]
        shown = [np.atleast_1d(hand.reset(seed=seed)[0]) for hand, seed in zip(hands, seeds, strict=True)]
        envs.reset(seeds)
        for action in actions(envs, 201):
            transition, episodes = envs.step(action)
            assert transition.valid.all()
            ended_here = 0
            for i, hand in enumerate(hands):
                np.testing.assert_array_equal(transition.observation[i], shown[i].astype(envs.frames.dtype))
                last, reward, terminated, truncated, _ = hand.step(action[i])
                np.testing.assert_array_equal(
                    transition.next_observation[i], np.atleast_1d(last).astype(envs.frames.dtype)
                )
                assert transition.reward[i] == np.float32(reward)
                assert (transition.terminated[i], transition.truncated[i]) == (terminated, truncated)
                ended_here += terminated or truncated
                shown[i] = np.atleast_1d(hand.reset()[0] if terminated or truncated else last)
                np.testing.assert_array_equal(envs.observation[i], shown[i].astype(envs.frames.dtype))
            assert len(episodes.returns) == len(episodes.lengths) == ended_here
            ends += ended_here
    assert ends >= 3


def test_cartpoles_own_vector_class_moves_like_cartpole_and_its_resets_are_not_valid_transitions():
    with made("CartPole-v1", 5, kwargs={"max_episode_steps": 15}) as envs:
        assert not isinstance(envs._vector, SyncVectorEnv)
        envs.reset(range(5))
        hand = gymnasium.make("CartPole-v1").unwrapped
        hand.reset()
        ended = np.zeros(5, bool)
        returns, seen, flags = np.zeros(5), 0, set()
        for action in actions(envs, 100):
            transition, episodes = envs.step(action)
            np.testing.assert_array_equal(transition.valid, ~ended)
            for i in range(5):
                if ended[i]:
                    assert (transition.reward[i], transition.terminated[i], transition.truncated[i]) == (
                        0,
                        False,
                        False,
                    )
                    assert np.abs(transition.next_observation[i]).max() <= 0.05
                    continue
                hand.state, hand.steps_beyond_terminated = transition.observation[i].astype(np.float64), None
                expected, reward, terminated, _, _ = hand.step(action[i])
                np.testing.assert_allclose(transition.next_observation[i], expected, atol=1e-6)
                assert (transition.terminated[i], transition.reward[i]) == (terminated, reward)
                returns[i] += 1
            np.testing.assert_array_equal(envs.observation, transition.next_observation)
            ended = transition.terminated | transition.truncated
            np.testing.assert_array_equal(episodes.returns, returns[ended])
            np.testing.assert_array_equal(episodes.lengths, returns[ended])
            flags |= set(zip(transition.terminated[ended], transition.truncated[ended], strict=True))
            returns[ended] = 0
            seen += ended.sum()
        assert seen > 20
        assert {(True, False), (False, True)} <= flags


@pytest.mark.parametrize(("terminates", "flags"), [(True, (True, False)), (False, (False, True))])
def test_an_end_is_a_termination_or_a_truncation_as_the_environment_says(terminates, flags):
    with made("Counter-v0", 2, kwargs={"terminates": terminates}) as envs:
        envs.reset([0, 1])
        got = [
            (t.terminated.tolist(), t.truncated.tolist()) for t in (envs.step(np.array([0, 1]))[0] for _ in range(6))
        ]
        no = [False, False]
        assert got == [(no, no), (no, no), ([flags[0]] * 2, [flags[1]] * 2)] * 2


def test_the_final_observation_survives_an_environment_that_always_writes_into_the_same_array():
    with made("Counter-v0", 1) as envs:
        envs.reset([0])
        kept = [envs.step(np.array([0]))[0] for _ in range(4)]
    #                                       step, episode
    assert [t.observation[0].tolist() for t in kept] == [[0, 1], [1, 1], [2, 1], [0, 2]]
    assert [t.next_observation[0].tolist() for t in kept] == [[1, 1], [2, 1], [3, 1], [1, 2]]
    assert kept[0].observation.dtype == np.float32


@pytest.mark.parametrize(
    ("id", "frame_shape", "dtype", "stacked", "states"),
    [
        ("CartPole-v1", (4,), np.float32, (12,), None),
        ("Counter-v0", (2,), np.float32, (6,), None),  # float64
        ("Scalar-v0", (1,), np.float32, (3,), None),
        ("Image-v0", (4, 5, 1), np.uint8, (4, 5, 3), None),
        ("Colour-v0", (4, 5, 3), np.uint8, (4, 5, 9), None),
        ("FrozenLake-v1", (1,), np.int32, (3,), 16),
        ("Offset-v0", (1,), np.int32, (3,), 9),
    ],
)
def test_shapes_and_types_are_those_announced(id, frame_shape, dtype, stacked, states):
    with made(id, 2, frame_stack=3) as envs:
        envs.reset([0, 1])
        for action in actions(envs, 5):
            transition, _ = envs.step(action)
            for frame in (transition.observation, transition.next_observation):
                assert (frame.shape[1:], frame.dtype) == (envs.frames.shape, envs.frames.dtype) == (frame_shape, dtype)
            assert envs.observation.shape == (2, *envs.frames.observation_shape) == (2, *stacked)
            assert envs.observation.dtype == dtype
            types = [transition.action.dtype, transition.reward.dtype, transition.valid.dtype]
            assert types == [np.int64, np.float32, np.bool_]
        (part,) = envs.frames.layout.parts
        assert part.categories == ((states,) if states else ())


def test_states_and_actions_are_counted_from_zero_wherever_the_environment_starts_counting():
    with made("Offset-v0", 1) as envs:
        envs.reset([0])
        assert envs.actions == 3
        got = [envs.step(np.array([action]))[0] for action in (0, 1, 2)]
        assert [t.reward[0] for t in got] == [-10, 0, 10]
        assert [t.action[0] for t in got] == [0, 1, 2]
        assert [t.observation[0, 0] for t in got] == [0, 1, 2]
        assert [t.next_observation[0, 0] for t in got] == [1, 2, 3]


@pytest.mark.parametrize("id", ["Counter-v0", "Image-v0"])
def test_an_episodes_first_frame_fills_its_stack_and_no_frame_crosses_an_episode(id):
    with made(id, 2, frame_stack=3) as envs:
        envs.reset([0, 1])
        stacks = [envs.observation]
        for _ in range(5):
            envs.step(np.array([1, 1]))
            stacks.append(envs.observation)
    channels = envs.frames.shape[-1]
    expected = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 0, 0], [0, 0, 1], [0, 1, 2]]  # oldest first; episodes of 3 steps
    for copy in range(2):
        assert [stack[copy].reshape(-1, 3 * channels)[0, ::channels].tolist() for stack in stacks] == expected


def test_stacks_begin_anew_where_a_vector_class_resets_late():
    with made("CartPole-v1", 3, frame_stack=2, kwargs={"max_episode_steps": 5}) as envs:
        envs.reset(range(3))
        resets = 0
        for action in actions(envs, 40):
            transition, _ = envs.step(action)
            older, newer = envs.observation[:, :4], envs.observation[:, 4:]
            np.testing.assert_array_equal(newer, transition.next_observation)
            same = np.where(transition.valid[:, None], transition.observation, transition.next_observation)
            np.testing.assert_array_equal(older, same)
            resets += (~transition.valid).sum()
        assert resets > 5


def test_rewards_are_scaled_then_clipped_while_returns_stay_the_environments_own():
    #       scale  clip   learned from -10, 0 and 10
    for scale, clip, expected in [(1.0, None, [-10, 0, 10]), (0.5, None, [-5, 0, 5]), (1.0, 1.0, [-1, 0, 1]), (0.5, 3.0, [-3, 0, 3])]:  # fmt: skip # noqa: E501
        with made("Counter-v0", 3, reward_scale=scale, reward_clip=clip) as envs:
            envs.reset([0, 1, 2])
            for step in range(1, 7):
                transition, episodes = envs.step(np.array([0, 1, 2]))
                assert transition.reward.tolist() == expected
                assert episodes.returns.tolist() == ([-30, 0, 30] if step % 3 == 0 else [])
                assert episodes.lengths.tolist() == ([3, 3, 3] if step % 3 == 0 else [])
            assert (episodes.returns.dtype, episodes.lengths.dtype) == (np.float64, np.int64)


def test_what_was_handed_out_never_changes_afterwards():
    for id, stack in [("CartPole-v1", 1), ("Acrobot-v1", 2), ("FrozenLake-v1", 1)]:
        with made(id, 4, frame_stack=stack) as envs:
            envs.reset(range(4))
            kept, copies = [], []
            for action in actions(envs, 60):
                kept.append([envs.observation, *envs.step(action)[0][:7]])
                copies.append([array.copy() for array in kept[-1]])
            action[:] = 0
            for arrays, then in zip(kept, copies, strict=True):
                for array, copy in zip(arrays, then, strict=True):
                    np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("copies", "vectorization", "taken"),
    [(1, "auto", "SyncVectorEnv"), (2, "auto", "CartPoleVectorEnv"), (2, "sync", "SyncVectorEnv")],
)
def test_the_environments_own_vector_class_is_taken_for_several_copies(copies, vectorization, taken):
    with made("CartPole-v1", copies, vectorization=vectorization) as envs:
        assert type(envs._vector).__name__ == taken


def test_a_reset_with_the_same_seeds_begins_the_same_run_again():
    for vectorization in ("auto", "sync"):
        with made("CartPole-v1", 2, vectorization=vectorization) as envs:
            runs = []
            for _ in range(2):
                envs.reset(np.array([7, 8]))
                seen = [envs.observation]
                for action in actions(envs, 45):
                    seen.append(envs.step(action)[0].next_observation)
                runs.append(np.stack(seen))
            np.testing.assert_array_equal(*runs)
            assert not np.array_equal(runs[0][0, 0], runs[0][0, 1])


def test_worker_processes_see_exactly_what_one_process_sees():
    with made("Counter-v0", 2, vectorization="sync") as one, made("Counter-v0", 2, vectorization="async") as many:
        assert isinstance(many._vector, AsyncVectorEnv)
        one.reset([5, 6])
        many.reset([5, 6])
        for action in actions(one, 25):
            results = [envs.step(action) for envs in (one, many)]
            for expected, got in zip(*(t + e for t, e in results), strict=True):
                np.testing.assert_array_equal(expected, got)
            np.testing.assert_array_equal(one.observation, many.observation)


class Environ(Counter):
    """Observes how many variables of a rank its process has."""

    def _observation(self):
        return np.array([len([name for name in os.environ if name.startswith(("OMPI_", "PMIX_", "HOROVOD_"))]), 0.0])


def test_worker_processes_do_not_see_that_their_parent_is_a_rank(monkeypatch):
    register("Environ-v0", Environ)
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "HOROVOD_RANK"):
        monkeypatch.setenv(name, "1")
    with made("Environ-v0", 1, vectorization="async") as envs:
        envs.reset([0])
        assert envs.observation[0, 0] == 0
    assert os.environ["PMIX_RANK"] == "1"


def test_worker_processes_neither_run_the_main_module_nor_need_it_guarded(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('main ran', flush=True)\n"
        "from hvd_dqn.envs.environments import Environments\n"
        "envs = Environments('hvd_dqn.envs.identity:Identity-v0', 1, vectorization='async')\n"
        "envs.reset([0])\n"
        "assert __file__ and envs.step(envs.observation[:, 0])[0].reward == 1\n"
        "envs.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(hvd_dqn.__file__).parents[1])}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.returncode) == ("main ran\n", 0), result.stderr


def test_closing_twice_is_closing_once_even_with_a_worker_that_hangs(monkeypatch):
    monkeypatch.setattr("hvd_dqn.envs.environments.CLOSING_SECONDS", 0.5)
    for vectorization in ("auto", "sync", "async"):
        envs = Environments("CartPole-v1", 2, vectorization=vectorization)
        if vectorization == "async":
            os.kill(envs._vector.processes[1].pid, signal.SIGSTOP)
        start = time.monotonic()
        envs.close()
        envs.close()
        assert time.monotonic() - start < 5
    assert not any(process.is_alive() for process in envs._vector.processes)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("reward", r"Environment 9 \(Counter-v0\) on rank 3 returned a non-finite reward in step 2: nan, "),
        (
            "observation",
            r"Environment 9 \(Counter-v0\) on rank 3 returned .*observation in step 2: inf at index \[1\], ",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_values_that_are_not_finite_stop_the_run_with_their_environment_rank_and_step(bad, message):
    for length in (2, 3):  # the bad step ends an episode, or not
        with made("Counter-v0", 2, kwargs={"bad": bad, "length": length}, first_index=9, rank=3) as envs:
            envs.reset([0, 1])
            envs.step(np.array([0, 0]))
            with pytest.raises(RunError, match=message) as caught:
                envs.step(np.array([0, 0]))
            assert "\n" not in str(caught.value)


def test_a_reset_that_is_not_finite_stops_the_run_too():
    class BadStart(Counter):
        def _observation(self):
            return np.array([np.nan if self.episodes == 2 and self.steps == 0 else 0.0, 1.0])

    register("BadStart-v0", BadStart)
    with made("BadStart-v0", 1) as envs:
        envs.reset([0])
        envs.step(np.array([0]))
        envs.step(np.array([0]))
        with pytest.raises(RunError, match=r"observation at its reset in step 3: nan at index \[0\]"):
            envs.step(np.array([0]))


def test_a_vector_class_that_does_not_say_how_it_resets_is_not_used():
    with made("OwnVector-v0", 2) as envs:
        assert isinstance(envs._vector, SyncVectorEnv)
        assert re.search(
            r"OwnVector-v0` is not used: it must reset by itself.* Its autoreset_mode is None", *envs.notes
        )
    for mode in (None, "Disabled"):
        with pytest.raises(
            InputError, match=r"`OwnVector-v0` cannot be used: it must reset by itself.*vectorization sync"
        ):
            Environments("OwnVector-v0", 2, kwargs={"mode": mode} if mode else {}, vectorization="native")
    with made("OwnVector-v0", 2, kwargs={"mode": "NextStep"}, vectorization="native") as envs:
        assert isinstance(envs._vector, LateVector)


def test_a_late_reset_earns_nothing_and_ends_nothing_whatever_the_vector_class_returns_with_it():
    with made(
        "OwnVector-v0", 2, kwargs={"mode": "NextStep"}, vectorization="native"
    ) as envs:  # returns a reward and an end in every step
        envs.reset([0, 1])
        for expected in (True, False, True, False):
            transition, episodes = envs.step(np.array([0, 0]))
            for values in (transition.valid, transition.reward, transition.terminated, transition.truncated):
                assert values.tolist() == [expected] * 2
            assert episodes.returns.tolist() == [1] * 2 * expected


def test_a_vector_class_that_keeps_the_final_observation_to_itself_stops_the_run():
    with made("OwnVector-v0", 2, kwargs={"mode": "SameStep"}, vectorization="native") as envs:
        envs.reset([0, 1])
        with pytest.raises(RunError, match=r"as info\['final_obs'\]\. Received: \[\]\..*--env.vectorization sync"):
            envs.step(np.array([0, 0]))


@pytest.mark.parametrize(
    ("id", "kwargs", "message"),
    [
        ("CartPol-v1", {}, r"no environment `CartPol-v1`\. Nearest: `CartPole-v1`"),
        ("cartpole-V1", {}, r"Nearest: `CartPole-v1`"),
        ("CartPole", {}, r"Nearest: `CartPole-v1`"),
        ("hvd_dqn.envs.identity:Identty-v0", {}, r"Nearest: `hvd_dqn.envs.identity:Identity-v0`"),
        (
            "Nothing/Alike-v0",
            {},
            r"`Nothing/Alike-v0`\. If another package registers it, write `package:EnvId-v0`",
        ),
        ("", {}, r"no environment ``"),
        ("Cart Pole!", {}, r"no environment `Cart Pole!`"),
        ("LunarLander-v2", {}, r"no environment `LunarLander-v2`\. .*use `LunarLander-v3` instead"),
        ("CartPole-v7", {}, r"`CartPole-v7`\. .*`v7`.*versioned environments: \[ `v0`, `v1` \]"),
        ("no_such_module:CartPole-v1", {}, r"no module `no_such_module`.*PYTHONPATH"),
        ("Pendulum-v1", {}, r"`Pendulum-v1` has continuous actions.*--env.action_bins 3.*Received: Box"),
        (
            "Odd-v0",
            {"kind": "text"},
            r"observations `inner.note` of `Odd-v0` cannot be learned from: .*Received: Text\. Drop it: "
            r"--env\.wrappers '\[\{FilterObservation: \{filter_keys: \[a, b\]\}\}\]'\.$",
        ),
        ("Odd-v0", {"kind": "graph"}, r"The observations of `Odd-v0` .*Received: Graph\. Turn it into numbers"),
        ("Odd-v0", {"kind": "nothing"}, r"An empty Dict observation space"),
        ("Odd-v0", {"kind": "deep"}, r"observations `a` of .*shape of \(2, 2, 2, 2\).*ReshapeObservation"),
        ("Odd-v0", {"kind": "volume"}, r"must be \[D\], \[H, W\] or \[H, W, C\]\. Received: a shape of \(2, 2, 2, 2\)"),
        ("Odd-v0", {"kind": "breaks"}, r"`Odd-v0` cannot be made .*breaks.*: OSError: no simulator at port 80"),
        ("Odd-v0", {"kind": "needs"}, r"needs the package `a_package_that_is_not_here`, which is not installed"),
        ("CartPole-v1", {"gravitas": 2}, r"`CartPole-v1` takes no argument `gravitas`"),
    ],
)
@pytest.mark.parametrize("vectorization", ["auto", "async"])
@pytest.mark.filterwarnings("error")
def test_an_environment_that_cannot_be_had_is_one_line_that_tells_the_way_out(id, kwargs, message, vectorization):
    with pytest.raises(InputError, match=message) as caught:
        Environments(id, 2, kwargs=kwargs, vectorization=vectorization)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("id", "package"), [("OwnVectorJax-v0", "a_package_that_is_not_here"), ("phys2d/CartPole-v1", "jax")]
)
def test_a_vector_class_whose_package_is_missing_names_it_and_the_other_way(id, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(InputError, match=f"package `{package}`, which is not .*--env.vectorization sync"):
        Environments(id, 2)


def test_a_module_that_fails_while_it_is_imported_is_named_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("import gymnasium\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match=r"`half_written` of .* cannot be imported: ZeroDivisionError: division by zero"
    ):
        Environments("half_written:My-v0", 1)


def test_a_missing_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("Box2D", "gymnasium.envs.box2d"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "Box2D", None)
    with pytest.raises(InputError, match=r"`LunarLander-v3` needs Box2D: pip install 'gymnasium\[box2d\]'"):
        Environments("LunarLander-v3", 1)


def test_the_identity_environment_rewards_repeating_its_state():
    with made("hvd_dqn.envs.identity:Identity-v0", 4) as envs:
        envs.reset(range(4))
        assert (envs.frames.layout.parts[0].categories, envs.actions) == ((4,), 4)
        for step in range(1, 21):
            transition, episodes = envs.step(envs.observation[:, 0])
            assert transition.reward.tolist() == [1, 1, 1, 1]
            assert transition.terminated.all() == (step % 10 == 0)
            assert not transition.truncated.any()
            assert episodes.returns.tolist() == ([10] * 4 if step % 10 == 0 else [])
        wrong = [envs.step((envs.observation[:, 0] + 1) % 4)[0].reward.sum() for _ in range(10)]
        assert sum(wrong) == 0


def test_ctrl_c_still_reaches_a_rank_whose_copies_are_processes():
    before = signal.getsignal(signal.SIGINT)
    with made("Counter-v0", 2, vectorization="async") as envs:
        assert signal.getsignal(signal.SIGINT) is before
        envs.reset([0, 1])
        for process in envs._vector.processes:  # which a terminal's Ctrl-C reaches, too
            os.kill(process.pid, signal.SIGINT)
        for _ in range(3):
            envs.step(np.zeros(2, np.int64))
