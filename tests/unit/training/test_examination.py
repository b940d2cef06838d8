"""What the doctor finds out about an environment."""

import json
import re

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from rich.console import Console

from hvd_dqn.commands import doctor
from hvd_dqn.commands.options import read_doctor
from hvd_dqn.config import Config
from hvd_dqn.config_files import configure
from hvd_dqn.errors import InputError
from hvd_dqn.training import examination
from tests.unit.envs.test_conformity import Bad
from tests.unit.envs.test_environments import register


class Strict(gymnasium.Env):
    """Allows one number in the first of two dimensions, and raises if the other is chosen."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.MultiDiscrete([2, 2])

    def _observed(self):
        self.allowed = int(self.np_random.integers(2))
        mask = np.array([self.allowed == 0, self.allowed == 1, 1, 1], np.int8)
        return np.array([self.allowed, 1], np.float32), {"action_mask": mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observed()

    def step(self, action):
        assert action[0] == self.allowed, "a forbidden action"
        self.steps += 1
        observation, info = self._observed()
        return observation, 1.0, self.steps == 7, False, info


register("Bad-v0", Bad)
register("Strict-v0", Strict)


def examined(agent=None, **env):
    config = configure(Config(), {"env": env, "agent": agent or {}})
    return json.loads(json.dumps(examination.examine_environment(config)))


def shown(report):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(doctor.render_environment(report))
    return " ".join(capture.get().split())


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(examination, "SECONDS", 0.05)


def test_a_sound_environment_is_described_and_has_no_problem():
    report = examined(id="Taxi-v4", envs_per_rank=3)
    assert report["problems"] == []
    assert re.fullmatch(r"[2-6] of 6 actions are allowed after a reset", report["action_mask"])
    assert report["resumes_exactly"]
    assert report["network"]["shape"] == [500]
    assert (report["network"]["low"], report["network"]["high"], report["network"]["actions"]) == (0, 1, 6)
    assert report["replay"] == {"shape": [1], "dtype": "int32", "bytes_per_transition": 22}  # 4 + 8 + 4 + 1 + 4 + 1 B
    assert report["random_play"]["episodes"] == 2  # 400 steps, a limit of 200
    assert [speed["copies"] for speed in report["steps_per_second"]] == [1, 3]
    text = shown(report)
    for words in (
        "network sees 500 float32 from 0 to 1",
        "22 bytes per transition",
        "speed of 3 copies",
        "No problem found.",
    ):
        assert words in text


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_told_with_the_way_out_and_the_rest_goes_on():
    for how, problem in [
        ("four", "received 4 values"),
        ("outside", "lies outside the declared -1.0 to 1.0"),
        ("", "it has no time limit. Give it one: --env.max-episode-steps"),
        ("", "Every number that was observed is 0"),
    ]:
        report = examined(id="Bad-v0", kwargs={"how": how}, envs_per_rank=1)
        assert any(problem in text for text in report["problems"]), report["problems"]
        assert report["spaces"]["action"] == "Discrete(2)"
        assert bool(report["checker"]) == bool(how)  # Gymnasium's own finds the same
        assert problem in shown(report)


def test_factored_actions_and_forbidden_ones_are_played_as_in_training():
    report = examined(id="Pendulum-v1", action_bins=3, envs_per_rank=2)
    assert report["problems"] == []
    assert "one of 3" in shown(report)
    masked = examined({"factored": True}, id="Strict-v0", envs_per_rank=2)  # raises at an action that its mask forbids
    assert masked["problems"] == []
    assert masked["network"]["actions"] == 4
    assert masked["action_mask"] == "3 of 4 actions are allowed after a reset"
    assert "2 dimensions of 2 choices, each chosen by itself" in shown(masked)


def test_wrappers_and_a_vector_class_that_is_not_used_are_told():
    report = examined(id="CartPole-v1", wrappers="FlattenObservation", envs_per_rank=2)
    assert report["wrappers"] == ["FlattenObservation"]
    assert report["problems"] == ["The vector class of `CartPole-v1` is not used: it takes no wrappers."]


def test_the_environment_is_named_by_its_id_a_file_or_both(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("env: {id: Taxi-v4, envs_per_rank: 5}\n")
    assert read_doctor([])[1] is None
    for words, id, copies in [
        (["--env", "Acrobot-v1"], "Acrobot-v1", 8),
        (["--env.id", "Acrobot-v1", "--env.envs-per-rank", "2"], "Acrobot-v1", 2),
        (["--config", str(file)], "Taxi-v4", 5),
        (["--config", str(file), "--env", "Acrobot-v1", "--json"], "Acrobot-v1", 5),
    ]:
        options, config = read_doctor(words)
        assert (config.env.id, config.env.envs_per_rank, options.as_json) == (id, copies, "--json" in words)
    for words, line in [
        (["Acrobot-v1"], "write --env Acrobot-v1"),
        (["--env.envs-per-rank", "2"], "Which environment shall be checked"),
        (["--env", "a", "--env.id", "b"], "are the same"),
        (["--env.envs", "2"], "There is no option"),
    ]:
        with pytest.raises(InputError, match=line):
            read_doctor(words)
