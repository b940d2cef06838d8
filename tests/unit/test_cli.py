"""The command line as a person meets it: real processes, one clear line for bad input, results on stdout."""

import contextlib
import gc
import json
import re

import pytest
import yaml

from hvd_dqn.loading import loading
from hvd_dqn.reporting.plots import read_run
from tests.ranks import run


def hvd_dqn(*words, **options):
    return run(["hvd-dqn", *words], **options)


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    """A finished run of the smallest preset."""
    folder = tmp_path_factory.mktemp("runs") / "identity"
    done = hvd_dqn("train", "identity", "--run_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_training_ends_with_its_times_and_its_result_and_leaves_a_run_directory(identity):
    folder, done = identity
    times, line = done.stdout.splitlines()
    assert re.match(r"identity: time: \d+ % \w+, ", times)
    assert re.search(r"identity: return 10.0 .* over 20 episodes after [\d,]+ total steps .* on 1 rank; best", line)
    assert str(folder) in line
    for name in ("config.yaml", "run.json", "metrics.csv", "evaluations.csv", "curve.png"):
        assert (folder / name).stat().st_size > 0, name
    assert {path.parent.name for path in (folder / "tensorboard").glob("*/events*")} == {"training", "evaluation"}
    assert min(path.stat().st_size for path in (folder / "tensorboard").glob("*/events*")) > 100  # more than a header
    about = json.loads((folder / "run.json").read_text())
    assert about["ended"] == "finished"
    assert about["result"]["return_mean"] == 10.0
    run = read_run(folder)  # as `hvd-dqn plot` does
    settings = run.env, run.preset, run.size, run.scaling, run.seed, run.target_return
    assert settings == ("hvd_dqn.envs.identity:Identity-v0", "identity", 1, "weak", 0, 10.0)
    for column in ("total_steps", "updates", "loss", "return_mean", "time_update"):
        assert column in (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "global batch" in done.stderr  # the plan
    assert "updates/s" in done.stderr  # the progress


def test_config_yaml_repeats_the_run(identity, tmp_path):
    folder, _ = identity
    done = hvd_dqn("train", "--config", folder / "config.yaml", "--run_dir", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    for file in ("metrics.csv", "evaluations.csv"):
        first, second = (untimed((where / file).read_text()) for where in (folder, tmp_path / "again"))
        assert first == second


def untimed(text: str) -> list[list[str]]:
    rows = [line.split(",") for line in text.splitlines()]
    kept = [i for i, name in enumerate(rows[0]) if not name.startswith("time") and "second" not in name]
    return [[row[i] for i in kept] for row in rows]


def test_evaluate_plays_the_newest_or_the_best_weights(identity):
    folder, _ = identity
    done = hvd_dqn("evaluate", folder, "--episodes", "7", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["episodes"], result["return_mean"]) == (7, 10.0)
    best = hvd_dqn("evaluate", folder, "--best", "--episodes", "3", "--epsilon", "1.0", "--seed", "5")
    assert re.match(r"return [\d.]+ ± .* over 3 episodes, epsilon 1, with the weights after", best.stdout)
    assert not best.stdout.startswith("return 10 ± 0 ")  # at random about 2.5
    again, other = (
        hvd_dqn("evaluate", folder, "--episodes", "3", "--epsilon", "1.0", "--seed", seed).stdout for seed in "56"
    )
    assert again == best.stdout != other


def test_a_run_is_resumed_in_its_own_files(tmp_path):
    folder = tmp_path / "run"
    settings = ["--evaluation.target_return", "None", "--checkpoint.period", "500"]
    assert hvd_dqn("train", "identity", "--run_dir", folder, "--total_steps", "1000", *settings).returncode == 0
    done = hvd_dqn("train", "--run_dir", folder, "--resume", "--total_steps", "2000")  # its preset need not be named
    assert done.returncode == 0, done.stderr
    assert re.search(r"Resuming from .*1000.*Changed settings: total_steps", done.stderr)
    metrics, evaluations = (
        [int(line.split(",")[0]) for line in (folder / file).read_text().splitlines()[1:]]
        for file in ("metrics.csv", "evaluations.csv")
    )
    assert metrics == sorted(set(metrics))
    assert (metrics[0], metrics[-1]) == (252, 2000)
    assert evaluations == [500, 1000, 1000, 1500, 2000, 2000]  # of 20 episodes, and of 100 at either end
    assert json.loads((folder / "run.json").read_text())["resumes"][0]["total_steps"] == 1000
    assert yaml.safe_load((folder / "config.yaml").read_text())["total_steps"] == 2000
    assert json.loads((folder / "run.json").read_text())["preset"] == "identity"  # by which a later resume may name it
    assert "identity: return" in done.stdout


def test_a_run_without_a_directory_makes_one_under_runs(tmp_path):
    done = hvd_dqn("train", "identity", "--total_steps", "500", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"identity-\d{8}-\d{6}", folder.name)


def test_doctor_examines_a_process_alone():
    done = hvd_dqn("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [rank["size"] for rank in found["ranks"]] == [1]
    assert found["problems"] == []


def test_plot_draws_several_runs(identity, tmp_path):
    folder, _ = identity
    done = hvd_dqn("plot", folder, folder, "-o", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_help_lists_every_setting_and_presets_say_what_to_expect():
    from hvd_dqn.config import setting_names
    from hvd_dqn.config_files import presets

    done = hvd_dqn("train", "--help")
    for name in setting_names():
        assert f"  --{name.replace('_', '-')} " in done.stdout, name
    assert "  --learner.batch-size N\n      Minibatch of each rank; under strong scaling" in done.stdout
    assert "A whole number, at least 1. Unit: transitions. Default: 64. Source:" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "Default: 0.002." in hvd_dqn("train", "cartpole", "-h").stdout  # the preset's learning rate
    listed = hvd_dqn("presets").stdout
    for name in presets():
        assert f"{name}\n" in listed
    assert listed.count("Expected:") == len(presets())
    assert "train PRESET" in hvd_dqn("--help").stdout
    assert re.search(r"(?m)^hvd-dqn bench loop +Measures whole training", hvd_dqn("bench", "--help").stdout)
    assert "usage: hvd-dqn evaluate RUN_DIR" in hvd_dqn("evaluate", "--help").stdout
    assert "-o, --output PATH\n      The picture. Default: curve.png." in hvd_dqn("plot", "--help").stdout


#                            words                                                     the line says
BAD_INPUT = [
    (["trian"], r"no command 'trian'. Did you mean `train`"),
    (["train", "cartpol"], r"no preset 'cartpol'. Did you mean `cartpole`"),
    (["train", "identity", "--timeline", "t.json"], r"--timeline is for two ranks or more"),
    (["train", "identity", "--total-steps", "-5"], r"`total_steps` must be a whole number, at least 1. Received: -5"),
    (["train", "identity", "--agent.n_step", "99"], r"every environment must have taken n_step = 99 steps"),
    (["train", "--config", "nothing.yaml"], r"nothing.yaml"),
    (["train", "identity", "--env.id", "CartPol-v1"], r"CartPol-v1.*CartPole-v1"),
    (["train", "--env.id", "CartPol-v1"], r"CartPol-v1.*CartPole-v1"),
    (["train", "identity", "--env.id", "Pendulum-v1"], r"Pendulum-v1.*continuous.*--env.action_bins"),
    (["train", "identity", "--agent.network", ":f"], r"--agent.network :f cannot be imported"),
    (["train", "identity", "--from", "nothing"], r"nothing is no run"),
    (["train", "identity", "--resume", "--run_dir", "nothing"], r"nothing to resume in nothing"),
    (["train", "identity", "--run_dir", "/proc/no/run"], r"Cannot write the run directory /proc/no/run"),
    (["evaluate", "nothing"], r"nothing is no run"),
    (["evaluate", "."], r"\. is no run"),
    (["evaluate"], r"`RUN_DIR` is missing"),
    (["evaluate", ".", "--episodes", "0"], r"`--episodes` must be a whole number, at least 1. Received: 0"),
    (["plot", "nothing"], r"nothing is no run"),
    (["plot"], r"(?i)name at least one run directory"),
    (["presets", "cartpole"], r"no option `cartpole`"),
    (["bench", "lerner"], r"no benchmark 'lerner'. Did you mean `learner`"),
    (["bench", "scaling", "--ranks", "1,x"], r"`--ranks` must be whole numbers, each at least 1"),
]


@pytest.mark.parametrize(
    ("words", "line"), BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(words, line, tmp_path):
    done = hvd_dqn(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (said,) = done.stderr.splitlines()
    assert said.startswith("hvd-dqn: ")
    assert re.search(line, said)
    assert done.stdout == ""


def test_a_picture_that_cannot_be_written_does_not_undo_a_run(tmp_path):
    (tmp_path / "run" / "curve.png").mkdir(parents=True)
    done = hvd_dqn("train", "identity", "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^hvd-dqn: .*curve.png", done.stderr, re.MULTILINE)
    assert "identity: return 10.0" in done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ended"] == "finished"


def test_a_directory_that_holds_a_run_is_not_overwritten(identity):
    folder, _ = identity
    before = (folder / "metrics.csv").read_bytes()
    done = hvd_dqn("train", "identity", "--run_dir", folder)
    assert done.returncode == 2
    assert re.search(r"already holds a run.*--resume.*--run-dir", done.stderr)
    assert (folder / "metrics.csv").read_bytes() == before


def test_an_environment_that_yields_nan_stops_the_run_with_one_line(tmp_path):
    (tmp_path / "broken.py").write_text(
        "import gymnasium, numpy\n"
        "class Broken(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(-1, 1, (2,))\n"
        "    action_space = gymnasium.spaces.Discrete(2)\n"
        "    steps = 0\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        return numpy.zeros(2, numpy.float32), {}\n"
        "    def step(self, action):\n"
        "        self.steps += 1\n"
        "        bad = numpy.nan if self.steps == 50 else 0\n"
        "        return numpy.full(2, bad, numpy.float32), 1.0, self.steps % 10 == 0, False, {}\n"
        "gymnasium.register('Broken-v0', Broken)\n"
    )
    done = hvd_dqn("train", "identity", "--env.id", "broken:Broken-v0", "--run_dir", "run", cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.search(r"broken:Broken-v0.*rank 0.*step 50", last), last
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ended"].startswith("failed")


def test_garbage_is_looked_for_again_once_all_is_loaded():
    with contextlib.suppress(ImportError), loading():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1_000
    gc.unfreeze()
