"""Ranks that die and ranks that join while a job goes on, under horovodrun's host discovery.

Names of this machine stand for hosts, one slot each: `localhost`, `127.0.0.1` and its own name. Horovod starts processes on
them without ssh.
"""

import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tensorflow as tf

from hvd_dqn.ranks.elastic import ElasticWorld
from tests.ranks import checkpoints, processes_of, run, wait_until

LAUNCH = ["horovodrun", "-np", "2", "--min-np", "1", "--max-np", "2", "--network-interfaces", "lo"]
TRAIN = ["train", "identity", "--elastic", "--evaluation.target_return", "None", "--evaluation.period", "20000",
         "--checkpoint.period", "1000", "--total_steps", "100000000"]  # fmt: skip


def ranks_of(folder: Path) -> dict[str, psutil.Process]:
    """By the names of their hosts."""
    ranks = [p for p in processes_of(folder) if p.name() == "hvd-dqn"]
    return {p.environ()["HOROVOD_HOSTNAME"]: p for p in ranks}


def rows_of(folder: Path) -> list[list[str]]:
    path = folder / "run/metrics.csv"
    return [line.split(",") for line in path.read_text().splitlines()[1:]] if path.exists() else []


def size_of(folder: Path) -> int:
    try:
        return json.loads((folder / "run/run.json").read_text())["size"]
    except (OSError, ValueError):
        return 0


def goes_on(folder: Path, rows: int = 3) -> bool:
    before = rows_of(folder)[-1:]
    wait_until(lambda: rows_of(folder)[-1:] != before, "the job does not go on")
    return len(rows_of(folder)) >= rows


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_go_on_without_a_rank_and_with_one_that_joins(victim, folder):
    hosts, script = folder / "hosts", folder / "hosts.sh"
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    script.write_text(f"#!/bin/sh\ncat {hosts}\n")
    script.chmod(0o755)
    command = [*LAUNCH, "--host-discovery-script", script, "hvd-dqn", *TRAIN, "--run_dir", folder / "run"]
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run, command, timeout=900)
        alive = lambda condition, what: wait_until(lambda: running.done() or condition(), what)  # noqa: E731
        alive(lambda: checkpoints(folder) and size_of(folder) == 2, "no checkpoint is made")
        ranks = {p.environ()["HOROVOD_RANK"]: host for host, p in ranks_of(folder).items()}
        survivor = ranks_of(folder)[ranks[str(1 - victim)]]
        ranks_of(folder)[ranks[str(victim)]].send_signal(signal.SIGKILL)
        killed = time.time()
        alive(lambda: size_of(folder) == 1 and goes_on(folder), "the survivor does not go on alone")
        alone = time.time()
        hosts.write_text(hosts.read_text() + f"{socket.gethostname()}:1\n")
        alive(lambda: size_of(folder) == 2 and goes_on(folder), "nobody joins")
        joined = time.time()
        assert survivor.is_running(), running.result().stdout + running.result().stderr  # the same process all the time
        survivor.send_signal(signal.SIGUSR1)
        done = running.result()
    said = done.stdout + done.stderr
    print(
        f"rank {victim} killed: alone after {alone - killed:.1f} s, two again {joined - alone:.1f} s after a host came"
    )
    lost = re.search(
        r"2 ranks before, 1 now\. Continuing from ([\d,]+) total steps, and at most [\d,]+ transitions", said
    )
    came = re.search(
        r"1 rank before, 2 now\. Continuing from ([\d,]+) total steps\. A rank that joined .* empty replay", said
    )
    assert lost, said
    assert came, said
    stopped = re.search(r"stopped on request after ([\d,]+) total steps", said)
    steps = [int(match[1].replace(",", "")) for match in (lost, came, stopped)]
    assert steps == sorted(steps)
    metrics = [int(row[0]) for row in rows_of(folder)]
    assert metrics == sorted(set(metrics))  # told once, by whichever rank was the chief
    assert max(checkpoints(folder)) == steps[-1]
    wait_until(lambda: not processes_of(folder), f"left behind: {processes_of(folder)}")


@pytest.mark.parametrize(
    ("message", "recovers"),
    [
        ("Horovod has been shut down", True),
        ('File "horovod/tensorflow/mpi_ops.py", line 176: Connection reset by peer [[{{node while/grad_0}}]]', True),
        ("Connection reset by peer [[{{node while/MatMul}}]]", False),
    ],
)
def test_an_error_is_the_loss_of_others_only_where_horovod_says_so(message, recovers):
    world = ElasticWorld.__new__(ElasticWorld)  # without a launcher to meet
    assert world.recovers_from(tf.errors.UnknownError(None, None, message)) == recovers
    assert not world.recovers_from(RuntimeError(message))


@pytest.mark.parametrize(
    ("words", "elastic", "line"),
    [
        (["--run_dir", "run"], True, "add --elastic"),
        (["--run_dir", "run", "--elastic"], False, "only --elastic"),
        (["--elastic"], True, "needs --run-dir"),
        (["--run_dir", "run", "--elastic", "--ranks.scaling", "strong"], True, "needs --ranks.scaling weak"),
    ],
)
def test_what_an_elastic_job_cannot_be_is_said(words, elastic, line):
    # As horovodrun's elastic launcher starts a rank.
    env = {
        "HOROVOD_ELASTIC": "1",
        "HOROVOD_RANK": "0",
        "HOROVOD_SIZE": "1",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
    }
    command = [
        "env",
        *(f"{k}={v}" for k, v in (env if elastic else {}).items()),
        "hvd-dqn",
        "train",
        "identity",
        *words,
    ]
    done = run(command)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
