"""Whole trainings on two real ranks that are struck, stopped or resumed: they end in a known way and lose nothing.

`pytest tests/faults -rP` prints what each job said and how long it took: the table in README.md is made from that.
"""

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hvd_dqn.storage.arrays import read_arrays
from tests.ranks import BIN, ROOT, checkpoints, horovodrun, processes_of, run, wait_until

SETTINGS = {  # of all jobs here, unless said otherwise
    "--evaluation.target_return": "None", "--evaluation.period": "2500", "--total_steps": "1000000",
    "--ranks.silence_seconds": "15", "--ranks.stall_seconds": "45", "--ranks.vote_period": "200",
    "--checkpoint.period": "500",
}  # fmt: skip
MPIRUN = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "-x", "PYTHONPATH", "-np", "2"]


def launch(launcher: str, *command: str | Path) -> subprocess.CompletedProcess:
    if launcher == "mpirun":
        return run([*MPIRUN, *command], PYTHONPATH=str(ROOT))
    return horovodrun(2, *command, gloo=launcher == "gloo", PYTHONPATH=str(ROOT))


def job(folder: Path, fault: str = "none", culprit: int = 1, *words: str) -> list[str | Path]:
    settings = {**SETTINGS, "--run_dir": folder / "run"}
    unsaid = [word for option, value in settings.items() if option not in words for word in (option, value)]
    command = ["train", "identity", *unsaid, *words]
    return ["python", "-m", "tests.faults.job", folder, fault, str(culprit), *command]


def plain(done: subprocess.CompletedProcess) -> str:
    """What it said, without horovodrun's marks of ranks, which may be inside a line."""
    return re.sub(r"\[\d+(,\d+)?\]<std(out|err)>:", "", done.stdout + done.stderr)


def resume(folder: Path, ranks: int, *words: str) -> dict:
    """Goes on for a while, and returns run.json."""
    steps = max(checkpoints(folder)) + 1_000
    command = job(folder, "none", 0, "--resume", "--total_steps", str(steps), *words)
    done = horovodrun(ranks, *command, PYTHONPATH=str(ROOT)) if ranks > 1 else run(command, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    about = json.loads((folder / "run/run.json").read_text())
    metrics = [int(line.split(",")[0]) for line in (folder / "run/metrics.csv").read_text().splitlines()[1:]]
    assert metrics == sorted(set(metrics))  # no step is told twice
    return about | {"said": plain(done)}


GONE = r"\[rank {0}/2 (\S+)\] rank {1} on \1 is gone|process rank {1} .* on node \S+ exited on signal 9"


@pytest.mark.parametrize(
    ("fault", "culprit", "launcher", "line"),
    [
        ("killed", 0, "horovodrun", GONE.format(1, 0)),
        ("killed", 1, "horovodrun", GONE.format(0, 1)),
        ("killed", 1, "gloo", GONE.format(0, 1)),
        ("frozen", 0, "mpirun", r"\[rank 1/2 (\S+)\] rank 0 on \1 has been silent for \d+ s"),
        ("frozen", 1, "horovodrun", r"\[rank 0/2 (\S+)\] rank 1 on \1 has been silent for \d+ s"),
        ("hangs", 1, "horovodrun", r"\[rank 0/2 (\S+)\] rank 1 on \1 has made no progress for \d+ s; .* cycle [\d,]+"),
        ("raises in learning", 1, "horovodrun", r"\[rank 1/2 \S+\] ZeroDivisionError: broken on purpose in learning"),
        ("raises in learning", 0, "gloo", r"\[rank 0/2 \S+\] ZeroDivisionError: broken on purpose in learning"),
        ("raises in a thread", 1, "horovodrun", r"\[rank 1/2 \S+\] ZeroDivisionError: division by zero"),
        ("raises in evaluation", 1, "horovodrun", r"\[rank 1/2 \S+\] ZeroDivisionError: broken on purpose in _play"),
        ("raises in a checkpoint", 0, "horovodrun", r"\[rank 0/2 \S+\] ZeroDivisionError: broken .* _write_part"),
        ("env raises", 1, "horovodrun", r"\[rank 1/2 \S+\] (.*\n)*.*OSError: the simulator lost its licence"),
        ("NaN observation", 1, "horovodrun", r"\[rank 1/2 \S+\] .*on rank 1.*(non-finite|not finite).*observation"),
        ("NaN reward", 1, "horovodrun", r"\[rank 1/2 \S+\] .*on rank 1.*(non-finite|not finite).*reward"),
        ("infinite loss", 1, "horovodrun", r"The loss on rank 1 is not finite after [\d,]+ total steps"),
    ],
)  # fmt: skip
def test_a_rank_that_fails_ends_the_job_which_can_be_resumed(fault, culprit, launcher, line, folder):
    env = ["--env.id", "Fragile-v0"] if fault.startswith(("env", "NaN")) else []
    done = launch(launcher, *job(folder, fault, culprit, *env))
    said = plain(done)
    struck = float(re.search(r"struck at ([\d.]+)", said)[1])
    print(f"{fault} on rank {culprit} under {launcher}: exit {done.returncode} after {time.time() - struck:.1f} s")
    assert done.returncode not in (0, 2, 75), said
    assert re.search(line, said), said
    wait_until(lambda: not processes_of(folder), f"left behind: {processes_of(folder)}")
    last = max(checkpoints(folder))
    about = resume(folder, 1, *env)
    assert about["resumes"][-1]["total_steps"] == last
    assert about["result"]["total_steps"] >= last + 1_000


@pytest.mark.parametrize(
    ("name", "to", "launcher", "code"),
    [
        ("SIGTERM", [1], "horovodrun", 75),
        ("SIGUSR1", [0, 1], "horovodrun", 75),
        ("SIGINT", [0], "mpirun", 75),
        ("SIGUSR1", ["launcher"], "mpirun", 75),
        ("SIGTERM", [0, 1], "gloo", 1),  # horovodrun's own code: Gloo's launcher does not pass the ranks' on
    ],
)
def test_a_signal_on_any_rank_stops_all_after_a_checkpoint(name, to, launcher, code, folder):
    with ThreadPoolExecutor() as pool:
        running = pool.submit(launch, launcher, *job(folder))
        wait_until(lambda: running.done() or checkpoints(folder), "no checkpoint is made")
        began = time.time()
        for rank in to:
            pid = launcher_of(folder) if rank == "launcher" else int((folder / f"rank-{rank}").read_text())
            os.kill(pid, signal.Signals[name])
        done = running.result()
    said = plain(done)
    print(f"{name} to {to} under {launcher}: exit {done.returncode} after {time.time() - began:.1f} s")
    assert done.returncode == code, said
    if launcher == "gloo":
        codes = re.findall(r"Process \d+ exit with status code (\d+)", said)
        assert set(codes) == {"75"}, said
    stopped = re.search(r"stopped on request after ([\d,]+) total steps", said)
    assert int(stopped[1].replace(",", "")) == max(checkpoints(folder))
    assert json.loads((folder / "run/run.json").read_text())["ended"] == "stopped"
    wait_until(lambda: not processes_of(folder), f"left behind: {processes_of(folder)}")
    about = resume(folder, 2)
    assert about["resumes"][-1]["total_steps"] == max(int(stopped[1].replace(",", "")), 0)


def launcher_of(folder: Path) -> int:
    return next(p.pid for p in processes_of(folder) if p.name() == "mpirun")


def test_a_second_ctrl_c_ends_the_job_at_once(folder):
    with ThreadPoolExecutor() as pool:
        # So rare a vote, and an evaluation is one too, that only the second Ctrl-C can be what ends it.
        rarely = ["--ranks.vote_period", "900000", "--evaluation.period", "900000"]
        running = pool.submit(launch, "mpirun", *job(folder, "none", 0, *rarely))
        wait_until(lambda: running.done() or checkpoints(folder), "no checkpoint is made")
        pid = int((folder / "rank-1").read_text())
        os.kill(pid, signal.SIGINT)
        time.sleep(2)
        assert not running.done()
        os.kill(pid, signal.SIGINT)
        done = running.result()
    assert done.returncode not in (0, 75)
    wait_until(lambda: not processes_of(folder), f"left behind: {processes_of(folder)}")


def test_ctrl_c_at_train_sh_leaves_a_checkpoint(folder):
    command = [ROOT / "launch/train.sh", *job(folder)[7:]]
    with (folder / "out").open("w") as out:
        terminal = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out, start_new_session=True)
        wait_until(lambda: terminal.poll() is not None or checkpoints(folder), "no checkpoint is made")
        os.killpg(terminal.pid, signal.SIGINT)
        terminal.wait(120)
    said = (folder / "out").read_text()
    stopped = re.search(r"stopped on request after ([\d,]+) total steps", said)
    assert stopped, said
    assert max(checkpoints(folder)) == int(stopped[1].replace(",", ""))
    wait_until(lambda: not processes_of(folder), f"left behind: {processes_of(folder)}")


def result_of(run_dir: Path) -> tuple[list, dict[str, np.ndarray]]:
    """metrics.csv without its times, and the final weights and optimizer slots."""
    rows = [line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines()]
    kept = [i for i, column in enumerate(rows[0]) if not column.startswith("time") and "second" not in column]
    last = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    arrays = {name: rows.read() for name, rows in read_arrays(last / "model.npz").items()}
    return [[row[i] for i in kept] for row in rows], arrays


@pytest.mark.parametrize("scaling", ["weak", "strong"])
def test_a_run_stopped_and_resumed_on_two_ranks_is_the_run_in_one_go(scaling, folder):
    words = ["--total_steps", "4000", "--ranks.scaling", scaling, "--env.id", "MountainCar-v0"]
    words += ["--env.normalize_observation", "True", "--agent.n_step", "3", "--agent.epsilon_zeta", "2.0"]
    whole = launch("horovodrun", *job(folder, "none", 0, *words, "--run_dir", str(folder / "whole")))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    with ThreadPoolExecutor() as pool:
        running = pool.submit(launch, "horovodrun", *job(folder, "none", 0, *words))
        wait_until(lambda: running.done() or checkpoints(folder), "no checkpoint is made")
        os.kill(int((folder / "rank-1").read_text()), signal.SIGUSR1)
        done = running.result()
    assert done.returncode == 75, done.stdout + done.stderr
    assert max(checkpoints(folder)) < 4_000
    done = launch("horovodrun", *job(folder, "none", 0, *words, "--resume"))
    assert done.returncode == 0, done.stdout + done.stderr
    (expected, weights), (metrics, resumed) = result_of(folder / "whole"), result_of(folder / "run")
    assert metrics == expected
    assert all(np.array_equal(array, resumed[name]) for name, array in weights.items())


def test_a_run_of_two_ranks_goes_on_with_one_three_and_four(folder):
    words = ["--total_steps", "1000", "--learner.learn_start", "240", "--replay.capacity", "4800"]
    done = launch("horovodrun", *job(folder, "none", 0, *words))
    assert done.returncode == 0, done.stdout + done.stderr
    weights = result_of(folder / "run")[1]
    stored = 1_000
    for ranks in (3, 1, 4):
        before = max(checkpoints(folder))
        about = resume(folder, ranks, *words[2:])
        dealt = re.search(r"([\d,]+) transitions of (\d) ranks? redistributed to (\d): ([\d, ]+);", about["said"])
        assert dealt, about["said"]
        assert int(dealt[3]) == ranks
        shares = [int(share.replace(",", "")) for share in dealt[4].split(", ")]
        assert sum(shares) == int(dealt[1].replace(",", "")) >= stored
        stored = sum(shares)
        assert about["size"] == ranks
        assert about["result"]["total_steps"] >= before + 1_000
    assert weights.keys() == result_of(folder / "run")[1].keys()


def test_death_at_ten_random_moments_of_writing_checkpoints_loses_none_that_was_complete(folder):
    # One checkpoint after the other, so that a random moment is nearly always within one; each start is killed and resumed.
    words = ["--checkpoint.period", "64", "--replay.capacity", "40000", "--total_steps", "100000000"]
    random, resumed = np.random.default_rng(int.from_bytes(os.urandom(4), "little")), []
    expected = 0
    for start in range(10):
        before = max(checkpoints(folder), default=0)
        command = job(folder, "none", 0, *words, *(["--resume"] if start else []))
        process = subprocess.Popen([str(BIN / "python"), *map(str, command[1:])], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        wait_until(
            lambda before=before, process=process: (
                process.poll() is not None or max(checkpoints(folder), default=0) > before
            ),
            "no checkpoint is made",
        )
        time.sleep(random.random())
        newest = max(checkpoints(folder))
        process.kill()
        said = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, said
        if start:
            resumed.append(json.loads((folder / "run/run.json").read_text())["resumes"][-1]["total_steps"])
            assert resumed[-1] >= expected
        expected = newest
    half = [path.name for path in (folder / "run/checkpoints").iterdir() if not (path / "MANIFEST.json").exists()]
    print(f"resumed at {resumed}; the last death left {half} half-written")
    about = resume(folder, 1, *words[:4])
    assert about["resumes"][-1]["total_steps"] >= expected


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_leaves_the_last_checkpoint_usable(policy, folder):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    (folder / "run").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder / "run"], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode()}")
    try:
        # 30,000 * 21 B = 630 kB of replay: three checkpoints and the growing fourth do not fit.
        words = ["--replay.capacity", "40000", "--total_steps", "40000", "--checkpoint.on_failure", policy]
        words += ["--checkpoint.period", "5000"]
        done = launch("horovodrun", *job(folder, "none", 0, *words))
        said = plain(done)
        print(policy, done.returncode, re.findall(r".*No space left on device.*", said)[:1])
        assert re.search(r"cannot be written .*No space left on device.*The one before is untouched", said), said
        assert done.returncode == (1 if policy == "stop" else 0), said
        if policy == "stop":
            last = max(checkpoints(folder))
            about = resume(folder, 1, "--replay.capacity", "40000", "--checkpoint.save_replay", "False")
            assert about["resumes"][-1]["total_steps"] == last
    finally:
        subprocess.run(["umount", "-l", folder / "run"], check=True)
