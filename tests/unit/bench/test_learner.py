"""The benchmark of the learner, on networks small enough for a test."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from hvd_dqn import __version__
from hvd_dqn.bench import learner as bench
from hvd_dqn.bench import results
from hvd_dqn.ranks.world import Solo

TINY = {
    "mlp": bench.LearnerCase("mlp", (8,), (4,), 2, batch=4, updates=3, phases=2, transitions=64),
    "cnn": bench.LearnerCase("cnn", (8,), (36, 36, 2), 3, batch=2, updates=2, phases=1, transitions=160),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "LEARNER_CASES", TINY)


def test_every_network_gets_positive_times_and_the_numbers_they_must_be_told_with():
    result = json.loads(json.dumps(bench.measure(Solo(), networks=("mlp", "cnn"), repeats=3)))
    assert bench.render(result).row_count == 2
    assert result["benchmark"] == "learner"
    assert (result["ranks"], result["repeats"]) == (1, 3)
    assert result["machine"]["cores"] >= 1
    assert result["threads"] >= 1
    assert all(result[name] for name in ("commit", "command"))
    assert [row["network"] for row in result["results"]] == ["mlp", "cnn"]
    for row in result["results"]:
        case = TINY[row["network"]]
        assert (row["batch"], row["updates_per_phase"]) == (case.batch, case.updates)
        for name in ("microseconds_per_update", "microseconds_with_sampling"):
            spread = row[name]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"] < 1e6
        assert row["updates_per_second"] == pytest.approx(1e6 / row["microseconds_per_update"]["median"])


def test_a_measurement_is_divided_by_all_updates_it_took_and_the_slowest_rank_counts(monkeypatch):
    class SlowNeighbour(Solo):
        size = 2

        def max(self, values):
            return np.maximum(values, neighbour)

    # Two networks with two jobs each, with and without sampling; in the first repeat the neighbour is slow.
    mine = iter([1.0, 2.0, 1.0, 1.0, 3.0, 4.0, 1.0, 1.0, 30.0, 40.0, 1.0, 1.0])
    neighbour = np.array([[6.0, 1.0, 1.0, 8.0], [1.0, 1.0, 1.0, 8.0], [1.0, 1.0, 1.0, 8.0]])
    monkeypatch.setattr(bench, "seconds_of", lambda job, world: next(mine))
    mlp, cnn = bench.measure(SlowNeighbour(), networks=("mlp", "cnn"), repeats=3)["results"]
    # The slowest rank took 6, 3 and 30 seconds alone, and 2, 4 and 40 with sampling, for 2 phases of 3 updates.
    assert mlp["microseconds_per_update"] == pytest.approx({"low": 4.5e6 / 6, "median": 6e6 / 6, "high": 18e6 / 6})
    assert mlp["microseconds_with_sampling"]["median"] == pytest.approx(4e6 / 6)
    assert cnn["microseconds_per_update"]["median"] == pytest.approx(1e6 / 2)  # 1 phase of 2 updates
    assert cnn["microseconds_with_sampling"]["median"] == pytest.approx(8e6 / 2)


def test_only_the_second_job_draws_its_batches():
    drawn = []
    draw = bench.Replay.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Replay, "draw", lambda *arguments: drawn.append(1) or draw(*arguments))
        train, sample_and_train = bench._jobs(TINY["mlp"], Solo())
        for job, expected in [(train, 0), (sample_and_train, TINY["mlp"].phases)]:
            drawn.clear()
            job()
            assert len(drawn) == expected


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_revision_is_the_commit_of_our_own_checkout_and_never_a_strangers(tmp_path, monkeypatch):
    def git(*arguments):
        name = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    package = tmp_path / "hvd_dqn"
    package.mkdir()
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    (package / "results.py").write_text("")
    assert results.revision() == __version__  # in no checkout
    git("init")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-m", "A stranger's")
    assert results.revision() == __version__  # in a checkout that does not track the package
    git("add", "hvd_dqn/results.py")
    git("commit", "-m", "Ours")
    commit = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    assert results.revision() == commit
    (package / "results.py").write_text("changed = True")
    assert results.revision() == f"{commit}-dirty"
