"""A signal is a wish: it is noted, and only a second Ctrl-C ends the process."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
from hvd_dqn.ranks.signals import StopRequest
stop = StopRequest()
stop.install(for_all={for_all})
print("ready", flush=True)
while not stop():
    time.sleep(0.01)
print(stop.name, flush=True)
{then}
time.sleep(60)
"""


def start(for_all=True, then="") -> subprocess.Popen:
    script = SCRIPT.format(for_all=for_all, then=then)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_the_first_signal_is_noted_and_later_ones_of_another_kind_change_nothing(name):
    process = start(then="stop.ignore(); print('ignores', flush=True)")
    process.send_signal(signal.Signals[name])
    assert process.stdout.readline() == f"{name}\n"
    assert process.stdout.readline() == "ignores\n"
    for other in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process.send_signal(other)
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_the_first_signal_gives_the_name():
    process = start(then="time.sleep(1); print(stop.name, flush=True)")
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.kill()
    process.wait()


def test_a_second_ctrl_c_ends_it_whatever_came_before_and_between():
    process = start()
    for name in ("SIGUSR1", "SIGINT", "SIGTERM", "SIGINT"):
        assert process.poll() is None
        process.send_signal(signal.Signals[name])
        if name == "SIGUSR1":
            assert process.stdout.readline() == "SIGUSR1\n"
        time.sleep(0.2)
    assert process.wait(30) == 130


def test_a_second_ctrl_c_ends_the_process_at_once():
    process = start()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_a_rank_of_an_elastic_job_is_ended_by_sigterm_alone():
    process = start(for_all=False)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
