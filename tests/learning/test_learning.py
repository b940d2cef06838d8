"""Learning is the proof: small problems are solved on one rank and on two, from process start to a confirmed return."""

import json

import pytest

from tests.ranks import horovodrun, run


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sync", ["gradients", "parameters"])
def test_identity_is_solved(ranks, sync, tmp_path):
    command = ["hvd-dqn", "train", "identity", "--seed", "1", "--ranks.sync", sync, "--run_dir", tmp_path / "run"]
    done = run(command) if ranks == 1 else horovodrun(2, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(tmp_path)["return_mean"] == 10.0  # the best there is; at random 2.5


@pytest.mark.parametrize("scaling", ["weak", "strong"])
def test_cartpole_is_solved_by_two_ranks(scaling, tmp_path):
    command = ["hvd-dqn", "train", "cartpole", "--ranks.scaling", scaling, "--run_dir", tmp_path / "run"]
    done = horovodrun(2, *command, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    final = result(tmp_path)
    assert final["episodes"] == 100
    assert final["return_mean"] >= 475


def result(folder) -> dict:
    return json.loads((folder / "run" / "run.json").read_text())["result"]
