"""Whether the learning rate should grow with ranks that average parameters: steps to the target with and without.

    python -m tests.benchmarks.rates [--presets ...] [--ranks 2 4 8] [--seeds 1 2 3 4 5] [--out DIR] [--json]

Under `ranks.sync parameters` every update sees the minibatch of one rank, whatever their number, but the factor of
`ranks.learning_rate_scaling` counts all. So each preset is trained three ways, by weak scaling: averaging parameters with the
factor (`sqrt`) and without (`none`), and averaging gradients with it, for comparison. The rule is that of `steps`: a run that
never gets there counts as infinitely many steps, and the machine may be busy. A finished run is kept in --out, with the commit
that made it, and not repeated, so that this can be broken off and started again.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hvd_dqn.config_files import load_preset, presets
from hvd_dqn.ranks.placement import cores
from tests.benchmarks import compare
from tests.benchmarks.solve import median, shown
from tests.benchmarks.steps import reached
from tests.learning.table import trained

# Averaging, and how the learning rate grows.
WAYS = (("parameters", "sqrt"), ("parameters", "none"), ("gradients", "sqrt"))


def main() -> None:
    parser = compare.arguments(__doc__)
    parser.add_argument("--presets", nargs="+", choices=list(presets()), default=["cartpole", "lunarlander"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--total-steps", type=int, help="end runs after so many; by default the preset's")
    parser.add_argument("--out", type=Path, default=Path("runs/rates"))
    options = parser.parse_args()
    shorter = [] if options.total_steps is None else ["--total-steps", str(options.total_steps)]
    rows = []
    for preset in options.presets:
        for ranks in sorted(options.ranks):
            for sync, factor in WAYS:
                print(f"{preset}: {ranks} ranks, {sync}, {factor}", file=sys.stderr, flush=True)
                words = ["--ranks.sync", sync, "--ranks.learning-rate-scaling", factor, *shorter]
                out = options.out / "-".join([sync, factor, *shorter[1:]])
                runs = [reached(run) for run in trained(preset, ranks, "weak", options.seeds, out, words)]
                rows.append({"preset": preset, "ranks": ranks, "sync": sync, "factor": factor, "runs": runs})
    result = compare.told("rates", seeds=options.seeds, results=summary(rows))
    commits = {run["commit"] for row in rows for run in row["runs"]}
    result |= {"rounds": len(options.seeds), "commit": ", ".join(sorted(commits))}
    compare.tell(result, table(result), options.json)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with medians, and those with the factor with their ratio to the same without it; none of infinity."""
    middles = [
        statistics.median(math.inf if run["total_steps"] is None else run["total_steps"] for run in row["runs"])
        for row in rows
    ]
    without = {
        (row["preset"], row["ranks"], row["sync"]): middle
        for row, middle in zip(rows, middles, strict=True)
        if row["factor"] == "none"
    }
    made = []
    for row, middle in zip(rows, middles, strict=True):
        steps = [math.inf if run["total_steps"] is None else run["total_steps"] for run in row["runs"]]
        base = without.get((row["preset"], row["ranks"], row["sync"]))
        ratio = middle / base if base is not None and row["factor"] != "none" and math.isfinite(base) else math.inf
        made.append(
            {
                **row,
                "oversubscribed": row["ranks"] > cores(),
                "total_steps": median(steps),
                "reached": sum(map(math.isfinite, steps)),
                "over_none": ratio if math.isfinite(ratio) else None,
            }
        )
    return made


def table(result: dict[str, Any]) -> Table:
    names = list(dict.fromkeys(row["preset"] for row in result["results"]))
    lines: dict[str, dict[str, str]] = {}
    for row in result["results"]:
        label = f"{row['ranks']} ranks, {row['sync']}, {row['factor']}"
        text = f"{shown(row['total_steps'], 'k steps', 1e-3)}\n{row['reached']} of {len(row['runs'])} reached it"
        over = "" if row["over_none"] is None else f"\n{row['over_none']:.2f} times those without the factor"
        lines.setdefault(label, {})[row["preset"]] = text + over
    columns = [f"{name} to {load_preset(name).evaluation.target_return:g}" for name in names]
    cells = {label: [by_name.get(name, "left out") for name in names] for label, by_name in lines.items()}
    return compare.table(result, "Steps to the target", columns, cells)


if __name__ == "__main__":
    main()
