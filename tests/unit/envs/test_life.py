"""The life of environments: readings that are held, episodes by seed for evaluations, and restarts that do not help."""

from contextlib import closing

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from hvd_dqn.envs import environments
from hvd_dqn.envs.environments import Environments
from hvd_dqn.errors import RunError

GAP = np.nan


class Sensors(gymnasium.Env):
    """Shows two readings that `script` tells for each step of an episode, plus ten times the seed of its reset."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)
    script = ((1.0, 2.0), (GAP, 3.0), (np.inf, 4.0), (5.0, GAP))
    resets = steps = 0  # of all copies

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Sensors.resets += 1
        self.base = 10.0 * (seed or 0)
        self.step_number = 0
        return self._show(), {}

    def step(self, action):
        Sensors.steps += 1
        self.step_number += 1
        return self._show(), float(action), self.step_number == len(self.script) - 1, False, {}

    def _show(self):
        return np.array(self.script[self.step_number], np.float32) + np.float32(self.base)


class LateSensors(gymnasium.vector.VectorEnv):
    """Two copies of Sensors that are reset one step late."""

    def __init__(self, num_envs, **_):
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Sensors.observation_space, Sensors.action_space

    def reset(self, *, seed=None, options=None):
        self.number = 0
        return self._show(), {}

    def step(self, actions):
        self.number += 1
        done = np.full(self.num_envs, self.number % 4 == 3)
        return self._show(), np.zeros(self.num_envs), done, np.zeros_like(done), {}

    def _show(self):
        return np.array([Sensors.script[self.number % 4]] * self.num_envs, np.float32)


class Broken(gymnasium.Env):
    """Fails in each step whose number, of all copies, is a multiple of `period`; 0: in each, and at later resets."""

    observation_space, action_space = spaces.Discrete(2), spaces.Discrete(2)
    period, steps, resets = 0, 0, 0

    def reset(self, *, seed=None, options=None):
        Broken.resets += 1
        if Broken.period == 0 and Broken.resets > 2:
            raise RuntimeError("no licence")
        return 0, {}

    def step(self, action):
        Broken.steps += 1
        if Broken.period == 0 or Broken.steps % Broken.period == 0:
            raise RuntimeError("no licence")
        return 0, 0.0, False, False, {}


gymnasium.register("Sensors-v0", Sensors, vector_entry_point=LateSensors)
gymnasium.register("BrokenOften-v0", Broken)


def made(*values, **named):
    return closing(Environments(*values, **named))


def seen(envs, steps):
    """What two copies show: the observations and the true next ones, [steps, 2, 2] each."""
    observations, nexts = [envs.observation], []
    for _ in range(steps):
        nexts.append(envs.step(np.zeros(2, np.int64))[0].next_observation)
        observations.append(envs.observation)
    return np.stack(observations[:-1]), np.stack(nexts)


@pytest.mark.parametrize("vectorization", ["sync", "auto"])
@pytest.mark.filterwarnings("ignore")
def test_a_reading_that_is_not_finite_takes_the_last_finite_value_of_its_episode(vectorization):
    with made("Sensors-v0", 2, vectorization=vectorization, holds=True) as envs:
        envs.reset([0, 0])
        late = vectorization == "auto"
        observations, nexts = seen(envs, 8 if late else 6)
        episode = [[1, 2], [1, 3], [1, 4], [5, 4]]
        # A vector class that resets late shows the last observation once more, as that of the reset.
        assert observations[:, 0].tolist() == (episode * 2 if late else (episode[:3] * 2))
        expected = [*episode[1:], episode[0]] * 2 if late else episode[1:] * 2
        assert nexts[:, 0].tolist() == nexts[:, 1].tolist() == expected
        assert envs.take_unreported().tolist() == [2 * 2 * 3, 0]
        assert envs.take_unreported().tolist() == [0, 0]
        assert envs.readings.first_held == "environment 0 (Sensors-v0) on rank 0 in step 1: nan at index [0]"


@pytest.mark.filterwarnings("ignore")
def test_at_an_episodes_beginning_it_takes_the_mean(monkeypatch):
    monkeypatch.setattr(Sensors, "script", ((GAP, 2.0), (GAP, 3.0), (7.0, 4.0), (GAP, 4.0)))
    with made("Sensors-v0", 2, vectorization="sync", holds=True) as envs:
        envs.readings.neutral = np.float32([-1.5, 99])
        envs.reset([0, 0])
        observations, nexts = seen(envs, 5)
    assert observations[:, 0].tolist() == [[-1.5, 2], [-1.5, 3], [7, 4], [-1.5, 2], [-1.5, 3]]
    assert nexts[2, 0].tolist() == [7, 4]  # the true last one, held too
    with made("Sensors-v0", 1, vectorization="sync", holds=True) as envs:
        envs.reset([0])
        assert envs.observation.tolist() == [[0, 2]]  # without a mean


@pytest.mark.filterwarnings("ignore")
def test_a_reward_that_is_not_finite_is_held_nowhere(monkeypatch):
    step = Sensors.step
    monkeypatch.setattr(Sensors, "step", lambda self, action: (step(self, action)[0], np.nan, False, False, {}))
    with made("Sensors-v0", 2, vectorization="sync", holds=True) as envs:
        envs.reset([0, 0])
        with pytest.raises(RunError, match="returned a non-finite reward in step 1: nan"):
            envs.step(np.zeros(2, np.int64))


@pytest.mark.filterwarnings("ignore")
def test_episodes_with_held_readings_are_restored():
    with (
        made("Sensors-v0", 2, vectorization="sync", holds=True) as one,
        made("Sensors-v0", 2, vectorization="sync", holds=True) as other,
    ):
        one.probe()
        one.reset([3, 4])
        seen(one, 5)
        assert other.load_state(one.state()).tolist() == [True, True]
        assert other.take_unreported().tolist() == one.take_unreported().tolist() != [0, 0]
        for mine, theirs in zip(seen(one, 4), seen(other, 4), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.filterwarnings("ignore")
def test_in_an_evaluation_an_episode_begins_with_its_seed_and_a_copy_that_is_over_rests(vectorization):
    with made("Sensors-v0", 3, vectorization=vectorization, holds=True, evaluates=True) as envs:
        Sensors.resets = Sensors.steps = 0
        envs.begin([1, None, 2])
        assert envs.observation[[0, 2]].tolist() == [[11, 12], [21, 22]]
        envs.step(np.zeros(3, np.int64))
        envs.begin([None, 5, None])
        assert envs.observation.tolist() == [[11, 13], [51, 52], [21, 23]]
        envs.step(np.ones(3, np.int64))
        transition, episodes = envs.step(np.ones(3, np.int64))
        assert transition.terminated.tolist() == [True, False, True]
        assert transition.next_observation.tolist() == [[15, 14], [51, 54], [25, 24]]
        assert episodes.returns.tolist() == [2, 2]
        for _ in range(4):  # copies 0 and 2 rest, and so does copy 1 after its last step
            transition, episodes = envs.step(np.ones(3, np.int64))
        assert not transition.terminated.any()
        assert envs.returns.tolist() == [0, 0, 0]
        envs.begin([7, 8, None])
        envs.rest(np.array([False, True, True]))
        envs.step(np.ones(3, np.int64))
        assert envs.observation[0].tolist() == [71, 73]
        assert envs.returns.tolist() == [1, 0, 0]
        if vectorization == "sync":
            assert Sensors.steps == 3 + 3 + 3 + 1  # no step but those of the episodes
            assert Sensors.resets == 3 + 1 + 2  # none but those with a seed; the first one resets all


def test_restarts_that_outrun_steps_end_the_job_however_many_are_left(capfd, monkeypatch):
    #    fails in each ... step    restarts   at the end of how many
    for period, restarts in [(0, 9), (3, 9), (2 * 12, None)]:
        monkeypatch.setattr(Broken, "period", period)
        Broken.steps = Broken.resets = 0
        with made("BrokenOften-v0", 2, vectorization="sync", restarts=10**6) as envs:
            envs.reset([1, 2])
            play = lambda envs=envs: [envs.step(np.zeros(2, np.int64)) for _ in range(400)]  # noqa: E731
            if restarts is None:  # a restart in twelve steps of a copy is one that helps
                play()
                assert envs.restarted > 20
                continue
            with pytest.raises(
                RunError, match=r"no licence. That was failure 10 within \d+ steps.*does not help: fix it"
            ):
                play()
            assert envs.restarted == restarts == capfd.readouterr().err.count("restarts left")
    assert environments.RESTARTS_IN_A_ROW == 10
