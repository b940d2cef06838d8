"""Seconds from the start of the process until a greedy evaluation of 100 episodes reaches the target: 475 on CartPole, 200 on
LunarLander.

    tests/benchmarks/setup.sh && .venv/bin/python -m tests.benchmarks.solve [--seeds 1 2 3 4 5] [--presets ...] [--json]

Ours is `hvd-dqn train PRESET` on one rank and, under mpirun, on two. Stable-Baselines3 and Tianshou take the settings of
Stable-Baselines3's zoo, its best known ones; our presets have others: the question is how long a user waits. On CartPole we
also take the zoo's settings, on one rank. The rule is the same for all: an evaluation of 20 episodes every `evaluation.period`
total steps and, where it reaches the target, one of 100, which must too. Nobody's limit of steps is below ours; a run that does
not get there counts as infinitely long. One thread per rank. The runs of a seed follow each other, each seed beginning with
another; ratios are formed within a seed. A finished run is kept in --out, with the commit that made it, and not repeated.
"""

import json
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hvd_dqn.bench.jobs import mpirun
from hvd_dqn.bench.loop import TRAINING_CASES, case_config
from hvd_dqn.bench.results import provenance
from hvd_dqn.config import Config
from hvd_dqn.config_files import load_preset
from hvd_dqn.reporting.writers import read_csv
from hvd_dqn.storage.run_directory import Run
from tests.benchmarks import compare
from tests.ranks import run

PEERS = ("sb3", "tianshou")
ZOO_SETTINGS = "ours, the zoo's settings"
OURS = {"ours": 1, "ours, two ranks": 2, ZOO_SETTINGS: 1}  # ranks of each
# Stable-Baselines3's zoo, dqn.yml. Its runs end after 50,000 and 100,000 steps; here they may go on for longer, with the random
# actions of the zoo's first 16 % and 12 %. LunarLander is there v2, which Gymnasium no longer has.
ZOO = {
    "cartpole": {
        "env": "CartPole-v1", "hidden": [256, 256], "learning_rate": 2.3e-3, "batch": 64, "capacity": 100_000,
        "learn_start": 1_000, "train_period": 256, "updates": 128, "target_period": 10, "epsilon_end": 0.04,
        "epsilon_steps": 8_000, "total_steps": 100_000,
    },
    "lunarlander": {
        "env": "LunarLander-v3", "hidden": [256, 256], "learning_rate": 6.3e-4, "batch": 128, "capacity": 50_000,
        "learn_start": 0, "train_period": 4, "updates": 4, "target_period": 250, "epsilon_end": 0.1,
        "epsilon_steps": 12_000, "total_steps": 300_000,
    },
}  # fmt: skip
# At least so many times as fast as Stable-Baselines3.
TARGETS = {"cartpole": {"ours, two ranks": 10.0, ZOO_SETTINGS: 6.0}}


def main() -> None:
    parser = compare.arguments(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--presets", nargs="+", choices=list(ZOO), default=list(ZOO))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--out", type=Path, default=Path("runs/solve"))
    options = parser.parse_args()
    peers = compare.present(options.peers)
    runs = {preset: everyone(preset, peers, options.seeds, options.out) for preset in options.presets}
    result = compare.told("solve", seeds=options.seeds, results=[summary(p, runs[p]) for p in options.presets])
    every = [run for by_name in runs.values() for rows in by_name.values() for run in rows]
    result |= {
        "rounds": len(options.seeds),
        "commit": ", ".join(sorted({run["commit"] for run in every})),
        "peers": {name: number for run in every for name, number in run.get("versions", {}).items()},
    }
    compare.tell(result, table(result), options.json)


def everyone(preset: str, peers: Sequence[str], seeds: Sequence[int], out: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs by name, in the order of the seeds."""
    names = [name for name in OURS if name != ZOO_SETTINGS or f"{preset}-zoo" in TRAINING_CASES] + list(peers)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for i, seed in enumerate(seeds):
        for name in compare.turned(names, i):
            runs[name].append(kept(out, preset, name, seed))
    return runs


def kept(out: Path, preset: str, name: str, seed: int) -> dict[str, Any]:
    """The run's result, from its file or made now."""
    folder = out / f"{preset}-{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
    file = folder.with_suffix(".json")
    if not file.exists():
        print(f"{preset}, seed {seed}: {name}", file=sys.stderr, flush=True)
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of one that was interrupted
        began = time.perf_counter()
        made = train(folder, preset, name, seed) if name in OURS else ask(preset, name, seed)
        made |= {"wall_seconds": time.perf_counter() - began, "commit": provenance()["commit"], "seed": seed}
        file.write_text(json.dumps(made))
    return json.loads(file.read_text())


def train(folder: Path, preset: str, name: str, seed: int) -> dict[str, Any]:
    launcher, words = mpirun(OURS[name]) if OURS[name] > 1 else [], [preset]
    if name == ZOO_SETTINGS:
        file = folder.with_suffix(".yaml")
        file.write_text(zoo_settings(preset).to_yaml())
        words = ["--config", str(file)]
    command = [*launcher, "hvd-dqn", "train", *words, "--seed", str(seed), "--run-dir", folder]
    done = run(command, timeout=compare.TIMEOUT, **compare.ONE_THREAD)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    made = Run(folder)
    row = made.about()["result"]
    return {"solved": reached(made), "return_mean": row["return_mean"], "total_steps": row["total_steps"]}


def zoo_settings(preset: str) -> Config:
    """The zoo's settings with the preset's evaluations and checkpoints."""
    zoo, ours = case_config(f"{preset}-zoo", 1, total_steps=ZOO[preset]["total_steps"]), load_preset(preset)
    return zoo.model_copy(update={"evaluation": ours.evaluation, "report": ours.report, "checkpoint": ours.checkpoint})


def reached(run: Run) -> bool:
    """Whether an evaluation reached the target and one of 100 episodes confirmed it."""
    # A run that ends at its limit has a last evaluation of 100 too, but none before it that reached the target.
    returns = read_csv(run.path / "evaluations.csv")["return_mean"]
    return bool((returns[-2:] >= run.about()["target_return"]).all())


def ask(preset: str, name: str, seed: int) -> dict[str, Any]:
    evaluation = load_preset(preset).evaluation
    rule = {"target_return": evaluation.target_return, "evaluation_period": evaluation.period}
    return compare.peer(name, {"what": "solve", "envs": 1, "image": False, "seed": seed, **ZOO[preset], **rule})


def median(values: Sequence[float]) -> dict[str, Any]:
    """None stands for infinity, which JSON does not know."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def summary(preset: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = {name: [r["wall_seconds"] if r["solved"] else math.inf for r in rows] for name, rows in runs.items()}
    results = {
        name: {
            "seconds": median(seconds[name]),
            "solved": sum(r["solved"] for r in rows),
            "total_steps": median([r["total_steps"] if r["solved"] else math.inf for r in rows]),
        }
        for name, rows in runs.items()
    }
    ratios = {}
    for name in runs.keys() & OURS.keys():
        for peer in runs.keys() - OURS.keys():
            # A peer that does not get there: at least as many times as what it spent on trying. Ours: never is no times.
            times_as_fast = [
                theirs["wall_seconds"] / mine["wall_seconds"] if mine["solved"] else 0.0
                for mine, theirs in zip(runs[name], runs[peer], strict=True)
            ]
            found: dict[str, Any] = median(times_as_fast)
            found["at_least"] = found["median"] > 0 and results[peer]["seconds"]["median"] is None
            if peer == "sb3" and (limit := TARGETS.get(preset, {}).get(name)):
                found["target"] = compare.target("≥", limit, found)
            ratios[f"{name}: times as fast as {peer}"] = found
    return {"preset": preset, "runs": runs, "summary": results, "ratios": dict(sorted(ratios.items()))}


def shown(found: dict[str, Any], unit: str, factor: float = 1.0) -> str:
    low, middle, high = (
        "never" if found[name] is None else f"{factor * found[name]:,.0f}" for name in ("low", "median", "high")
    )
    return f"{middle} ({low} - {high}) {unit}"


def table(result: dict[str, Any]) -> Table:
    rows, lines = result["results"], {}
    for name in dict.fromkeys(name for row in rows for name in row["summary"]):
        lines[name] = [reached_by(row["summary"].get(name), result["rounds"]) for row in rows]
    for label in dict.fromkeys(name for row in rows for name in row["ratios"]):
        lines[label] = [times(row["ratios"].get(label)) for row in rows]
    columns = [f"{row['preset']} to {load_preset(row['preset']).evaluation.target_return:g}" for row in rows]
    return compare.table(result, "From process start to the target", columns, lines)


def reached_by(found: dict[str, Any] | None, seeds: int) -> str:
    if found is None:
        return "-"
    steps = shown(found["total_steps"], "k steps", 1e-3)
    return f"{shown(found['seconds'], 's')}\n{steps}\n{found['solved']} of {seeds} solved"


def times(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    text = f"{'≥ ' * found['at_least']}{found['median']:.1f} ({found['low']:.1f} - {found['high']:.1f})"
    if wanted := found.get("target"):
        text += f"\n{wanted['sign']} {wanted['limit']:g}: {'met' if wanted['met'] else 'NOT MET'}"
    return text


if __name__ == "__main__":
    main()
