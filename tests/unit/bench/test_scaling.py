"""The benchmark of scaling: who is started with what, what is made of the answers, and that nothing stays behind."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from hvd_dqn.bench import jobs as bench_jobs
from hvd_dqn.bench import scaling as bench
from hvd_dqn.errors import InputError, JobError
from hvd_dqn.ranks.placement import LAUNCHER_VARIABLES
from hvd_dqn.ranks.world import Solo
from tests.ranks import wait_until

# Steps per second, by the number of ranks and what they average; one of as many independent processes.
JOB = {(2, "gradients"): 150.0, (2, "parameters"): 190.0, (4, "gradients"): 200.0, (4, "parameters"): 300.0}
INDEPENDENT = {1: 100.0, 2: 100.0, 4: 80.0}


@pytest.fixture
def started(monkeypatch):
    """What was started, in turn; nothing really is."""
    log = []

    def row(words, rate):
        phase = {"count": 10, "updates": 4.0, "seconds": 0.1, "least": 0.1, "deviation": 0.01, "message_bytes": 8}
        batch = int(words[words.index("--batch") + 1]) if "--batch" in words else 64
        time = {"act": 0.1, "env": 0.1, "sample": 0.1, "update": 1.0, "communicate": 0.5, "idle": 0.2}
        measured = {"steps_per_second": rate, "seconds": 2.0, "time": time, "phase": phase}
        return {"results": [{"batch": batch, "envs": 1, **measured}]}

    def run_job(ranks, words):
        log.append((ranks, "job", words))
        return row(words, JOB[ranks, words[words.index("--sync") + 1]])

    def run_independently(processes, words):
        log.append((processes, "independent", words))
        return [row(words, INDEPENDENT[processes])] * processes

    monkeypatch.setattr(bench, "run_job", run_job)
    monkeypatch.setattr(bench, "run_independently", run_independently)
    monkeypatch.setattr(bench, "check_launcher", lambda: None)
    monkeypatch.setattr(bench, "cores", lambda: 2)
    return log


def test_efficiency_is_the_jobs_rate_over_the_sum_of_independent_processes(started):
    result = bench.measure(Solo(), "cartpole-16", (1, 2, 4), scaling="weak", rounds=3)
    rows = result["results"]
    found = [(row["ranks"], row["sync"], row["efficiency"]["median"], row["oversubscribed"]) for row in rows]
    assert found == [
        (1, "none", 1.0, False),
        (2, "gradients", 0.75, False),  # 150 / (100 + 100)
        (2, "parameters", 0.95, False),
        (4, "gradients", 0.625, True),  # 200 / (4 * 80)
        (4, "parameters", 0.9375, True),
    ]
    assert bench.render(result).row_count == 5
    assert rows[3]["independent_steps_per_second"]["median"] == 320
    shares = {"act": 0.05, "env": 0.05, "sample": 0.05, "update": 0.5, "communicate": 0.25, "idle": 0.1}
    assert [row["shares"] for row in rows] == [{}, *[pytest.approx(shares)] * 4]
    assert rows[3]["phase"]["count"] == 3 * 4 * 10


def test_they_take_turns_and_neither_always_goes_first(started):
    bench.measure(Solo(), "cartpole-16", (2,), scaling="weak", sync="gradients", rounds=4)
    assert [what for _, what, _ in started] == ["job", "independent", "independent", "job"] * 2


def test_weak_keeps_the_case_and_strong_divides_it_and_both_work_as_long(started):
    bench.measure(Solo(), "cartpole-16", (2,), sync="gradients", total_steps=6_000, rounds=1)
    weak_job, weak_baseline, strong_job, strong_baseline = (words for _, _, words in started)
    assert weak_job == ["loop", "cartpole-16", "--sync", "gradients", "--total-steps", "12000"]
    assert weak_baseline == ["loop", "cartpole-16", "--total-steps", "6000"]
    part = ["--batch", "32", "--envs", "8"]
    assert strong_job == ["loop", "cartpole-16", *part, "--sync", "gradients", "--total-steps", "6000"]
    assert strong_baseline == ["loop", "cartpole-16", *part, "--total-steps", "3000"]


def test_what_does_not_divide_is_left_out_by_name(started):
    result = bench.measure(Solo(), "cartpole-zoo", (1, 2, 4), rounds=1)
    assert result["left_out"] == ["2 ranks, strong", "4 ranks, strong"]  # the zoo has one environment
    assert {row["scaling"] for row in result["results"]} == {"weak"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("cartpole-15", (1, 2)), "no case 'cartpole-15'. Did you mean `cartpole-16`"),
        (("pixels", (0, 2)), r"--ranks and --rounds must be at least 1. Received: \[0, 2\] and 5"),
        (("pixels", (1, 2), 0), r"--total-steps must be at least 608.* Received: 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(arguments, line, started):
    with pytest.raises(InputError, match=line):
        bench.measure(Solo(), *arguments[:2], total_steps=(*arguments, None)[2])
    assert started == []


def test_under_a_launcher_or_without_mpirun_nothing_is_started(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"by mpirun, which is not on PATH: run launch/setup\.sh"):
        bench_jobs.check_launcher()
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(InputError, match="start it alone, without horovodrun"):
        bench_jobs.check_launcher()


def running(words):
    """The processes with these words on their command line."""
    return [p for p in psutil.process_iter(["cmdline"]) if words in " ".join(p.info["cmdline"] or [])]


# Told from those of another run of these tests on the same machine.
SLEEP = f"time.sleep(98765.{os.getpid()})"
SLEEPER = (sys.executable, "-c", f"import time; print('ready', flush=True); {SLEEP}")
# What stands in for `hvd-dqn bench WORDS`: says when it is ready, waits, and answers.
PATIENT = (
    "import sys, time; began = time.monotonic(); print('noise\\nready', flush=True); line = sys.stdin.readline();"
    'print(\'{"began": %r, "went": %r}\' % (began, time.monotonic()))'
)


def test_processes_on_their_own_begin_when_the_last_is_ready(monkeypatch):
    monkeypatch.setattr(bench_jobs, "HVD_DQN", (sys.executable, "-c", PATIENT))
    answers = bench_jobs.run_independently(3, [])
    assert max(answer["began"] for answer in answers) <= min(answer["went"] for answer in answers)


def test_one_that_dies_is_told_of_and_the_others_are_ended(monkeypatch):
    # The second of the two finds the file; the first waits for ever.
    script = "import sys; print('ready', flush=True); print('why it died', file=sys.stderr); sys.exit(3)"
    sleeper = (  # deaf, too, to what asks it to end
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True);" + SLEEP
    )
    monkeypatch.setattr(bench_jobs, "GRACE", 0.5)
    commands = [[sys.executable, "-c", sleeper], [sys.executable, "-c", script]]

    def wait_for_the_second():
        with bench_jobs._started(commands) as jobs:
            for job in jobs:
                job.read("ready")
            jobs[1].answer()

    with pytest.raises(JobError, match=r"ended with code 3 and without a result\. It said: why it died"):
        wait_for_the_second()
    assert not running(SLEEP)


def test_whoever_ends_the_benchmark_ends_what_it_started():
    script = f"from hvd_dqn.bench import jobs; jobs.HVD_DQN = {SLEEPER}; jobs.run_independently(2, [])"
    benchmark = subprocess.Popen([sys.executable, "-c", script])
    try:
        # The third may be a copy of the benchmark that is about to become what it starts: ended then, too, all end.
        wait_until(lambda: len(running(SLEEP)) >= 3, "the benchmark and what it starts")
        benchmark.terminate()
        assert benchmark.wait(300) == 128 + signal.SIGTERM
        assert not running(SLEEP)
    finally:
        for process in running(SLEEP):
            process.kill()


def test_ended_while_it_starts_them_it_ends_what_has_started(monkeypatch):
    class Ended(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            os.kill(os.getpid(), signal.SIGTERM)  # before anybody has it in hand

    monkeypatch.setattr(subprocess, "Popen", Ended)
    monkeypatch.setattr(bench_jobs, "HVD_DQN", SLEEPER)
    try:
        with pytest.raises(SystemExit) as stop:
            bench_jobs.run_independently(2, [])
        assert stop.value.code == 128 + signal.SIGTERM
        assert not running(SLEEP)
    finally:
        for process in running(SLEEP):
            process.kill()


def test_one_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(bench_jobs, "TIMEOUT", 1.0)
    monkeypatch.setattr(bench_jobs, "HVD_DQN", (sys.executable, "-c", f"import time; {SLEEP}"))
    with pytest.raises(JobError, match=r"ended with code -15 and without a result\. It said: nothing"):
        bench_jobs.run_independently(2, [])
    assert not running(SLEEP)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun and Horovod")
def test_two_real_ranks_and_two_real_processes_are_measured(monkeypatch):
    pytest.importorskip("mpi4py")
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    words = ["loop", "cartpole-16", "--batch", "8", "--envs", "8"]
    together = bench_jobs.run_job(2, [*words, "--total-steps", "4096"])
    apart = bench_jobs.run_independently(2, [*words, "--total-steps", "2048"])
    assert (together["ranks"], together["threads"]) == (2, 1)
    assert [answer["ranks"] for answer in apart] == [1, 1]
    of_job, *independent = (answer["results"][0] for answer in (together, *apart))
    # Together they took as many steps and each as many updates as the independent ones.
    assert of_job["total_steps"] == sum(row["total_steps"] for row in independent)
    assert of_job["updates"] == independent[0]["updates"] == independent[1]["updates"]
    assert np.isfinite(of_job["steps_per_second"])
    for row in bench_jobs.run_job(2, ["allreduce"])["results"]:
        assert 0 < row["horovod"]["seconds"]["median"] < 60
    assert not running("-m hvd_dqn bench loop cartpole-16 --batch 8 --envs 8")
