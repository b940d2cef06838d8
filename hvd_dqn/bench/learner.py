"""Measures how long an update of the learner takes, with and without sampling its batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from hvd_dqn.agent.layout import Layout, single
from hvd_dqn.agent.learner import Learner
from hvd_dqn.agent.networks import build_network
from hvd_dqn.agent.objectives import Dqn
from hvd_dqn.agent.preprocess import Preprocess
from hvd_dqn.agent.replay import Replay
from hvd_dqn.agent.transition import Batch, Transition
from hvd_dqn.bench.results import provenance, rate, result_table, seconds_of, spread, with_spread
from hvd_dqn.ranks.lockstep import BroadcastHook
from hvd_dqn.ranks.placement import compute_alone
from hvd_dqn.ranks.world import World

ENVS = 8  # of the replay that is sampled from


class LearnerCase(NamedTuple):
    """A network, and the shapes and sizes of the random transitions that it is updated with."""

    network: str
    hidden: tuple[int, ...]
    observation: tuple[int, ...]
    actions: int
    batch: int
    updates: int  # K, per phase
    phases: int  # per measurement: a tenth of a second or more, so that one interruption hardly counts
    transitions: int  # in the replay of each rank


LEARNER_CASES = {
    "mlp-64-64": LearnerCase("mlp", (64, 64), (4,), 2, batch=64, updates=32, phases=24, transitions=50_000),
    "mlp-256-256": LearnerCase("mlp", (256, 256), (4,), 2, batch=64, updates=32, phases=8, transitions=50_000),
    # 5,000 * 84 * 84 B = 35 MB of frames
    "nature-cnn": LearnerCase("cnn", (512,), (84, 84, 4), 6, batch=32, updates=4, phases=2, transitions=5_000),
}


def measure(world: World, networks: Sequence[str] = tuple(LEARNER_CASES), repeats: int = 7) -> dict[str, Any]:
    """Microseconds per update of each network: the phase of K updates alone, and with sampling its batches.

    All ranks call it. The networks take turns, so that a slow moment of the machine affects all of them. The slowest
    rank of each turn counts. An update includes averaging over ranks. Every phase ends with a target copy.
    """
    if all(LEARNER_CASES[name].network == "mlp" for name in networks):
        compute_alone()  # as in training; a process has one number of threads for all measurements
    jobs = [job for name in networks for job in _jobs(LEARNER_CASES[name], world)]
    rounds = [[seconds_of(job, world.barrier) for job in jobs] for _ in range(repeats)]
    seconds = world.max(np.array(rounds))  # [repeats, jobs]
    results = []
    for i, name in enumerate(networks):
        case = LEARNER_CASES[name]
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


def _jobs(case: LearnerCase, world: World) -> Iterator[Callable[[], None]]:
    """Two jobs, warmed up: the phases of the case with one batch each time, and with a fresh sample each time."""
    preprocess, objective = Preprocess(layout_of(case)), Dqn(double=False, loss="huber")
    rng = np.random.default_rng(0)
    learner = Learner(
        lambda: build_network(
            case.network, preprocess, case.actions, objective, hidden=case.hidden, dueling=False, rng=rng
        ),
        preprocess,
        objective,
        world,
        max_gradient_norm=10.0,
        xla=None,
        planned=10**9,  # compiled if it would be in a long run
    )
    BroadcastHook(world, learner.variables)()
    replay = filled_replay(case, world.rank)
    batch = replay.gather(replay.draw(case.updates, case.batch))
    copies = np.arange(case.updates) == case.updates - 1

    def update(batch: Batch) -> None:
        skipped = learner.update(batch, 1e-4, copies).skipped
        assert not skipped, "an update that is skipped costs less"

    def train() -> None:
        for _ in range(case.phases):
            update(batch)

    def sample_and_train() -> None:
        for _ in range(case.phases):
            update(replay.gather(replay.draw(case.updates, case.batch)))

    train()  # traces the phase, and lets the allocator and the caches settle
    yield train
    yield sample_and_train


def layout_of(case: LearnerCase) -> Layout:
    is_image = len(case.observation) == 3
    return single(case.observation, np.uint8, divisor=255) if is_image else single(case.observation)


def filled_replay(case: LearnerCase, rank: int) -> Replay:
    """A replay full of random transitions; one in a hundred is terminal."""
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


def render(result: dict[str, Any]) -> Table:
    measured = f"median of {result['repeats']} and half its interquartile range"
    headings = ("network", "batch", "updates per phase", "µs per update", "with sampling", "updates/s")
    table = result_table(result, measured, *headings, left=1)
    for row in result["results"]:
        table.add_row(
            row["network"],
            str(row["batch"]),
            str(row["updates_per_phase"]),
            with_spread(row["microseconds_per_update"]),
            with_spread(row["microseconds_with_sampling"]),
            rate(row["updates_per_second"]),
        )
    return table
