"""The run directory: nobody's run is written over, but a job may make its own again."""

import datetime
import multiprocessing
from pathlib import Path

import pytest

from hvd_dqn.config import Config, setting_names
from hvd_dqn.config_files import configure
from hvd_dqn.errors import InputError
from hvd_dqn.storage.run_directory import NETWORK, TASK, Run, check_same_task, default_path, new_or_given


def test_a_directory_is_made_again_only_by_the_job_that_is_running_in_it(tmp_path):
    run = Run(tmp_path / "run")
    run.create(Config(), {"size": 2})
    with pytest.raises(InputError, match=r"already holds a run.*--resume.*--run-dir"):
        run.create(Config(), {"size": 1})
    run.create(Config(seed=1), {"size": 1}, again=True)  # an elastic job that lost a rank before its first commit
    assert (run.about()["size"], run.config().seed) == (1, 1)
    run.note(ended="finished")
    with pytest.raises(InputError, match=r"already holds a run"):
        run.create(Config(), {"size": 1}, again=True)


def test_two_jobs_that_start_in_the_same_second_have_a_directory_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        paths = pool.map(default_path, ["cartpole"] * 40, chunksize=1)
    assert len(set(paths)) == 40
    assert all(path.is_dir() for path in paths)
    today = datetime.datetime.now().year
    assert min(len(path.name) for path in paths) == len(f"cartpole-{today}1231-235959")


def test_a_new_directory_in_which_nothing_was_written_goes_and_a_given_one_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with new_or_given(None, "a") as path:
        assert path.is_dir()
    with new_or_given("mine", "a") as given:
        pass
    with new_or_given(None, "a") as used:
        Run(used).create(Config(), {"size": 1})
    assert sorted(tmp_path.rglob("*")) == sorted(
        tmp_path / place for place in ("mine", "runs", used, used / "config.yaml", used / "run.json")
    )
    assert given.name == "mine"


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Path.touch, "Not a directory"), (lambda path: path.symlink_to("gone"), "runs is no directory")],
)
def test_where_no_directory_can_be_made_it_says_so_in_a_line(make, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs")
    with pytest.raises(InputError, match=rf"Cannot write the run directory runs/a-\S+: {reason}.*--run-dir") as caught:
        default_path("a")
    assert "\n" not in str(caught.value)


def changed(**settings) -> Config:
    return configure(Config(), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        #  changed in a resume                      what the message says
        ({"env.id": "Acrobot-v1"}, r'`env.id` was "CartPole-v1" and is "Acrobot-v1" now\. Leave --env.id out'),
        ({"env.kwargs": {"gravity": 9}}, r'another task\. `env.kwargs` was {} and is {"gravity": 9} now'),
        ({"env.wrappers": "FlattenObservation"}, r'`env.wrappers` was \[\] and is \["FlattenObservation"\] now'),
        ({"env.max_episode_steps": 9}, "`env.max_episode_steps` was null"),
        ({"env.observation_scale": 9}, "`env.observation_scale` was null"),
        ({"env.action_bins": 3}, "`env.action_bins` was null"),
        ({"env.action_mask": "off"}, '`env.action_mask` was "auto" and is "off" now'),
        ({"agent.objective": "c51"}, "another network. `agent.objective` was"),
        ({"agent.atoms": 21}, "another network. `agent.atoms` was 51 and is 21 now"),
        ({"agent.support": (-1, 1)}, "another network. `agent.support` was"),
        ({"agent.quantiles": 8}, "another network. `agent.quantiles` was"),
        ({"agent.factored": True}, "another network. `agent.factored` was"),
        ({"env.frame_stack": 2}, "`env.frame_stack` was 1 and is 2 now. Leave --env.frame-stack out"),
        ({"env.reward_scale": 0.5}, "`env.reward_scale` was 1.0 and is 0.5 now"),
        ({"env.reward_clip": 1}, "`env.reward_clip` was null and is 1.0 now"),
        ({"env.normalize_observation": True}, "`env.normalize_observation` was false and is true now"),
        ({"env.normalize_reward": True}, "`env.normalize_reward` was false"),
        ({"env.clip_observation": 5}, "`env.clip_observation` was 10.0"),
        ({"agent.hidden": (64, 64)}, r"another network\. `agent.hidden` was \[256, 256\] and is \[64, 64\] now"),
        ({"agent.network": "cnn"}, "another network. `agent.network` was"),
        ({"agent.dueling": True}, "another network. `agent.dueling` was"),
        ({"agent.gamma": 0.9, "learner.learning_rate": 1e-4, "env.envs_per_rank": 4, "env.on_nonfinite": "hold"}, None),
        (
            {"total_steps": 10**6, "replay.capacity": 2_000, "env.restart_failed_envs": 9, "env.vectorization": "sync"},
            None,
        ),
    ],
)
def test_a_run_is_not_resumed_as_another_one(settings, message, tmp_path):
    run = Run(tmp_path / "run")
    run.create(Config(), {"size": 1})
    if message is None:
        check_same_task(run, changed(**settings))
        return
    with pytest.raises(InputError, match=message) as caught:
        check_same_task(run, changed(**settings))
    assert "\n" not in str(caught.value)
    assert "start a new run in another --run-dir" in str(caught.value)


def test_every_setting_that_makes_a_run_is_a_setting():
    assert set(TASK + NETWORK) <= setting_names().keys()


def test_every_command_and_every_change_is_kept(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    run.create(Config(), {"size": 1})
    for steps, command, settings, size in [
        (1_000, "first", {"agent.gamma": 0.9, "total_steps": 9}, 2),
        (2_000, "second", {"agent.gamma": 0.9, "total_steps": 9}, 2),
        (3_000, "third", {"agent.gamma": 0.5, "total_steps": 9}, 1),
    ]:
        monkeypatch.setattr("sys.argv", ["hvd-dqn", command])
        run.resume(changed(**settings), {"size": size}, steps)
    resumes = run.about()["resumes"]
    assert [each["total_steps"] for each in resumes] == [1_000, 2_000, 3_000]
    assert [each["command"] for each in resumes] == ["hvd-dqn first", "hvd-dqn second", "hvd-dqn third"]
    assert [each["size"] for each in resumes] == [2, 2, 1]
    assert [each["changed"] for each in resumes] == [
        {"agent.gamma": {"from": 0.99, "to": 0.9}, "total_steps": {"from": 50_000, "to": 9}},
        {},
        {"agent.gamma": {"from": 0.9, "to": 0.5}},
    ]
    assert all(each["at"] for each in resumes)
    assert run.about()["command"] != "hvd-dqn third"
