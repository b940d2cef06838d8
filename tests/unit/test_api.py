"""The Python API: trains, evaluates and plays in this process, says nothing, and leaves nothing behind."""

import ast
import contextlib
import dataclasses
import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import hvd_dqn
from hvd_dqn import api, job
from hvd_dqn.config import Config
from hvd_dqn.config_files import load_preset
from hvd_dqn.errors import InputError, RunError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.storage.checkpoint import Checkpoints
from hvd_dqn.storage.run_directory import Run
from hvd_dqn.training.trainer import Trainer
from tests.ranks import ROOT, run

SHORT = {"total_steps": 500, "evaluation": {"target_return": None, "episodes": 5, "final_episodes": 5}}


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    """A run of the smallest preset to its last step."""
    folder = tmp_path_factory.mktemp("runs") / "identity"
    return hvd_dqn.train("identity", seed=1, run_dir=folder, evaluation={"target_return": None})


@pytest.fixture
def copy(identity, tmp_path):
    """That run's directory, to be spoilt. It has forgotten all since its best evaluation at 2,000 total steps."""
    folder = Path(shutil.copytree(identity.run_dir, tmp_path / "copy"))
    best = Checkpoints(folder, Solo()).weights(2000, print)
    forgotten = {name: np.zeros_like(array) for name, array in best.arrays.items()}
    Checkpoints(folder, Solo()).save(2500, forgotten, best.state, best=2000)
    return folder


def test_a_training_returns_what_it_came_to(identity):
    about = json.loads((identity.run_dir / "run.json").read_text())
    assert (identity.outcome, about["ended"]) == ("finished", "finished")
    assert (identity.return_mean, identity.return_std, identity.episodes) == (10.0, 0.0, 20)
    assert (identity.total_steps, identity.best_return) == (2000, 10.0)
    assert identity.best_total_steps == about["best"][1]
    assert 0 < identity.seconds == about["result"]["seconds"]
    assert isinstance(identity.run_dir, Path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        identity.episodes = 1


def test_what_was_learned_acts_one_by_one_and_in_batches(identity):
    policy = identity.policy
    assert policy is identity.policy
    assert [policy.act(state) for state in range(4)] == [0, 1, 2, 3]
    assert policy.act(np.array([3, 1])).tolist() == [3, 1]
    assert policy.q_values(2).shape == (4,)
    assert policy.act(2, mask=[True, True, False, True]) != 2
    again = hvd_dqn.load_policy(identity.run_dir, best=False)
    assert isinstance(again, hvd_dqn.Policy)
    assert [again.act(state) for state in range(4)] == [0, 1, 2, 3]


def test_the_best_weights_and_the_newest_are_told_apart(copy):
    newest, best = hvd_dqn.evaluate(copy, episodes=20), hvd_dqn.evaluate(copy, episodes=20, best=True)
    assert (newest.total_steps, best.total_steps) == (2500, 2000)
    assert newest.return_mean < best.return_mean == 10.0
    assert hvd_dqn.load_policy(copy).act(range(4)).tolist() == [0, 1, 2, 3]
    assert hvd_dqn.load_policy(copy, best=False).act(range(4)).tolist() == [0, 0, 0, 0]


def test_nothing_is_printed_unless_it_is_asked_for(tmp_path, capfd):
    hvd_dqn.train("identity", run_dir=tmp_path / "quiet", **SHORT)
    assert capfd.readouterr() == ("", "")
    hvd_dqn.train("identity", run_dir=tmp_path / "loud", progress=True, **SHORT)
    out, err = capfd.readouterr()
    assert "identity: return" in out
    assert "global batch" in err


@pytest.mark.parametrize(
    "settings",
    [
        {"env": {"kwargs": {"n": 3}, "envs_per_rank": 2}, "learner": {"batch_size": 16}},
        {"env.kwargs": {"n": 3}, "env.envs_per_rank": 2, "learner.batch_size": 16},
        {"env": {"kwargs": {"n": 3}}, "env.envs_per_rank": 2, "learner": {"batch_size": 16}},
    ],
    ids=["nested", "dotted", "both"],
)
def test_settings_lie_over_the_preset_by_nested_and_by_dotted_names(settings, monkeypatch):
    monkeypatch.setattr(api, "train_in_world", lambda config, *_, **__: config)
    config = hvd_dqn.train("identity", seed=3, **settings)
    expected = load_preset("identity").model_dump()
    expected["seed"], expected["learner"]["batch_size"] = 3, 16
    expected["env"] |= {"kwargs": {"n": 3}, "envs_per_rank": 2}
    assert config == Config.model_validate(expected)


def test_settings_come_from_a_preset_a_file_or_a_config(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "train_in_world", lambda config, name, run, *_, **__: (config, name, run.path))
    mine = hvd_dqn.Config(total_steps=700)
    (tmp_path / "mine.yaml").write_text(mine.to_yaml())
    assert hvd_dqn.train(mine, run_dir="here") == (mine, "run", Path("here"))
    for file in (tmp_path / "mine.yaml", str(tmp_path / "mine.yaml")):
        config, name, path = hvd_dqn.train(file)
        assert (config, name, path.parent.name) == (mine, "mine", "runs")
    assert hvd_dqn.train(mine, seed=5)[0].seed == 5 != mine.seed


def test_two_trainings_in_one_process_do_not_touch_each_other_or_the_process(tmp_path):
    def traces():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        threads = {name: value for name, value in os.environ.items() if name.startswith(("TF_", "OMP_"))}
        return handlers, threads, gc.get_freeze_count(), gc.isenabled(), sys.excepthook, sys.stdout, os.getcwd()

    before = traces()
    cartpole = {"env": {"id": "CartPole-v1"}, "agent": {"hidden": [8], "dueling": True}}
    first = hvd_dqn.train("identity", run_dir=tmp_path / "1", **SHORT)
    hvd_dqn.train("identity", run_dir=tmp_path / "2", **SHORT, **cartpole)
    again = hvd_dqn.train("identity", run_dir=tmp_path / "3", **SHORT)
    assert untimed(first.run_dir) == untimed(again.run_dir)
    assert traces() == before
    assert [thread.name for thread in threading.enumerate() if "hvd_dqn" in thread.name] == []


def untimed(folder: Path) -> list[list[str]]:
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(rows[0]) if not name.startswith("time") and "second" not in name]
    return [[row[i] for i in kept] for row in rows]


def test_it_trains_as_the_command_does_and_evaluates_to_the_same_numbers(identity, tmp_path):
    words = ["hvd-dqn", "train", "identity", "--seed", "1", "--evaluation.target_return", "None"]
    done = run([*words, "--run_dir", tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    assert untimed(identity.run_dir) == untimed(tmp_path / "run")
    mine, theirs = (Checkpoints(path, Solo()).weights(2000, print) for path in (identity.run_dir, tmp_path / "run"))
    assert mine.arrays.keys() == theirs.arrays.keys()
    for name, array in mine.arrays.items():
        assert np.array_equal(array, theirs.arrays[name]), name
    for words, options in (
        (["--episodes", "7"], {"episodes": 7}),
        (["--best", "--epsilon", "0.5", "--seed", "5"], {"best": True, "epsilon": 0.5, "seed": 5}),
    ):
        done = run(["hvd-dqn", "evaluate", identity.run_dir, "--json", *words])
        assert hvd_dqn.evaluate(identity.run_dir, **options)._asdict() == json.loads(done.stdout)


#    source                settings                                      the line says
BAD_INPUT = [
    (["identty"],          {},                                          r"no preset 'identty'. Did you mean `identity`"),
    ([],                   {},                                          r"What shall be trained\?.*identity.*None"),
    ([7],                  {},                                          r"What shall be trained\?.*7"),
    (["none.yaml"],        {},                                          r"none.yaml"),
    ([Path("identity")],   {},                                          r"Cannot read the settings in identity"),
    (["identity"],         {"agent": {"hiden": [3]}},                   r"no setting `agent.hiden`.*`agent.hidden`"),
    (["identity"],         {"learner.batch_size": 0},                   r"`learner.batch_size` must be .*Received: 0"),
    (["identity"],         {"sed": 3},                                  r"no setting `sed`. Did you mean `seed`"),
    (["identity"],         {"agent.n_step": 99},                        r"must have taken n_step = 99 steps"),
    (["identity"],         {"env.id": "CartPol-v1"},                    r"CartPol-v1.*CartPole-v1"),
    (["identity"],         {"run_dir": "/proc/no/run"},                 r"Cannot write the run directory /proc/no/run"),
    (["identity"],         {"resume": True},                            r"--resume needs --run-dir"),
    (["identity"],         {"resume": True, "run_dir": "nothing"},      r"nothing to resume in nothing"),
    (["identity"],         {"start_from": "nothing"},                   r"nothing is no run"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "settings", "line"), BAD_INPUT, ids=[row[-1] for row in BAD_INPUT])
def test_bad_input_is_an_input_error_of_one_line(source, settings, line, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=line) as refused:
        hvd_dqn.train(*source, **settings)
    assert len(str(refused.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        (lambda folder: hvd_dqn.load_policy("nothing"), r"nothing is no run"),
        (lambda folder: hvd_dqn.evaluate("nothing"), r"nothing is no run"),
        (lambda folder: hvd_dqn.evaluate(folder, episodes=0), r"`evaluation.episodes` must be .*Received: 0"),
        (lambda folder: hvd_dqn.evaluate(folder, epsilon=2), r"`evaluation.epsilon` must be .*Received: 2"),
        (lambda folder: hvd_dqn.evaluate(folder, seed=-1), r"`seed` must be .*Received: -1"),
        (lambda folder: hvd_dqn.train("identity", run_dir=folder), r"already holds a run"),
        (lambda folder: hvd_dqn.train("cartpole", run_dir=folder, resume=True), r"a run of identity, not of cartpole"),
        (lambda folder: hvd_dqn.train(run_dir=folder, resume=True), r"nothing left to train"),
    ],
)
def test_what_a_run_directory_cannot_give_is_said_in_one_line(identity, ask, line):
    with pytest.raises(InputError, match=line) as refused:
        ask(identity.run_dir)
    assert len(str(refused.value).splitlines()) == 1


def test_a_process_that_a_launcher_started_as_one_of_several_does_not_train_alone(monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE"):
        with monkeypatch.context() as context:
            context.setenv(name, "2")
            with pytest.raises(InputError, match="started 2: start several ranks with `hvd-dqn train`"):
                hvd_dqn.train("identity")


def test_a_run_that_is_stopped_goes_on_where_it_stood(identity, tmp_path):
    asked = []
    stopped = hvd_dqn.train(
        "identity", seed=1, run_dir=tmp_path / "run", evaluation={"target_return": None},
        stop=lambda: asked.append(1) or len(asked) > 2,
    )  # fmt: skip
    assert stopped.outcome == "stopped"
    assert stopped.total_steps < 2000
    assert np.isnan(stopped.best_return) == (stopped.best_total_steps is None)
    done = hvd_dqn.train(run_dir=tmp_path / "run", resume=True)
    assert (done.outcome, done.total_steps) == ("finished", 2000)
    assert untimed(done.run_dir) == untimed(identity.run_dir)


def test_an_interrupt_leaves_a_run_that_goes_on_where_it_stood(identity, tmp_path):
    settings = {"seed": 1, "total_steps": 100_000, "evaluation": {"target_return": None}, "report": {"period": 250}}
    metrics = tmp_path / "run/metrics.csv"

    def interrupt():
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            hvd_dqn.train("identity", run_dir=tmp_path / "run", **settings)
    finally:
        signal.signal(signal.SIGINT, before)
    about = Run(tmp_path / "run").about()
    assert about["ended"] == "stopped"
    done = hvd_dqn.train(run_dir=tmp_path / "run", resume=True, total_steps=about["stopped_at"] + 500)
    assert done.total_steps == about["stopped_at"] + 500
    theirs = untimed(identity.run_dir)
    assert untimed(done.run_dir)[:4] == theirs[:4]


def test_a_training_in_a_thread_of_ones_own_needs_no_other(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(hvd_dqn.train("identity", run_dir=tmp_path, **SHORT)))
    thread.start()
    thread.join()
    assert results[0].outcome == "finished"


def test_a_run_that_fails_is_a_run_error(tmp_path, monkeypatch):
    monkeypatch.setattr("hvd_dqn.envs.identity.Identity.step", lambda self, action: 1 / 0)
    with pytest.raises(RunError, match="ZeroDivisionError"):
        hvd_dqn.train("identity", run_dir=tmp_path / "run", **SHORT)
    assert Run(tmp_path / "run").about()["ended"].startswith("failed: RunError")


def test_records_are_there_for_a_tuner_that_prunes(tmp_path):
    from hvd_dqn import training

    trainer = training.Trainer(load_preset("identity"), Solo())
    with contextlib.closing(trainer), contextlib.closing(trainer.train(Checkpoints(tmp_path, Solo()))) as records:
        record = next(record for record in records if record.kind == "evaluation")
    assert isinstance(record, training.Record)
    assert record.row["total_steps"] == 500


# A process of its own: how fast, with which threads, and without what a policy needs to be imported.
ALONE = """
import os, sys, time
for name in [name for name in os.environ if name.startswith(("TF_", "OMP_"))]:
    del os.environ[name]
sys.modules["horovod"] = sys.modules["mpi4py"] = None  # makes `import horovod` an ImportError
import hvd_dqn
assert not {"numpy", "tensorflow", "pydantic", "gymnasium"} & set(sys.modules), "import hvd_dqn must be instant"
policy = hvd_dqn.load_policy(sys.argv[1])
import tensorflow as tf
assert [policy.act(state) for state in range(4)] == [0, 1, 2, 3]
assert not any(name.startswith(("TF_", "OMP_")) for name in os.environ), "a child process would inherit them"
print(tf.config.threading.get_intra_op_parallelism_threads())
"""


def test_a_policy_needs_neither_mpi_nor_horovod(identity):
    done = subprocess.run([sys.executable, "-c", ALONE, identity.run_dir], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"  # that of a small network


def test_the_door_shows_what_is_behind_it():
    tree = ast.parse(Path(hvd_dqn.__file__).read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    for name in hvd_dqn.__all__:
        assert getattr(hvd_dqn, name) is not None
        assert name in typed | {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        hvd_dqn.trian  # noqa: B018


def test_the_example_does_what_it_says(tmp_path, monkeypatch):
    import doctest

    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(api)
    assert result.attempted == 5
    assert result.failed == 0


# Starting from the weights of another run.


def test_a_run_starts_from_the_best_weights_of_another_with_all_else_its_own(copy, tmp_path):
    config = load_preset("identity")
    start = job.starting_weights(Run(tmp_path), config, Solo(), copy, False, print)
    assert start.total_steps == 2000
    fresh, trainer = Trainer(config, Solo()), Trainer(config, Solo(), start=start)
    state, new = trainer.worker.learner.state(), fresh.worker.learner.state()
    assert any(name.startswith("optimizer/") for name in state)
    for name, array in state.items():
        other = start.arrays if name.startswith(("online/", "target/")) else new
        assert np.array_equal(array, other[name]), name
    assert trainer.worker.updates == 0
    assert len(trainer.worker.replay) == 0
    assert trainer.worker.plan.epsilon_at(0) == config.agent.epsilon_start
    returns = [each.worker.evaluate(0, 20)["return_mean"] for each in (fresh, trainer)]
    assert returns[1] == 10.0 > returns[0]
    for each in (fresh, trainer):
        each.close()


def test_a_run_that_started_from_another_says_so_and_goes_on(identity, tmp_path, capfd):
    words = {"run_dir": tmp_path / "run", "start_from": identity.run_dir}
    first = hvd_dqn.train("identity", **words, **SHORT, learner={"learning_rate": 1e-9}, progress=True)
    assert first.total_steps == 500
    assert first.return_mean == 10.0  # nothing was learned
    about = Run(first.run_dir).about()
    assert about["started_from"] == {"run": str(identity.run_dir), "total_steps": identity.best_total_steps}
    assert f"Starting from the weights of {identity.run_dir}" in capfd.readouterr().err
    # As a batch system starts a job again: with all its words.
    again = hvd_dqn.train("identity", **words, resume=True, total_steps=1000)
    assert again.total_steps == 1000
    assert Run(first.run_dir).about()["started_from"] == about["started_from"]
    with pytest.raises(InputError, match=r"--from starts a new run, and --resume continues.*leave one of them out"):
        hvd_dqn.train("identity", run_dir=first.run_dir, start_from=tmp_path / "other", resume=True)


def test_statistics_of_observations_come_with_the_weights(tmp_path):
    settings = {"env": {"id": "CartPole-v1", "normalize_observation": True}, "learner.overlap": True}
    first = hvd_dqn.train("identity", run_dir=tmp_path / "run", **SHORT, **settings)
    config = Run(first.run_dir).config()
    start = job.starting_weights(Run(tmp_path), config, Solo(), first.run_dir, False, print)
    with contextlib.closing(Trainer(config, Solo(), start=start)) as trainer:
        assert trainer.worker.statistics.state() == start.state["normalizer"] != {}
        learner = trainer.worker.learner.state()
        assert np.array_equal(learner["acting/0"], learner["online/0"])
        assert np.array_equal(learner["online/0"], start.arrays["online/0"])


def damage(folder: Path) -> None:
    for model in folder.glob("checkpoints/*/model.npz"):
        model.write_bytes(b"x" * model.stat().st_size)


@pytest.mark.parametrize(
    ("spoil", "settings", "line"),
    [
        (None, {"agent": {"hidden": [9]}}, r"`agent.hidden` is \(32,\) there and \(9,\) here"),
        (None, {"agent": {"dueling": True}}, r"`agent.dueling` is False there and True here"),
        (None, {"agent": {"network": "tests.unit.agent.test_networks:keras_model"}}, r"`agent.network` is 'mlp' there"),
        (None, {"env": {"kwargs": {"n": 5}}}, r"expected online/0 of shape \(357,\), received \(292,\)"),
        (damage, {}, r"There are no weights in .*2000 is damaged: model.npz does not have the checksum"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), {}, r"There are no weights in .* It has no checkpoint"),
        (lambda folder: (shutil.rmtree(folder), folder.mkdir()), {}, r"is no run: it has no run.json"),
        (shutil.rmtree, {}, r"is no run: it has no run.json"),
    ],
    ids=["hidden", "dueling", "network", "space", "damaged", "no checkpoint", "empty", "nothing"],
)
def test_weights_that_cannot_be_taken_over_are_refused_in_one_line(spoil, settings, line, copy, tmp_path):
    if spoil is not None:
        spoil(copy)
    with pytest.raises(InputError, match=line) as refused:
        hvd_dqn.train("identity", run_dir=tmp_path / "run", start_from=copy, **settings)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_before_the_one_that_is_taken_is_told(copy):
    (copy / "checkpoints/2500/model.npz").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="2500 is damaged"):
        result = hvd_dqn.evaluate(copy, episodes=1)
    assert result.total_steps == 2000


def test_a_checkpoint_that_the_run_does_without_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Checkpoints, "_write_part", full)
    with pytest.warns(RuntimeWarning, match="cannot be written .*The run continues without it"):
        result = hvd_dqn.train("identity", run_dir=tmp_path, total_steps=250, **{"checkpoint.on_failure": "continue"})
    assert result.outcome == "finished"


def test_the_command_takes_the_option_and_refuses_in_one_line(identity, tmp_path):
    words = ["hvd-dqn", "train", "identity", "--total_steps", "250", "--run_dir", tmp_path / "run", "--from"]
    done = run([*words, identity.run_dir])
    assert done.returncode == 0, done.stderr
    assert "Starting from the weights of" in done.stderr
    done = run([*words, tmp_path / "nothing"])
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith("hvd-dqn: ")
    assert "nothing is no run" in said


def test_trainings_that_begin_in_one_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (hvd_dqn.train("identity", total_steps=12) for _ in range(2))
    assert first.run_dir != second.run_dir


def test_an_environment_alone_is_trained_with_the_defaults_and_names_its_run(monkeypatch):
    asked = []
    monkeypatch.setattr(api, "train_in_world", lambda config, name, *_, **__: asked.append((config.env.id, name)))
    hvd_dqn.train(env={"id": "some_package:Game/Easy-v0"})
    hvd_dqn.train(**{"env.id": "Acrobot-v1"})
    assert asked == [("some_package:Game/Easy-v0", "Game-Easy-v0"), ("Acrobot-v1", "Acrobot-v1")]


def test_a_run_keeps_its_name_however_it_is_resumed(tmp_path):
    run = hvd_dqn.train("identity", run_dir=tmp_path / "run", **SHORT).run_dir
    steps = int(SHORT["total_steps"])
    hvd_dqn.train(run / "config.yaml", run_dir=run, resume=True, total_steps=steps + 100)
    hvd_dqn.train(Run(run).config(), run_dir=run, resume=True, total_steps=steps + 200)
    assert Run(run).about()["preset"] == "identity"
