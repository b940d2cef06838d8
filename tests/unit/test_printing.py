"""What environments print neither drowns the display nor mixes with results."""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import hvd_dqn
from hvd_dqn.commands import evaluate, train
from hvd_dqn.printing import MOST_LINES, few_printed_lines
from hvd_dqn.ranks.world import Solo


class Talks(gymnasium.Env):
    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        print("a new episode")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        print("a", end=" ")
        print("step")
        return np.zeros(2, np.float32), 1.0, bool(self.np_random.random() < 0.2), False, {}


gymnasium.register("Talks-v0", Talks)
WORDS = ["identity", "--env.id", "tests.unit.test_printing:Talks-v0", "--total-steps", "200", "--learner.xla", "false"]


def test_few_lines_are_shown_whole_and_the_rest_is_dropped_with_a_word(capsys):
    with few_printed_lines(3) as results:
        print("one\ntwo", end="")
        print(" and a half")
        print("result", file=results)
        for number in range(3, 100):
            print(number)
    shown = capsys.readouterr()
    assert shown.out == "result\n"
    assert shown.err.startswith("one\ntwo and a half\n3\nhvd-dqn: The environment prints. ")
    assert shown.err.count("\n") == 4


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.filterwarnings("ignore")
def test_results_stay_alone_on_stdout_and_the_display_readable(vectorization, tmp_path, capfd):
    words = [*WORDS, "--run-dir", str(tmp_path / "run"), "--env.vectorization", vectorization]
    train.run(words, Solo())
    shown = capfd.readouterr()
    lines = shown.out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("identity: ") for line in lines)
    assert 0 < shown.err.count("a step") <= 3 * MOST_LINES  # of training, of evaluation, and of the rank's own copy
    assert "What follows its first 20 lines is dropped" in shown.err

    evaluate.run(["--run-dir", str(tmp_path / "run"), "--episodes", "10", "--json"], Solo())
    shown = capfd.readouterr()
    assert json.loads(shown.out)["episodes"] == 10
    assert shown.err.count("a step") <= 3 * MOST_LINES


@pytest.mark.filterwarnings("ignore")
def test_from_python_without_progress_nothing_is_taken_away(tmp_path, capsys):
    hvd_dqn.train("identity", total_steps=80, run_dir=tmp_path, progress=False, **{"env.id": "Talks-v0"})
    assert capsys.readouterr().out.count("a step") > 80
