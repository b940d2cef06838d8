"""How fast the parts of the program are on this machine, measured so that the numbers can be compared."""

import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from rich.table import Table

from hvd_dqn import __version__
from hvd_dqn.distributed import World
from hvd_dqn.learner import Learner
from hvd_dqn.lockstep import BroadcastHook
from hvd_dqn.networks import build_network
from hvd_dqn.placement import compute_alone, cores
from hvd_dqn.replay import Replay
from hvd_dqn.transition import Batch, Transition

ENVS = 8  # streams of the replay that is sampled from


class Case(NamedTuple):
    """A network on made-up transitions, with the batch and the number of actions of the job it stands for."""

    network: str
    hidden: tuple[int, ...]
    observation: tuple[int, ...]
    actions: int
    batch: int
    updates: int  # K, per phase
    phases: int  # per measurement: a tenth of a second or more, so that the clock and one interruption weigh little
    transitions: int  # in the replay, of each rank


CASES = {
    "mlp-64-64": Case("mlp", (64, 64), (4,), 2, batch=64, updates=32, phases=24, transitions=50_000),
    "mlp-256-256": Case("mlp", (256, 256), (4,), 2, batch=64, updates=32, phases=8, transitions=50_000),
    # 5,000 * 84 * 84 B = 35 MB of frames
    "nature-cnn": Case("cnn", (512,), (84, 84, 4), 6, batch=32, updates=4, phases=2, transitions=5_000),
}


def learner(world: World, networks: Sequence[str] = tuple(CASES), repeats: int = 7) -> dict[str, Any]:
    """Microseconds per update of each network: the phase of K updates alone, and with drawing its batches.

    All ranks call it. The networks take turns, so that a slow moment of the machine falls on all of them, and of every
    turn the slowest rank counts. An update includes averaging over ranks; every phase ends with a target copy.
    """
    if all(CASES[name].network == "mlp" for name in networks):
        compute_alone()  # as in training; the threads are one number for all that a process measures
    jobs = [job for name in networks for job in _jobs(CASES[name], world)]
    rounds = [[seconds_of(job, world.barrier) for job in jobs] for _ in range(repeats)]
    seconds = world.max(np.array(rounds))  # [repeats, jobs]
    results = []
    for i, name in enumerate(networks):
        case = CASES[name]
        microseconds = 1e6 * seconds[:, 2 * i : 2 * i + 2] / (case.phases * case.updates)
        alone, sampled = spread(microseconds[:, 0]), spread(microseconds[:, 1])
        results.append(
            {
                "network": name,
                "batch": case.batch,
                "updates_per_phase": case.updates,
                "microseconds_per_update": alone,
                "microseconds_with_sampling": sampled,
                "updates_per_second": 1e6 / alone["median"],
            }
        )
    return {"benchmark": "learner", **provenance(), "ranks": world.size, "repeats": repeats, "results": results}


def _jobs(case: Case, world: World) -> Iterator[Callable[[], None]]:
    """Two jobs, warmed up: the case's phases with one batch, and the same with every batch drawn."""
    agent = Learner(
        lambda: build_network(
            case.network,
            case.observation,
            None,
            case.actions,
            hidden=case.hidden,
            dueling=False,
            rng=np.random.default_rng(0),
        ),
        world,
        double=False,
        loss="huber",
        max_gradient_norm=10.0,
        xla=None,
        planned=10**9,  # compiled, where a long run's would be
    )
    BroadcastHook(world, agent.variables)()
    replay = filled_replay(case, world.rank)
    batch = replay.sample(case.updates, case.batch)
    copies = np.arange(case.updates) == case.updates - 1

    def update(batch: Batch) -> None:
        skipped = agent.update(batch, 1e-4, copies).skipped
        assert not skipped, "an update that is skipped costs less"

    def train() -> None:
        for _ in range(case.phases):
            update(batch)

    def sample_and_train() -> None:
        for _ in range(case.phases):
            update(replay.sample(case.updates, case.batch))

    train()  # traces the phase, and lets the allocator and the caches settle
    yield train
    yield sample_and_train


def filled_replay(case: Case, rank: int) -> Replay:
    """A replay full of random transitions, one in a hundred the last of its episode."""
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(rank,)))
    images = len(case.observation) == 3
    frame, stack = ((*case.observation[:-1], 1), case.observation[-1]) if images else (case.observation, 1)
    dtype = np.uint8 if images else np.float32
    slots = math.ceil(case.transitions / ENVS)
    replay = Replay(slots, ENVS, frame, dtype, rng, frame_stack=stack)
    frames = rng.integers(256, size=(64, ENVS, *frame)).astype(dtype)
    for step in range(slots):
        replay.add(
            Transition(
                frames[step % 64],
                rng.integers(case.actions, size=ENVS),
                rng.normal(size=ENVS).astype(np.float32),
                rng.random(ENVS) < 0.01,
                np.zeros(ENVS, bool),
                frames[(step + 1) % 64],
                np.ones(ENVS, bool),
            )
        )
    return replay


def seconds_of(job: Callable[[], Any], barrier: Callable[[], None]) -> float:
    """Of this rank, from when all are ready."""
    barrier()
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def provenance() -> dict[str, Any]:
    """What a number must be told with: the code, the machine, the threads and the command."""
    return {
        "commit": revision(),
        "machine": {
            "cpu": cpu(),
            "cores": cores(),
            "gpus": [
                tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
                for gpu in tf.config.get_visible_devices("GPU")
            ],
        },
        "threads": int(os.environ.get("TF_NUM_INTRAOP_THREADS", cores())),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def revision() -> str:
    """The commit of this package, `-dirty` with changes of its own; its version where it is not in a checkout."""
    here = Path(__file__)
    # An installed package may lie inside another project's checkout, which does not track it.
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    commit = _git(here.parent, "describe", "--always", "--dirty", "--abbrev=10") if tracked else ""
    return commit or __version__


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def table(result: dict[str, Any]) -> Table:
    """The result of `learner` for people."""
    measured = f"median of {result['repeats']} and half its interquartile range"
    made = made_table(result, measured)
    made.add_column("network")
    for heading in ("batch", "updates per phase", "µs per update", "with sampling", "updates/s"):
        made.add_column(heading, justify="right")
    for row in result["results"]:
        made.add_row(
            row["network"],
            str(row["batch"]),
            str(row["updates_per_phase"]),
            with_spread(row["microseconds_per_update"]),
            with_spread(row["microseconds_with_sampling"]),
            rate(row["updates_per_second"]),
        )
    return made


def made_table(result: dict[str, Any], measured: str) -> Table:
    """An empty table, headed by the machine and closed by what was measured how."""
    machine = result["machine"]
    threads, where = count(result["threads"], "thread"), ", ".join(machine["gpus"]) or machine["cpu"]
    ranks = f"{count(result['ranks'], 'rank')} of {threads}" if "ranks" in result else f"ranks of {threads}"
    title = f"{ranks} on {where} ({count(machine['cores'], 'core')})"
    caption = f"{measured}; commit {result['commit']}: {result['command']}"
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left", min_width=60)


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def with_spread(spread: dict[str, float], unit: str = "") -> str:
    half = (spread["high"] - spread["low"]) / 2
    return f"{spread['median']:,.0f}{unit} ± {100 * half / spread['median']:.0f} %"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
