"""What more ranks cost in learning: total steps until a preset's target is reached, on 1, 2, 4 and 8 ranks.

    python -m tests.benchmarks.steps [--presets ...] [--ranks 1 2 4 8] [--seeds 1 2 3 4 5] [--out DIR] [--json]

The rule is that by which `hvd-dqn train` stops: an evaluation of 20 episodes reaches the target and one of 100 confirms it. A
run that never gets there counts as infinitely many steps, null in the JSON. Weak scaling keeps environments and batch per rank,
strong scaling divides them; what the settings do not allow is left out and named. Steps do not depend on time: more ranks than
cores are as good, and the machine may be busy. A finished run is kept in --out, with the commit that made it, and not repeated.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hvd_dqn.config import Config
from hvd_dqn.config_files import load_preset, presets
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.placement import cores
from hvd_dqn.storage.run_directory import Run
from hvd_dqn.training.plan import Plan
from tests.benchmarks import compare, solve
from tests.benchmarks.solve import median, shown
from tests.learning.table import trained

MANY = 8
TARGETS = {"strong": 1.1, "weak": 1.25}  # at most so many times the steps of one rank, on MANY


def main() -> None:
    parser = compare.arguments(__doc__)
    parser.add_argument("--presets", nargs="+", choices=list(presets()), default=["cartpole", "lunarlander"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, MANY])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("runs/steps"))
    options = parser.parse_args()
    rows, left_out = [], []
    for preset in options.presets:
        for ranks in sorted({1, *options.ranks}):
            for scaling in ("weak", "strong") if ranks > 1 else ("weak",):  # alone both are the same
                if not allowed(preset, ranks, scaling):
                    left_out.append(f"{preset}, {ranks} ranks, {scaling}")
                    continue
                print(f"{preset}: {ranks} ranks, {scaling}", file=sys.stderr, flush=True)
                runs = [reached(run) for run in trained(preset, ranks, scaling, options.seeds, options.out)]
                rows.append({"preset": preset, "ranks": ranks, "scaling": scaling, "runs": runs})
    result = compare.told("steps", seeds=options.seeds, left_out=left_out, results=summary(rows))
    commits = {run["commit"] for row in rows for run in row["runs"]}
    result |= {"rounds": len(options.seeds), "commit": ", ".join(sorted(commits))}
    compare.tell(result, table(result), options.json)


def allowed(preset: str, ranks: int, scaling: str) -> bool:
    """Whether so many ranks can carry out the preset: a batch, say, must divide, and not exceed what was collected."""
    given = load_preset(preset).model_dump()
    given["ranks"]["scaling"] = scaling
    try:
        Plan(Config.model_validate(given), ranks)
    except InputError:
        return False
    return True


def reached(run: Run) -> dict[str, Any]:
    about = run.about()
    steps = about["result"]["total_steps"] if solve.reached(run) else None
    return {"seed": about["seed"], "total_steps": steps, "commit": about.get("commit", "unknown")}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with medians, and with their ratios to one rank's; a ratio to or of infinity is none."""
    alone: dict[str, float] = {}
    made = []
    for row in rows:
        steps = [math.inf if run["total_steps"] is None else run["total_steps"] for run in row["runs"]]
        middle = statistics.median(steps)
        one = alone.setdefault(row["preset"], middle)  # one rank comes first
        ratio = middle / one if math.isfinite(one) else math.inf
        found: dict[str, Any] = {"ratio": ratio if math.isfinite(ratio) else None}
        if row["ranks"] == MANY:
            found["target"] = compare.target("≤", TARGETS[row["scaling"]], {"median": ratio})
        made.append(
            {
                **row,
                "oversubscribed": row["ranks"] > cores(),
                "total_steps": median(steps),
                "reached": sum(map(math.isfinite, steps)),
                "over_one_rank": found,
            }
        )
    return made


def table(result: dict[str, Any]) -> Table:
    names = list(dict.fromkeys(row["preset"] for row in result["results"]))
    lines: dict[str, dict[str, str]] = {}
    for row in result["results"]:
        label = f"{row['ranks']} ranks, {row['scaling']}" if row["ranks"] > 1 else "1 rank"
        text = f"{shown(row['total_steps'], 'k steps', 1e-3)}\n{row['reached']} of {len(row['runs'])} reached it"
        lines.setdefault(label, {})[row["preset"]] = text + (f"\n{over_one(row)}" if row["ranks"] > 1 else "")
    columns = [f"{name} to {load_preset(name).evaluation.target_return:g}" for name in names]
    cells = {label: [by_name.get(name, "left out") for name in names] for label, by_name in lines.items()}
    return compare.table(result, "Steps to the target", columns, cells)


def over_one(row: dict[str, Any]) -> str:
    found = row["over_one_rank"]
    text = "-" if found["ratio"] is None else f"{found['ratio']:.2f} times one rank's"
    if wanted := found.get("target"):
        text += f", {wanted['sign']} {wanted['limit']:g}: {'met' if wanted['met'] else 'NOT MET'}"
    return text


if __name__ == "__main__":
    main()
