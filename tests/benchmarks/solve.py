"""Seconds from the start of the process until a greedy evaluation of 100 episodes reaches the target: 475 on CartPole, 200 on
LunarLander.

    tests/benchmarks/setup.sh && .venv/bin/python -m tests.benchmarks.solve [--seeds 1 2 3 4 5] [--presets ...] [--json]

Ours is `hvd-dqn train PRESET` on one rank and, under mpirun, on two. Stable-Baselines3 and Tianshou take the settings of
Stable-Baselines3's zoo, its best known ones; our presets have others: the question is how long a user waits. The rule is the
same for all: an evaluation of 20 episodes every `evaluation.period` total steps and, where it reaches the target, one of 100,
which must too. Nobody's limit of steps is below ours; a run that does not get there counts as infinitely long. One thread per
rank. The runs of a seed follow each other; a finished one is kept in --out, with the commit that made it, and not repeated.
"""

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hvd_dqn.bench import provenance
from hvd_dqn.bench_jobs import mpirun
from hvd_dqn.config_files import load_preset
from hvd_dqn.metrics import read_csv
from hvd_dqn.run import Run
from tests.benchmarks import compare
from tests.ranks import run

PEERS = ("sb3", "tianshou")
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
TARGETS = {"cartpole": {"ours, two ranks": 10.0}}


def main() -> None:
    parser = compare.arguments(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--presets", nargs="+", choices=list(ZOO), default=list(ZOO))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--out", type=Path, default=Path("runs/solve"))
    options = parser.parse_args()
    names = ["ours", "ours, two ranks", *compare.present(options.peers)]
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {p: {name: [] for name in names} for p in options.presets}
    for preset in options.presets:
        for seed in options.seeds:
            for name in names:
                runs[preset][name].append(kept(options.out, preset, name, seed))
    result = compare.told("solve", seeds=options.seeds, results=[summary(p, runs[p]) for p in options.presets])
    every = [run for by_name in runs.values() for rows in by_name.values() for run in rows]
    result |= {
        "rounds": len(options.seeds),
        "commit": ", ".join(sorted({run["commit"] for run in every})),
        "peers": {name: number for run in every for name, number in run.get("versions", {}).items()},
    }
    compare.tell(result, table(result), options.json)


def kept(out: Path, preset: str, name: str, seed: int) -> dict[str, Any]:
    """The run's result, from its file or made now."""
    folder = out / f"{preset}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    file = folder.with_suffix(".json")
    if not file.exists():
        print(f"{preset}, seed {seed}: {name}", file=sys.stderr, flush=True)
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of one that was interrupted
        began = time.perf_counter()
        made = train(folder, preset, 2, seed) if name == "ours, two ranks" else (
            train(folder, preset, 1, seed) if name == "ours" else ask(preset, name, seed)
        )  # fmt: skip
        made |= {"wall_seconds": time.perf_counter() - began, "commit": provenance()["commit"], "seed": seed}
        file.write_text(json.dumps(made))
    return json.loads(file.read_text())


def train(folder: Path, preset: str, ranks: int, seed: int) -> dict[str, Any]:
    launcher = mpirun(ranks) if ranks > 1 else []
    command = [*launcher, "hvd-dqn", "train", preset, "--seed", str(seed), "--run-dir", folder]
    done = run(command, timeout=compare.TIMEOUT, **compare.ONE_THREAD)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    made = Run(folder)
    row = made.about()["result"]
    return {"solved": reached(made), "return_mean": row["return_mean"], "total_steps": row["total_steps"]}


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
    for name in ("ours", "ours, two ranks"):
        for peer in runs.keys() - {"ours", "ours, two ranks"}:
            mine, theirs = results[name]["seconds"]["median"], results[peer]["seconds"]["median"]
            # A peer that does not get there: at least as many times as what it spent on trying. Ours: never is no times.
            spent = statistics.median([r["wall_seconds"] for r in runs[peer]])
            times_as_fast = (theirs or spent) / mine if mine is not None else 0.0
            found: dict[str, Any] = {"ratio": times_as_fast, "at_least": theirs is None and mine is not None}
            limit = TARGETS.get(preset, {}).get(name)
            if peer == "sb3" and limit:
                found["target"] = {"sign": "≥", "limit": limit, "met": times_as_fast >= limit}
            ratios[f"{name}: times as fast as {peer}"] = found
    return {"preset": preset, "runs": runs, "summary": results, "ratios": dict(sorted(ratios.items()))}


def shown(found: dict[str, Any], unit: str, factor: float = 1.0) -> str:
    low, middle, high = (
        "never" if found[name] is None else f"{factor * found[name]:,.0f}" for name in ("low", "median", "high")
    )
    return f"{middle} ({low} - {high}) {unit}"


def table(result: dict[str, Any]) -> Table:
    rows, lines = result["results"], {}
    for name in rows[0]["summary"]:
        lines[name] = [
            f"{shown(row['summary'][name]['seconds'], 's')}\n{shown(row['summary'][name]['total_steps'], 'k steps', 1e-3)}"
            f"\n{row['summary'][name]['solved']} of {result['rounds']} solved"
            for row in rows
        ]
    labels = dict.fromkeys(name for row in rows for name in row["ratios"])
    for label in labels:
        lines[label] = [times(row["ratios"].get(label)) for row in rows]
    columns = [f"{row['preset']} to {load_preset(row['preset']).evaluation.target_return:g}" for row in rows]
    return compare.table(result, "From process start to the target", columns, lines)


def times(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    text = f"{'≥ ' * found['at_least']}{found['ratio']:.1f}"
    if wanted := found.get("target"):
        text += f"\n{wanted['sign']} {wanted['limit']:g}: {'met' if wanted['met'] else 'NOT MET'}"
    return text


if __name__ == "__main__":
    main()
