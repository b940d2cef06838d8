"""One update of ours beside those of other projects and beside what this machine can do.

    tests/benchmarks/setup.sh && .venv/bin/python -m tests.benchmarks.learner [--rounds 5] [--networks ...] [--json]

Every round starts these jobs one after the other, each of one thread per rank: `hvd-dqn bench learner`, the same under
`horovodrun -np 2`, Stable-Baselines3's `DQN.train`, Tianshou's `DQN.update`, the same update as a JAX `lax.scan` (the limit for
one process), and the matrix products of the update alone (the floor: their operations at the machine's rate for their shapes).
Networks, batch, Adam, Huber loss, clipping to a gradient norm of 10 and the updates between two copies into the target network
are equal; double Q-learning is off. What differs: SB3 and Tianshou draw a batch inside every update, so the ratios to them have
our sampling included; Tianshou also asks the online network for the next observations, which its DQN always does; ours and
JAX's get K batches at once. Ratios are formed within a round; their median is given with the lowest and the highest.
"""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from hvd_dqn.bench.learner import LEARNER_CASES
from tests.benchmarks import compare
from tests.benchmarks.compare import Round, cell, ratio, spread, target

PEERS = ("sb3", "tianshou", "jax", "floor")
REPEATS = 5  # of each peer, within a round
# The ratio's name, what is above, what is below, and the limits by network.
RATIOS = {
    "ours over JAX": ("ours", "jax", "≤", {"mlp-64-64": 1.5, "mlp-256-256": 1.5}),
    "ours over JAX, both sampling": ("ours, sampling", "jax, sampling", "≤", {}),
    "ours over the floor": ("ours", "floor", "≤", {"nature-cnn": 1.4}),
    "ours over the floor at peak": ("ours", "floor at peak", "≤", {}),
    "times as fast as SB3": ("sb3", "ours, sampling", "≥", {"mlp-64-64": 8.0, "mlp-256-256": 5.0, "nature-cnn": 1.4}),
    "times as fast as Tianshou": ("tianshou", "ours, sampling", "≥", {}),
    "two ranks over one": ("ours, two ranks", "ours", "≤", {}),
}


def main() -> None:
    parser = compare.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=list(LEARNER_CASES), default=list(LEARNER_CASES))
    options = parser.parse_args()
    cases = {name: LEARNER_CASES[name]._asdict() for name in options.networks}
    request = {"what": "learner", "repeats": REPEATS, "cases": cases}
    jobs = {
        "one": lambda: compare.ours("bench", "learner", "--json"),
        "two": lambda: compare.ours("bench", "learner", "--json", ranks=2),
        **{name: lambda name=name: compare.peer(name, request) for name in compare.present(PEERS)},
    }
    made = compare.rounds(jobs, options.rounds)
    result = compare.told("learner", made, results=[summary(name, made) for name in options.networks])
    # What is under the numbers: both forms of the JAX update, and the rate of the matrix products.
    result["jax_forms"] = [r["jax"]["forms"] for r in made if "jax" in r]
    result["products"] = [r["floor"]["products"] for r in made if "floor" in r]
    compare.tell(result, table(result), options.json)


def microseconds(network: str, made: Sequence[Round]) -> dict[str, list[float]]:
    """By job, one number for each round."""

    def ours(job: str, what: str) -> list[float]:
        rows = (next(row for row in r[job]["results"] if row["network"] == network) for r in made)
        return [row[what]["median"] for row in rows]

    found = {
        "ours": ours("one", "microseconds_per_update"),
        "ours, sampling": ours("one", "microseconds_with_sampling"),
        "ours, two ranks": ours("two", "microseconds_per_update"),
    }
    theirs = {
        "sb3": ("sb3", "microseconds"),
        "tianshou": ("tianshou", "microseconds"),
        "jax": ("jax", "microseconds"),
        "jax, sampling": ("jax", "microseconds_with_sampling"),
        "floor": ("floor", "microseconds"),
        "floor at peak": ("floor", "microseconds_at_peak"),
    }
    return found | {
        name: [r[job][what][network] for r in made] for name, (job, what) in theirs.items() if job in made[0]
    }


def summary(network: str, made: Sequence[Round]) -> dict[str, Any]:
    times, case = microseconds(network, made), LEARNER_CASES[network]
    ratios: dict[str, Any] = {}
    for name, (above, below, sign, limits) in RATIOS.items():
        if above in times and below in times:
            ratios[name] = ratio(times[above], times[below])
            if network in limits:
                ratios[name]["target"] = target(sign, limits[network], ratios[name])
    return {
        "network": network,
        "batch": case.batch,
        "updates_per_phase": case.updates,
        "microseconds": {name: spread(values) for name, values in times.items()},
        "ratios": ratios,
    }


def table(result: dict[str, Any]) -> Table:
    rows = result["results"]
    lines = {name: [cell(row["microseconds"][name]) for row in rows] for name in rows[0]["microseconds"]}
    lines |= {name: [cell(row["ratios"][name], ".2f") for row in rows] for name in rows[0]["ratios"]}
    return compare.table(result, "µs per update", [row["network"] for row in rows], lines)


if __name__ == "__main__":
    main()
