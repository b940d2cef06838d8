"""Environments that break Gymnasium's interface or their own space: what is said before training, and during it."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from hvd_dqn.envs.conformity import fault_of_error, outside, wrong_form
from hvd_dqn.envs.environments import Environments
from hvd_dqn.errors import InputError, RunError
from tests.unit.envs.test_environments import made, register

BOX, BYTES = spaces.Box(-1, 1, (4,), np.float32), spaces.Box(0, 255, (2, 2), np.uint8)
BOTH = spaces.Dict({"a": BOX, "b": spaces.Discrete(3, start=1)})


class Bad(gymnasium.Env):
    """Breaks one rule, named by `how`, from step `at` on."""

    action_space = spaces.Discrete(2)

    def __init__(self, how="", at=0):
        self.observation_space = {"bytes": BYTES, "state": spaces.Discrete(4)}.get(how, BOX)
        self.how, self.at = how, at
        if how == "display":
            raise RuntimeError("(65550) b'X11: The DISPLAY environment variable is missing'")

    def _observation(self):
        if self.t < self.at:
            return np.zeros(4, np.float32)
        return {
            "shape": np.zeros(3, np.float32),
            "bytes": np.full((2, 2), 0.5),
            "state": np.array([1]),
            "outside": np.full(4, 1.5, np.float32),
        }.get(self.how, np.zeros(4, np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        if self.how == "reset window":
            raise RuntimeError("No available video device")
        return {"one": self._observation(), "no info": (self._observation(), None)}.get(
            self.how, (self._observation(), {})
        )

    def step(self, action):
        self.t += 1
        values = self._observation(), 1.0, False, False, {"x": 1}
        return (*values[:3], {"x": 1}) if self.how == "four" and self.t >= self.at else values


class NoSeed(Bad):
    def reset(self):
        self.t = 0
        return self._observation(), {}


register("Bad-v0", Bad)
register("BadInTime-v0", Bad, max_episode_steps=50)  # a time limit unpacks what `step` returns
register("NoSeed-v0", NoSeed)


@pytest.mark.parametrize("first_index", [0, 3])  # Gymnasium's own checker sits in copy 0
@pytest.mark.parametrize(
    ("id", "how", "line"),
    [
        ("Bad-v0", "four", r"step must return \(observation, .*\), received 4 values\. .*old Gym.*shimmy"),
        ("BadInTime-v0", "four", r"step must return \(observation, .*\), received 4 values\. .*old Gym.*shimmy"),
        (
            "Bad-v0",
            "one",
            r"reset must return \(observation, info\), received only an array of shape \(4,\)\. .*old Gym",
        ),
        (
            "Bad-v0",
            "no info",
            r"reset must return \(observation, info\), received no dictionary as info, but a NoneType",
        ),
        ("NoSeed-v0", "", r"reset must take seed and options by keyword, and takes no `seed`\. .*old Gym"),
        ("Bad-v0", "shape", r"broke its own .*: expected observation of shape \(4,\), received \(3,\).*would not help"),
        ("Bad-v0", "bytes", r"expected observation of type uint8, received float64"),
        ("Bad-v0", "state", r"expected observation of shape \(\), received \(1,\)"),
        (
            "Bad-v0",
            "reset window",
            r"needs a display: RuntimeError: No available video device\. .*SDL_VIDEODRIVER=dummy",
        ),
    ],
)
def test_what_no_restart_can_mend_is_bad_input_before_training(id, how, line, first_index):
    with made(id, 2, kwargs={"how": how}, first_index=first_index, restarts=5) as envs:
        with pytest.raises(InputError, match=line) as caught:
            envs.try_out()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("first_index", [0, 3])
@pytest.mark.parametrize(
    ("id", "how", "line"),
    [
        ("Bad-v0", "four", r"on rank 1 broke Gymnasium's interface in step 7: step must .* received 4 values"),
        ("BadInTime-v0", "four", r"on rank 1 broke Gymnasium's interface in step 7: step must .* received 4 values"),
        ("Bad-v0", "shape", r"on rank 1 broke its own observation space in step 7: .* \(4,\), received \(3,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_during_training_it_ends_the_run_at_once_without_the_advice_to_restart(id, how, line, first_index):
    with made(id, 2, kwargs={"how": how, "at": 7}, first_index=first_index, rank=1, restarts=5) as envs:
        envs.try_out()
        envs.reset([0, 1])
        for _ in range(6):
            envs.step(np.array([0, 0]))
        with pytest.raises(RunError, match=rf"Environment {first_index} \({id}\) {line}") as caught:
            envs.step(np.array([0, 0]))
        assert "restart_failed_envs" not in str(caught.value)
        assert envs.restarted == 0


def test_an_environment_that_needs_a_display_tells_how_to_do_without():
    with pytest.raises(InputError, match=r"`Bad-v0` cannot be made.*DISPLAY.*MUJOCO_GL=egl.*xvfb-run"):
        Environments("Bad-v0", 1, kwargs={"how": "display"})


@pytest.mark.filterwarnings("ignore")
def test_values_outside_the_declared_space_are_told_once():
    with made("Bad-v0", 2, kwargs={"how": "outside", "at": 3}) as envs:
        envs.try_out()
        envs.reset([0, 1])
        for _ in range(120):
            envs.step(np.array([0, 0]))
        (warning,) = envs.warnings
        assert warning.startswith(
            "The observation 1.5 at index [0] lies outside the declared -1.0 to 1.0 of Bad-v0, in step 3"
        )


def test_a_trial_leaves_no_trace_in_what_follows():
    seen = []
    for tries in (False, True):
        with made("CartPole-v1", 2, vectorization="sync") as envs:
            if tries:
                envs.try_out()
            envs.reset([4, 5])
            seen.append([envs.observation, *(envs.step(np.array([0, 1]))[0].next_observation for _ in range(30))])
    np.testing.assert_array_equal(*seen)


def test_forms_and_bounds_are_found_in_every_kind_of_space():
    good = {"a": np.zeros(4, np.float32), "b": 1}
    for space, value, text in [
        (BOX, np.zeros(4), ""),  # float64 fits
        (BOX, [0, 0, 0, 0], ""),
        (BYTES, np.zeros((2, 2), np.int64), "of type uint8, received int64"),
        (spaces.Discrete(3), np.uint8(2), ""),
        (spaces.Discrete(3), 1.5, "of type int64, received float64"),
        (BOTH, good, ""),
        (BOTH, {"a": good["a"]}, r"with the keys ['a', 'b'], received ['a']"),
        (BOTH, {**good, "a": np.zeros(5)}, "observation['a'] of shape (4,), received (5,)"),
        (BOTH, 3, "to be a dictionary, received a int"),
        (spaces.Tuple((BOX, BOX)), (good["a"],), "to be a tuple of 2, received a tuple"),
        (spaces.Text(3), "abcdef", "in Text"),
    ]:
        found = wrong_form(space, value)
        assert (text in found) if text else found == "", (space, value, found)
    for space, batch, text in [
        (BOX, np.zeros((2, 4)), ""),
        (
            BOX,
            np.array([[0, 0, 0, 0], [0, 0, 2, 0]]),
            "observation 2 at index [2] lies outside the declared -1.0 to 1.0",
        ),
        (spaces.Discrete(3, start=1), np.array([1, 4]), "observation 4 lies outside the declared 1 to 3"),
        (
            spaces.MultiDiscrete([2, 3]),
            np.array([[1, 2], [2, 0]]),
            "observation 2 at index [0] lies outside the declared 0 to 1",
        ),
        (spaces.MultiBinary(2), np.array([[1, 0], [0, 3]]), "observation 3 at index [1]"),
        (BOTH, {"a": np.zeros((2, 4)), "b": np.array([1, 0])}, "observation['b'] 0 lies outside the declared 1 to 3"),
    ]:
        found = outside(space, batch)
        assert (text in found) if text else found == "", (space, batch, found)


def test_an_error_of_the_environment_itself_is_not_taken_for_a_broken_interface():
    unpack = ValueError("not enough values to unpack (expected 5, got 4)")
    assert fault_of_error(unpack, by_wrapper=True)
    assert fault_of_error(unpack, by_wrapper=False) is None  # its own, somewhere else
    for error in (ValueError("a display of emotion"), RuntimeError("lost its connection")):
        assert fault_of_error(error, by_wrapper=True) is None
