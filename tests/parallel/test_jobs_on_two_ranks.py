"""Whole jobs on two real ranks: they learn, refuse, stop and resume together."""

import importlib.util
import json
import re
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT, horovodrun, run


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "identity"
    done = horovodrun(2, "hvd-dqn", "train", "identity", "--run_dir", folder, "--evaluation.target_return", "None")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_two_ranks_train_as_one_job(identity):
    folder, done = identity
    assert done.stdout.count("identity: return") == 1  # the chief alone speaks
    assert re.search(r"on 2 ranks", done.stdout)
    about = json.loads((folder / "run.json").read_text())
    assert about["size"] == 2
    assert about["result"]["return_mean"] == 10.0
    assert about["result"]["episodes"] == 20


def test_weights_of_two_ranks_are_evaluated_alike_by_one_and_by_two(identity):
    folder, _ = identity
    command = ["hvd-dqn", "evaluate", folder, "--episodes", "7", "--json"]
    alone, together = run(command), horovodrun(2, *command)
    text = re.sub(r"\[[\d,]+\]<std\w+>:", "", together.stdout)
    assert json.loads(alone.stdout) == json.loads(re.search(r"\{.*\}", text).group(0))


def test_a_job_is_resumed_with_two_ranks(identity):
    folder, _ = identity
    done = horovodrun(2, "hvd-dqn", "train", "--run_dir", folder, "--resume", "--total_steps", "3000")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [int(line.split(",")[0]) for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3000


def test_two_ranks_start_from_the_weights_of_another_run(identity, tmp_path):
    folder, _ = identity
    words = ["--total_steps", "256", "--learner.learning_rate", "1e-9", "--evaluation.target_return", "None"]
    command = ["hvd-dqn", "train", "identity", "--run_dir", tmp_path / "run", *words, "--from"]
    done = horovodrun(2, *command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["result"]["return_mean"] == 10.0  # nothing was learned but there
    assert about["started_from"]["run"] == str(folder)


FAMILY = ["--agent.objective", "c51", "--agent.support", "0,12", "--replay.priority_exponent", "0.6"]


@pytest.mark.parametrize(
    "words", [[], ["--learner.overlap", "True", *FAMILY]], ids=["dqn", "c51 with priorities, overlap"]
)
def test_one_seed_gives_one_run_on_two_ranks(words, tmp_path):
    command, texts = ["hvd-dqn", "train", "identity", "--seed", "3", *words, "--run_dir"], []
    for name in ("first", "second"):
        done = horovodrun(2, *command, tmp_path / name)
        assert done.returncode == 0, done.stderr
        rows = [line.split(",") for line in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        kept = [i for i, column in enumerate(rows[0]) if not column.startswith("time") and "second" not in column]
        texts.append([[row[i] for i in kept] for row in rows])
    assert texts[0] == texts[1]


def test_the_timeline_tells_of_every_averaged_update_and_the_end_where_the_time_went(tmp_path):
    # horovodrun takes `--timeline` for a beginning of its own options unless `--` ends them.
    command = ["hvd-dqn", "train", "identity", "--run_dir", tmp_path / "run", "--timeline", tmp_path / "timeline"]
    done = horovodrun(2, "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    events = json.loads((tmp_path / "timeline").read_text())
    averages = {e["pid"] for e in events if e.get("args", {}).get("name", "").endswith("grad_0_1of1")}
    updates = int((tmp_path / "run/metrics.csv").read_text().splitlines()[-1].split(",")[2])
    assert sum(e.get("name") == "ALLREDUCE" and e["pid"] in averages for e in events) == updates > 50
    shares = re.search(r"identity: time: (.*)", done.stdout)[1]
    assert "% communicate" in shares
    assert 95 <= sum(int(share) for share in re.findall(r"(\d+) % ", shares)) <= 105


#                             words                                                             the line says
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "identity", "--learner.batch_sise", "3"], r"Did you mean `--learner.batch-size`"),
        (
            ["train", "identity", "--ranks.scaling", "strong", "--env.envs_per_rank", "3"],
            r"multiple of the number of ranks.*3 on 2",
        ),
        (["train", "identity", "--run_dir", "/proc/no/run"], r"Cannot write the run directory"),
        (["evaluate", "nothing"], r"nothing is no run"),
        (["train", "identity", "--from", "nothing"], r"nothing is no run"),
    ],
)
def test_bad_input_is_said_once_and_ends_every_rank(words, line):
    done = horovodrun(2, "hvd-dqn", *words)
    assert done.returncode == 2, done.stderr
    said = [text for text in (done.stdout + done.stderr).splitlines() if "hvd-dqn: " in text]
    assert len(said) == 1, done.stdout + done.stderr
    assert re.search(line, said[0])


def test_ranks_started_with_different_settings_are_refused(tmp_path):
    # mpirun's `:` starts the ranks of one job with different commands.
    command = ["hvd-dqn", "train", "identity", "--run_dir", tmp_path / "run", "--seed"]
    done = run(["mpirun", "--allow-run-as-root", "-np", "1", *command, "1", ":", "-np", "1", *command, "2"])
    assert done.returncode == 2, done.stderr
    assert re.search(r"hvd-dqn: The ranks were started with different settings: ranks \[1\] differ", done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("built", "module", "line"),
    [
        ("2.9.0", "", r"it was built with TensorFlow 2\.9\.0, but TensorFlow \S+ is installed\."),
        (None, "raise ImportError('undefined symbol: _ZN10')", r"ImportError: undefined symbol: _ZN10\."),
    ],
)
def test_a_horovod_that_does_not_fit_is_said_once_with_the_cure(built, module, line, tmp_path):
    real = Path(importlib.util.find_spec("horovod").origin).with_name("metadata.json")
    about = {"tensorflow": built or json.loads(real.read_text())["tensorflow"]}
    (tmp_path / "horovod/tensorflow").mkdir(parents=True)
    (tmp_path / "horovod/__init__.py").touch()
    (tmp_path / "horovod/tensorflow/__init__.py").write_text(module)
    (tmp_path / "horovod/metadata.json").write_text(json.dumps(about))
    command = ["mpirun", "--allow-run-as-root", "-np", "2", "-x", "PYTHONPATH", "hvd-dqn", "train", "identity"]
    done = run(command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2, done.stderr
    (said,) = [text for text in done.stderr.splitlines() if "hvd-dqn: " in text]
    assert re.search(f"hvd-dqn: Horovod on \\S+ does not fit this TensorFlow: {line} Run launch/setup.sh again", said)


BREAKING = """
import sys
from hvd_dqn import cli
from hvd_dqn.training.worker import Worker
from hvd_dqn.ranks.placement import LAUNCHER_VARIABLES
import os
rank = int(next(os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ))
wait = Worker.finish_phase
def broken(self):
    phase = wait(self)
    if rank == 1 and phase and self.updates > 100:
        {what}
    return phase
Worker.finish_phase = broken
sys.argv = ["hvd-dqn", "train", "identity", "--evaluation.target_return", "None", "--total_steps", "100000",
            "--ranks.drift_check_period", "1000", "--evaluation.period", "100000", "--run_dir", sys.argv[1]]
cli.main()
"""


@pytest.mark.parametrize("gloo", [False, True], ids=["mpi", "gloo"])
@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("raise ZeroDivisionError('broken on purpose')", r"\[rank 1/2 \S+\] ZeroDivisionError: broken on purpose"),
        (
            "self.learner.online.theta.assign_add(0 * self.learner.online.theta + 1e-3)",
            r"hvd-dqn: The ranks have drifted apart after [\d,]+ total steps: on rank 1 the variables online/0",
        ),
        (
            "import threading; threading.Thread(target=lambda: 1 / 0).start(); import time; time.sleep(600)",
            r"\[rank 1/2 \S+\] ZeroDivisionError: division by zero",
        ),
    ],
    ids=["exception", "drift", "thread"],
)
def test_a_rank_that_fails_takes_the_job_with_it(what, line, gloo, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BREAKING.format(what=what))
    began = time.monotonic()
    done = horovodrun(2, "python", script, tmp_path / "run", gloo=gloo, PYTHONPATH=str(ROOT))
    assert done.returncode not in (0, 2)
    # Gloo's launcher keeps the ranks' streams apart by file; its own output has them all.
    assert re.search(line, done.stdout + done.stderr), done.stdout + done.stderr
    assert time.monotonic() - began < 240  # far less than the 100,000 steps or the sleep; a hang would be killed at 300
