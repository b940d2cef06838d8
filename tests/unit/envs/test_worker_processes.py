"""Failing environments: what is said of them, how they are made anew, and what of their episodes is learned from."""

import os
import re
import signal
import time
from contextlib import closing

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dqn.agent.replay import Replay
from hvd_dqn.agent.transition import Transition
from hvd_dqn.envs.environments import Environments
from hvd_dqn.errors import RunError
from tests.unit.agent.test_replay import Reference, rows_of, sample
from tests.unit.envs.test_environments import made, register


class Broken(gymnasium.Env):
    """Observes its first random number and its steps; action 1 ends the episode.

    It fails as `how` says in its step `at`, counted over episodes, and then leaves the file `marker`: where there is
    one, new environments are sound.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(2)
    made = closed = 0

    def __init__(self, how="", at=3, marker=""):
        self.how, self.at, self.marker = "" if marker and os.path.exists(marker) else how, at, marker
        self.total = 0
        Broken.made += 1
        if self.how.endswith("never again") and Broken.made > 3:
            raise OSError("the port is taken")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.start = 0, self.np_random.random()
        if self.how.startswith("reset"):
            self._fail()
        return np.array([self.start, 0.0]), {}

    def step(self, action):
        self.steps += 1
        self.total += 1
        seen, reward = np.array([self.start, self.steps]), 1.0
        if self.total == self.at and self.how:
            self._fail()
            if self.how == "observation":
                seen[1] = np.inf
            if self.how == "reward":
                reward = np.nan
        return seen, reward, bool(action == 1), False, {}

    def _fail(self):
        if self.marker:
            open(self.marker, "w").close()
        if "dies" in self.how:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hangs up" in self.how:
            os.closerange(3, 256)
            time.sleep(60)
        if "raises" in self.how:
            raise ValueError("the wheel came off\nof the car")

    def close(self):
        Broken.closed += 1
        if "close breaks" in self.how:
            raise OSError("cannot close either")
        if "close hangs" in self.how:
            time.sleep(60)


class BrokenVector(gymnasium.vector.VectorEnv):
    made = 0

    def __init__(self, num_envs, **_):
        BrokenVector.made += 1
        self.sound = BrokenVector.made > 1
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = np.zeros(self.num_envs)
        return self.np_random.random((self.num_envs, 1)), {}

    def step(self, actions):
        self.steps += 1
        if not self.sound and self.steps[0] == 3:
            raise ValueError("the wheel came off\nof the car")
        return self.steps[:, None].copy(), np.ones(self.num_envs), actions == 1, np.zeros(self.num_envs, bool), {}


register("Broken-v0", Broken)
register("BrokenVector-v0", vector_entry_point=BrokenVector)
LEFT = np.array([0, 0])
# Formatted from the environment on, not from Gymnasium's wrappers around it.
TRACE = (
    r"(?s)\nTraceback \(most recent call last\):\n  File [^\n]*test_worker_processes.py\", line \d+, in step\n"
    r".*in _fail\n.*ValueError: the wheel came off\nof the car"
)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_what_raises_ends_the_run_with_its_names_and_its_own_traceback(vectorization):
    arguments = {"vectorization": vectorization, "kwargs": {"how": "step raises"}, "first_index": 4, "rank": 2}
    with made("Broken-v0", 2, **arguments) as envs:
        envs.reset([0, 1])
        envs.step(LEFT)
        envs.step(LEFT)
        with pytest.raises(RunError) as caught:
            envs.step(LEFT)
        first, _, rest = str(caught.value).partition("\n")
        assert re.match(
            r"Environment [45] \(Broken-v0\) on rank 2 failed in step 3: ValueError: the wheel came off of the car\. "
            r"Fix it, .*--env\.restart_failed_envs\.$",
            first,
        )
        assert re.fullmatch(TRACE, f"\n{rest}")
        if vectorization == "async":
            assert not any(process.is_alive() for process in envs._vector.processes)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_reset_that_raises_ends_the_run_too(vectorization):
    with made("Broken-v0", 2, vectorization=vectorization, kwargs={"how": "reset raises"}, first_index=4) as envs:
        with pytest.raises(
            RunError, match=r"Environment [45] \(Broken-v0\) on rank 0 failed at its reset: ValueError"
        ) as e:
            envs.reset([0, 1])
        assert "in _fail" in str(e.value)


def test_a_vector_class_that_raises_names_all_its_copies():
    BrokenVector.made = 0
    with made("BrokenVector-v0", 3, first_index=3, rank=1, vectorization="native") as envs:
        envs.reset([0, 1, 2])
        envs.step(np.zeros(3, int))
        envs.step(np.zeros(3, int))
        with pytest.raises(
            RunError, match=r"Environment 3 to 5 \(BrokenVector-v0\) on rank 1 failed in step 3: Val"
        ) as e:
            envs.step(np.zeros(3, int))
        assert "in step\n    raise ValueError" in str(e.value)


@pytest.mark.parametrize(
    ("how", "end"), [("step dies", r"ended with exit code -9"), ("step hangs up", r"hung up\. Fix")]
)
def test_a_worker_that_is_gone_ends_the_run_and_leaves_no_process(how, end, monkeypatch):
    monkeypatch.setattr("hvd_dqn.envs.environments.CLOSING_SECONDS", 0.5)
    arguments = {"vectorization": "async", "kwargs": {"how": how, "at": 2}, "first_index": 4, "rank": 2}
    with made("Broken-v0", 2, **arguments) as envs:
        processes = envs._vector.processes
        envs.reset([0, 1])
        envs.step(LEFT)
        with pytest.raises(
            RunError, match=rf"Environment \d(, 5)? \(Broken-v0\) on rank 2 failed in step 2: its process ({end})"
        ):
            envs.step(LEFT)
        assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(
    ("vectorization", "how"),
    [
        ("sync", "step raises"),
        ("sync", "step raises, close breaks"),
        ("sync", "step raises, close hangs"),
        ("sync", "reward"),
        ("sync", "observation"),
        ("async", "step raises"),
        ("async", "step dies"),
        ("async", "observation"),
        ("native", "step raises"),
    ],
)
def test_after_a_failure_all_copies_are_made_anew_and_the_run_goes_on(vectorization, how, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("hvd_dqn.envs.environments.CLOSING_SECONDS", 0.5 if "hangs" in how else 5)
    marker, begun = tmp_path / "failed", []
    started = time.monotonic()
    for _ in range(1 if vectorization == "async" else 2):  # one seed, one run
        marker.unlink(missing_ok=True)
        BrokenVector.made = 0
        arguments = {"frame_stack": 2, "restarts": 2, "rank": 1, "first_index": 2}
        if vectorization == "native":
            envs = Environments("BrokenVector-v0", 2, vectorization="native", **arguments)
        else:
            kwargs = {"how": how, "marker": str(marker)}
            envs = Environments("Broken-v0", 2, vectorization=vectorization, kwargs=kwargs, **arguments)
        with closing(envs):
            old = envs._vector
            envs.reset([6, 7])
            first = envs.observation
            assert envs.step(LEFT)[0].valid.all()
            transition, episodes = envs.step(np.array([0, 1]))  # the second copy begins a new episode
            assert (transition.terminated.tolist(), episodes.lengths.tolist()) == ([False, True], [2])
            before = transition.next_observation[0]

            Broken.closed = 0
            transition, episodes = envs.step(np.array([1, 1]))
            if vectorization == "sync":
                assert Broken.closed == (1 if "hangs" in how else 2)
            assert (transition.valid.tolist(), transition.terminated.tolist()) == ([False, False], [False, False])
            assert transition.truncated.tolist() == [True, False]
            assert (transition.reward.tolist(), transition.action.tolist()) == ([0, 0], [1, 1])
            types = [np.float32, np.int64, np.float32, np.bool_, np.bool_, np.float32, np.bool_]
            assert [array.dtype for array in transition[:7]] == types
            assert len(episodes.returns) == len(episodes.lengths) == 0
            np.testing.assert_array_equal(transition.observation[0], before)
            np.testing.assert_array_equal(envs.observation, np.concatenate([transition.next_observation] * 2, axis=-1))
            assert not np.array_equal(envs.observation, first)
            assert not envs.returns.any()
            begun.append(envs.observation)

            for number in range(1, 6):
                transition, episodes = envs.step(np.array([number == 5, 0]))
                assert transition.valid.all()
            assert (episodes.returns.tolist(), episodes.lengths.tolist()) == ([5], [5])
            assert envs.restarted == 1
            assert type(envs._vector) is type(old) is not None
            assert envs._vector is not old
            if vectorization == "async":
                assert not any(process.is_alive() for process in old.processes)
        said = capfd.readouterr().err.splitlines()
        ours = [line for line in said if line.startswith("hvd-dqn: ")]
        assert len(ours) == 1
        names = "2, 3" if vectorization == "native" else r"[23](, 3)?"
        id = "BrokenVector-v0" if vectorization == "native" else "Broken-v0"
        assert re.match(
            rf"hvd-dqn: Environment {names} \({id}\) on rank 1 .* in step 3: .*; restarts left: 1\.$", ours[0]
        )
        assert ("ValueError: the wheel came off" in said) == ("raises" in how)
    np.testing.assert_array_equal(begun[0], begun[-1])
    assert time.monotonic() - started < 50  # an environment that hangs while it is closed does so for a minute


def test_a_run_ends_when_its_restarts_are_used_up_and_each_begins_with_other_seeds(capfd):
    starts = []
    with made("Broken-v0", 2, restarts=2, kwargs={"how": "step raises"}) as envs:
        envs.reset([6, 7])
        for left in (1, 0):
            starts.append(envs.observation[:, 0].tolist())
            valid = [envs.step(LEFT)[0].valid[0] for _ in range(3)]
            assert valid == [True, True, False]
            assert f"restarts left: {left}." in capfd.readouterr().err
        starts.append(envs.observation[:, 0].tolist())
        envs.step(LEFT)
        envs.step(LEFT)
        with pytest.raises(RunError, match=r"failed in step 9: .*--env.restart_failed_envs\.\nTraceback"):
            envs.step(LEFT)
        assert len({start for pair in starts for start in pair}) == 6


def test_restarts_are_counted_over_the_whole_run_also_where_it_was_resumed(tmp_path):
    kwargs = {"how": "step raises"}
    with (
        made("Broken-v0", 2, restarts=1, kwargs=kwargs) as one,
        made("Broken-v0", 2, restarts=1, kwargs=kwargs) as other,
    ):
        one.probe()
        one.reset([6, 7])
        for _ in range(4):
            one.step(LEFT)
        state = one.state()
        assert not other.load_state(state).any()  # it fails in the probe and cannot be put back
        assert other.restarted == 1
        other.step(LEFT)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_reset_that_fails_is_made_good_by_a_restart(vectorization, tmp_path, capfd):
    kwargs = {"how": "reset raises", "marker": str(tmp_path / "failed")}
    with made("Broken-v0", 2, vectorization=vectorization, restarts=1, kwargs=kwargs) as envs:
        envs.reset([6, 7])
        assert re.search(r"failed at its reset: ValueError.*restarts left: 0", capfd.readouterr().err)
        assert envs.step(LEFT)[0].valid.all()
        assert (tmp_path / "failed").exists()


def test_an_environment_that_cannot_be_made_again_uses_up_the_restarts(capfd):
    Broken.made = Broken.closed = 0
    with made("Broken-v0", 2, restarts=2, kwargs={"how": "step raises, never again"}) as envs:
        envs.reset([6, 7])
        envs.step(LEFT)
        envs.step(LEFT)
        with pytest.raises(
            RunError, match=r"0, 1 \(Broken-v0\) on rank 0 could not be made again in step 3: .*port is taken"
        ):
            envs.step(LEFT)
        assert len(re.findall("restarts left", capfd.readouterr().err)) == 2
    # Two at first; then one whose neighbour could not be made. What was made is closed, once.
    assert Broken.made == 5
    assert Broken.closed == 3


# --- what is learned from it -----------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    n_step=st.integers(1, 4),
    stack=st.integers(1, 3),
    spare_slots=st.integers(0, 12),
    envs=st.integers(1, 3),
    cycles=st.integers(1, 60),
    cut_rate=st.sampled_from([0.05, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_cut_ends_an_episode_as_truncated_with_its_true_last_observation(
    n_step, stack, spare_slots, envs, cycles, cut_rate, seed
):
    slots = n_step + stack + 1 + spare_slots
    draw = np.random.default_rng(seed)
    replay = Replay(
        slots, envs, (1,), np.float32, np.random.default_rng(0), n_step=n_step, frame_stack=stack, gamma=0.5
    )
    references = [Reference(slots, n_step, stack) for _ in range(envs)]
    frames = draw.random((envs, 1), np.float32)
    under_way = np.zeros(envs, bool)
    for cycle in range(cycles):
        none = np.zeros(envs, bool)
        action = cycle * envs + np.arange(envs)
        reward = draw.integers(-8, 8, envs).astype(np.float32)
        after = draw.random((envs, 1), np.float32)
        if draw.random() < cut_rate:  # of all environments of the rank, as they are made anew together
            replay.add(Transition(frames, action, reward, none, under_way, after, none))
            for reference, cut in zip(references, under_way, strict=True):
                if cut:
                    reference.episodes[-1]["end"] = "truncated"
            frames, under_way = after, none
            continue
        terminated, truncated = draw.random((2, envs)) < 0.1
        replay.add(Transition(frames, action, reward, terminated, truncated, after, ~none))
        for e, reference in enumerate(references):
            reference.add(
                frames[e], int(action[e]), float(reward[e]), bool(terminated[e]), bool(truncated[e]), after[e]
            )
        under_way = ~(terminated | truncated)
        frames = np.where(under_way[:, None], after, draw.random((envs, 1), np.float32))
    expected: dict[int, tuple] = {}
    for reference in references:
        expected |= reference.rows()
    if expected:
        # At most 3 * 19 starts: one of them is missed with a chance below 57 * (56/57)^4000 = 1e-29.
        assert rows_of(sample(replay, 2, 2000)) == expected


def test_what_failed_environments_showed_is_learned_from_up_to_the_failure(tmp_path, capfd):
    replay = Replay(30, 2, (2,), np.float32, np.random.default_rng(0), gamma=0.5)
    kwargs = {"how": "step raises", "marker": str(tmp_path / "failed")}
    with made("Broken-v0", 2, restarts=1, kwargs=kwargs) as envs:
        envs.reset([6, 7])
        shown = []
        for play in ([0, 0], [0, 1], [0, 0], [0, 0]):
            transition, _ = envs.step(np.array(play))
            replay.add(transition)
            shown.append(transition)
    assert [t.valid.tolist() for t in shown] == [[True] * 2, [True] * 2, [False] * 2, [True] * 2]
    batch = sample(replay, 1, 500)
    rows = {
        (*observation.tolist(), discount, *after.tolist())
        for observation, discount, after in zip(
            batch.observation[0], batch.discount[0], batch.next_observation[0], strict=True
        )
    }
    expected = {
        (*t.observation[i].tolist(), 0.5 * (not t.terminated[i]), *t.next_observation[i].tolist())
        for t in shown
        for i in range(2)
        if t.valid[i]
    }
    assert rows == expected
    assert len(replay) == 6
