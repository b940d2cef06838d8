"""What safety costs: votes, drift checks and the watchdog as a part of a run's time, and checkpoints in seconds and bytes.

    horovodrun -np 2 python -m tests.benchmarks.safety guards [--rounds 5] [--total-steps 50000]
    python -m tests.benchmarks.safety checkpoints [--rounds 5]

`guards` trains `cartpole` and adds up the time that the main thread spends in votes, drift checks and beats of the watchdog,
waiting for the other rank included, and the processor time of the watchdog's own thread. Beside it the same training without
them, in turns and in the same processes: that ratio is the more direct answer, and on a shared machine mostly noise.
`checkpoints` saves and reads replays of CartPole's and of Atari's observations.
"""

import argparse
import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from hvd_dqn.agent.replay import Replay
from hvd_dqn.bench.learner import LEARNER_CASES, filled_replay
from hvd_dqn.bench.results import provenance
from hvd_dqn.config import Config
from hvd_dqn.config_files import load_preset
from hvd_dqn.ranks.connect import connect
from hvd_dqn.ranks.placement import set_thread_defaults
from hvd_dqn.ranks.world import Solo, World
from hvd_dqn.storage.checkpoint import Checkpoints
from hvd_dqn.training.trainer import Trainer
from tests.benchmarks.compare import spread


def guarded(on: bool, total_steps: int) -> Config:
    never = 10 * total_steps
    config = load_preset("cartpole").model_dump()
    config["total_steps"] = total_steps
    config["evaluation"] |= {"target_return": None, "period": never, "final_episodes": 2}
    config["checkpoint"] |= {"period": never, "save_replay": False}
    if not on:
        config["ranks"] |= {"vote_period": never, "drift_check_period": never, "silence_seconds": None}
    return Config.model_validate(config)


class Stopwatches:
    """The seconds spent in methods of objects."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def attach(self, name: str, owner: Any, method: str) -> None:
        action = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return action(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - began

        setattr(owner, method, timed)


def watchdog_seconds() -> float:
    """Processor time of the watchdog's thread, in ticks of 10 ms."""
    mine = {thread.native_id for thread in threading.enumerate() if thread.name == "watchdog"}
    return sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id in mine)


def train(config: Config, world: World) -> tuple[float, dict[str, float]]:
    """Steps per second, and the part of the time that each guard took, after the first updates, which trace the graph."""
    trainer, watches, rows = Trainer(config, world), Stopwatches(), []
    with tempfile.TemporaryDirectory() as folder:
        for record in trainer.train(Checkpoints(Path(folder), world)):
            if record.kind != "report" or not record.row["updates"]:
                continue
            if not rows:
                watches.attach("votes", trainer, "_vote")
                watches.attach("drift checks", trainer, "_check_drift")
                watches.attach("beats", trainer.watchdog, "beat")
                before = watchdog_seconds()
            rows.append(record.row)
            thread = watchdog_seconds() - before
    trainer.close()
    seconds = rows[-1]["seconds"] - rows[0]["seconds"]
    parts = {name: spent / seconds for name, spent in (watches.seconds | {"watchdog's thread": thread}).items()}
    return (rows[-1]["total_steps"] - rows[0]["total_steps"]) / seconds, parts


def guards(world: World, rounds: int, total_steps: int) -> None:
    rates, parts = [], []
    for round in range(rounds):
        order = (True, False) if round % 2 else (False, True)
        pair = {on: train(guarded(on, total_steps), world) for on in order}
        rates.append((pair[True][0], pair[False][0]))
        parts.append(pair[True][1])
    worst = {
        name: world.max(np.array([part[name] for part in parts])) for name in parts[0]
    }  # [rounds] of the slower rank
    if world.rank == 0:
        result = {
            "benchmark": "guards", **provenance(), "ranks": world.size, "rounds": rounds,
            "steps_per_second": {"with": np.median([r[0] for r in rates]), "without": np.median([r[1] for r in rates])},
            "with_over_without": spread([on / off for on, off in rates]),
            "part_of_the_time": {name: spread(part) for name, part in worst.items()},
            "all_parts": spread(sum(worst.values())),
        }  # fmt: skip
        print(json.dumps(result, indent=1))


def read(store: Checkpoints, replay: Replay) -> None:
    snapshot = store.newest(print)
    assert snapshot is not None
    replay.load_state(snapshot.part(0)["replay"])


def save(store: Checkpoints, replay: Replay) -> None:
    store.save(1, {}, {}, part={"replay": replay.state()})


def timed(action: Callable[[Checkpoints, Replay], None], store: Checkpoints, replay: Replay, rounds: int) -> str:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        action(store, replay)
        seconds.append(time.perf_counter() - began)
    return f"{np.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def checkpoints(rounds: int) -> None:
    print(
        "| observations | transitions | compressed | file, MB | write, s | check and read, s |\n|---|---|---|---|---|---|"
    )
    cases = {
        "4 floats": LEARNER_CASES["mlp-64-64"],
        "84 x 84 bytes, 4 stacked": LEARNER_CASES["nature-cnn"],
    }
    for name, transitions in [("4 floats", 100_000), ("4 floats", 1_000_000), ("84 x 84 bytes, 4 stacked", 100_000)]:
        case = cases[name]._replace(transitions=transitions)
        replay = filled_replay(case, 0)
        for compress in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                store = Checkpoints(Path(folder), Solo(), compress=compress)
                times = [timed(action, store, replay, rounds) for action in (save, read)]
                size = sum(path.stat().st_size for path in Path(folder).glob("checkpoints/1/replay*"))
            cells = [name, f"{transitions:,}", "yes" if compress else "no", f"{size / 1e6:,.1f}", *times]
            print(f"| {' | '.join(cells)} |", flush=True)
    print(json.dumps(provenance()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["guards", "checkpoints"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--total-steps", type=int, default=50_000)
    options = parser.parse_args()
    set_thread_defaults()
    if options.what == "guards":
        guards(connect(), options.rounds, options.total_steps)
    else:
        checkpoints(options.rounds)


if __name__ == "__main__":
    main()
