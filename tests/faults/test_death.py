"""Real jobs of two ranks, one of which is killed, frozen or hangs: the whole job ends, says why and leaves nothing behind."""

import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.ranks import ROOT, horovodrun, processes_of, run, wait_until

JOB = """
import contextlib, itertools, os, signal, sys, threading, time
import numpy as np
from hvd_dqn.ranks.connect import connect
from hvd_dqn.ranks.placement import set_thread_defaults
from hvd_dqn.ranks.watchdog import open_watchdog

folder, fault, culprit = sys.argv[1], sys.argv[2], int(sys.argv[3])
set_thread_defaults()
world = connect()
hangs = threading.Event()

def strike():
    print(f"struck at {time.time():.3f}", file=sys.stderr, flush=True)
    hangs.set() if fault == "hang" else os.kill(os.getpid(), signal.Signals[fault])

with contextlib.closing(open_watchdog(world, silence_seconds=8.0, stall_seconds=8.0)) as watchdog:
    open(f"{folder}/rank-{world.rank}", "w").write(str(os.getpid()))
    if world.rank == culprit:
        threading.Timer(2.0, strike).start()
    for cycle in itertools.count():
        watchdog.beat(f"cycle {cycle:,}")
        if hangs.is_set():
            time.sleep(3600)
        if world.any(os.path.exists(f"{folder}/end")):
            break
"""


def on_mpirun(*command):
    # As horovodrun starts it: ranks that are not bound share the machine's cores with whoever else is busy.
    options = ["--allow-run-as-root", "--bind-to", "none", "-x", "PYTHONPATH"]
    return run(["mpirun", *options, "-np", "2", *command], PYTHONPATH=str(ROOT))


LAUNCHERS = {
    "mpirun": on_mpirun,
    "horovodrun": lambda *command: horovodrun(2, *command, PYTHONPATH=str(ROOT)),
    "gloo": lambda *command: horovodrun(2, *command, gloo=True, PYTHONPATH=str(ROOT)),
}


@pytest.fixture
def job(folder):
    (folder / "job.py").write_text(JOB)
    return folder


# horovodrun starts mpirun: what is found there is found here too, and takes its minutes only when asked for.
@pytest.mark.parametrize("launcher", ["horovodrun", "gloo", pytest.param("mpirun", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fault", "culprit", "line"),
    [
        # mpirun itself notices a killed rank, and may be the first to say so.
        ("SIGKILL", 0, r"\[rank 1/2 (\S+)\] rank 0 on \1 is gone|process rank 0 .* on node \S+ exited on signal 9"),
        ("SIGKILL", 1, r"\[rank 0/2 (\S+)\] rank 1 on \1 is gone|process rank 1 .* on node \S+ exited on signal 9"),
        ("SIGSTOP", 0, r"\[rank 1/2 (\S+)\] rank 0 on \1 has been silent for \d+ s"),
        ("SIGSTOP", 1, r"\[rank 0/2 (\S+)\] rank 1 on \1 has been silent for \d+ s"),
        (
            "hang",
            0,
            r"\[rank 0/2 (\S+)\] rank 0 on \1 has made no progress for \d+ s; .*: cycle [\d,]+\. It is at job\.py:\d+ ",
        ),
        (
            "hang",
            1,
            r"\[rank 0/2 (\S+)\] rank 1 on \1 has made no progress for \d+ s; .*: cycle [\d,]+\. It is at job\.py:\d+ ",
        ),
    ],
    ids=["kill-0", "kill-1", "stop-0", "stop-1", "hang-0", "hang-1"],
)
def test_a_job_ends_with_any_of_its_ranks(fault, culprit, line, launcher, job):
    done = LAUNCHERS[launcher]("python", job / "job.py", job, fault, culprit)
    # horovodrun puts the rank before each piece of output, and may do so inside a line.
    said = re.sub(r"\[\d+(,\d+)?\]<std(out|err)>:", "", done.stdout + done.stderr)
    struck = float(re.search(r"struck at ([\d.]+)", said)[1])
    print(said, f"The job ended {time.time() - struck:.1f} s later.")
    assert done.returncode != 0
    assert re.search(line, said), said
    assert said.count("This ends the job") <= 1, said  # who finds the fault names it; the others are silent
    wait_until(lambda: not processes_of(job), f"left behind by {launcher}: {processes_of(job)}")


def test_a_job_that_was_suspended_as_a_whole_goes_on(job):
    with ThreadPoolExecutor() as pool:
        running = pool.submit(on_mpirun, "python", job / "job.py", job, "none", "-1")
        wait_until(lambda: all((job / f"rank-{rank}").exists() for rank in range(2)), "the job does not start")
        time.sleep(3)
        ranks = [psutil.Process(int((job / f"rank-{rank}").read_text())) for rank in range(2)]
        for process in ranks:
            process.send_signal(signal.SIGSTOP)
        time.sleep(20)  # more than twice what would end the job
        for process in ranks:
            process.send_signal(signal.SIGCONT)
        time.sleep(5)
        (job / "end").touch()
        done = running.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This ends the job" not in done.stdout + done.stderr
