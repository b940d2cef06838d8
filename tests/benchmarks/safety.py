"""What safety costs: votes, drift checks and the watchdog in steps per second, and checkpoints in seconds and bytes.

    horovodrun -np 2 python -m tests.benchmarks.safety guards [--rounds 7]
    python -m tests.benchmarks.safety checkpoints [--rounds 5]

`guards` trains `cartpole` with and without them, in turns and in the same processes; `checkpoints` saves and reads replays of
CartPole's and of Atari's observations.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hvd_dqn import bench
from hvd_dqn.checkpoint import Checkpoints
from hvd_dqn.config import Config, load_preset
from hvd_dqn.distributed import Solo, World, connect
from hvd_dqn.placement import set_thread_defaults
from hvd_dqn.trainer import Trainer


def guarded(on: bool, total_steps: int) -> Config:
    never = 10 * total_steps
    config = load_preset("cartpole").model_dump()
    config["total_steps"] = total_steps
    config["evaluation"] |= {"target_return": None, "period": never, "final_episodes": 2}
    config["checkpoint"] |= {"period": never, "save_replay": False}
    if not on:
        config["ranks"] |= {"vote_period": never, "drift_check_period": never, "silence_seconds": None}
    return Config.model_validate(config)


def steps_per_second(config: Config, world: World) -> float:
    """Of the run after its first updates, which trace the graph."""
    trainer = Trainer(config, world)
    with tempfile.TemporaryDirectory() as folder:
        rows = [r.row for r in trainer.train(Checkpoints(Path(folder), world)) if r.kind == "report"]
    trainer.close()
    first, last = next(row for row in rows if row["updates"] > 0), rows[-1]
    return (last["total_steps"] - first["total_steps"]) / (last["seconds"] - first["seconds"])


def guards(world: World, rounds: int, total_steps: int) -> None:
    rates = []
    for round in range(rounds):
        order = (True, False) if round % 2 else (False, True)
        pair = {on: steps_per_second(guarded(on, total_steps), world) for on in order}
        rates.append((pair[True], pair[False]))
    if world.rank == 0:
        ratios = np.array([on / off for on, off in rates])
        result = {
            "benchmark": "guards", **bench.provenance(), "ranks": world.size, "rounds": rounds,
            "steps_per_second": {"with": np.median([r[0] for r in rates]), "without": np.median([r[1] for r in rates])},
            "with_over_without": {"median": np.median(ratios), "low": ratios.min(), "high": ratios.max()},
        }  # fmt: skip
        print(json.dumps(result, indent=1))


def best(action: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median, lowest and highest seconds."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)), min(seconds), max(seconds)


def checkpoints(rounds: int) -> None:
    print(
        "| observations | transitions | compressed | file, MB | write, s | check and read, s |\n|---|---|---|---|---|---|"
    )
    cases = {
        "4 floats": bench.CASES["mlp-64-64"],
        "84 x 84 bytes, 4 stacked": bench.CASES["nature-cnn"],
    }
    for name, transitions in [("4 floats", 100_000), ("4 floats", 1_000_000), ("84 x 84 bytes, 4 stacked", 100_000)]:
        case = cases[name]._replace(transitions=transitions)
        replay = bench.filled_replay(case, 0)
        for compress in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                store = Checkpoints(Path(folder), Solo(), compress=compress)
                save = lambda store=store: store.save(1, {}, {}, part={"replay": replay.state()})  # noqa: E731, B023
                write = best(save, rounds)
                size = sum(path.stat().st_size for path in Path(folder).glob("checkpoints/1/replay*"))

                def read(store=store) -> None:
                    snapshot = store.newest(print)
                    assert snapshot is not None
                    replay.load_state(snapshot.part(0)["replay"])  # noqa: B023

                reading = best(read, rounds)
            cells = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in (write, reading)]
            print(
                f"| {name} | {transitions:,} | {'yes' if compress else 'no'} | {size / 1e6:,.1f} | {' | '.join(cells)} |",
                flush=True,
            )
    print(json.dumps(bench.provenance()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["guards", "checkpoints"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--total-steps", type=int, default=15_000)
    options = parser.parse_args()
    set_thread_defaults()
    if options.what == "guards":
        guards(connect(), options.rounds, options.total_steps)
    else:
        checkpoints(options.rounds)


if __name__ == "__main__":
    main()
