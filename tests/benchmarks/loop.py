"""Environment steps and updates per second of whole training, ours and other projects', at equal settings.

    tests/benchmarks/setup.sh && .venv/bin/python -m tests.benchmarks.loop [--rounds 5] [--cases ...] [--peers ...] [--json]

The settings are those of `hvd-dqn bench loop`: `cartpole-zoo` (one environment, 128 updates every 256 steps, as in
Stable-Baselines3's zoo), `cartpole-16` and `pixels` (16 environments, an update per 4 steps). Every round runs ours on one
rank, ours on two (each rank with the environments and the batch of one: their steps are added up), Stable-Baselines3, Tianshou
and RLlib, one after the other, one thread per process. All are timed from their own first updates on, without evaluations
and checkpoints.

What differs: every project steps cheap environments as it recommends, 16 of ours by Gymnasium's vector class of CartPole, SB3
by DummyVecEnv, Tianshou by DummyVectorEnv, RLlib in as many worker processes as there are cores and environments, so that ours
on two ranks stands beside it too. RLlib takes a few more steps per update than it is asked for: updates per step, in batches of
one rank, are in the table. Tianshou asks the online network for the next observations too. The target network of SB3 and
Tianshou stays as it is within a phase of updates, ours is copied at any update. At 64-64 ours is compiled by XLA on one rank,
as in runs of 50,000 updates, which compiling outside of what is timed stands for. `--total-steps` are a job's, on one rank.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from hvd_dqn.bench.loop import TRAINING_CASES, case_config
from hvd_dqn.config import Config
from tests.benchmarks import compare
from tests.benchmarks.compare import Round, cell, ratio, spread, target

PEERS = ("sb3", "tianshou", "rllib")
RATES = ("steps_per_second", "updates_per_second")
TARGETS = {"cartpole-zoo": {"ours over sb3": 6.0}}  # at least


def main() -> None:
    parser = compare.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=list(TRAINING_CASES), default=list(TRAINING_CASES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--total-steps", type=int, help="of each job on one rank; default: the case's own")
    options = parser.parse_args()
    peers = compare.present(options.peers)
    results, every = [], []
    for case in options.cases:
        made = compare.rounds(jobs(case, peers, options.total_steps), options.rounds)
        results.append(summary(case, made))
        every += made
    result = compare.told("loop", every, results=results) | {"rounds": options.rounds}
    compare.tell(result, table(result), options.json)


def jobs(case: str, peers: Sequence[str], total_steps: int | None) -> dict[str, compare.Job]:
    config = case_config(case, 1, total_steps=total_steps)

    def ours(ranks: int) -> dict[str, Any]:
        words = ["bench", "loop", case, "--json", "--total-steps", str(ranks * config.total_steps)]
        found = compare.ours(*words, ranks=ranks)
        return found["results"][0] | {"commit": found["commit"]}

    request = {"what": "loop", **job(config)}
    return {
        "ours": lambda: ours(1),
        "ours, two ranks": lambda: ours(2),
        **{name: lambda name=name: compare.peer(name, request) for name in peers},
    }


def job(config: Config) -> dict[str, Any]:
    """The fields of the peers' Job, of a run on one rank. Their loss is Huber's, gamma 0.99, Adam's epsilon their own."""
    learner = config.learner
    return {
        "env": config.env.id,
        "envs": config.env.envs_per_rank,
        "image": config.agent.network == "cnn",
        "hidden": list(config.agent.hidden),
        "learning_rate": learner.learning_rate,
        "batch": learner.batch_size,
        "capacity": config.replay.capacity,
        "learn_start": learner.learn_start,
        "train_period": learner.train_period,
        "updates": round(learner.train_period * learner.samples_per_insert / learner.batch_size),
        "target_period": learner.target_period,
        "epsilon_end": config.agent.epsilon_end,
        "epsilon_steps": config.agent.epsilon_steps,
        "total_steps": config.total_steps,
        "seed": config.seed,
    }


def summary(case: str, made: Sequence[Round]) -> dict[str, Any]:
    rates = {name: {what: [r[name][what] for r in made] for what in RATES} for name in made[0]}
    ratios = {}
    for name in made[0]:
        if name not in ("ours", "ours, two ranks"):
            for mine in ("ours", "ours, two ranks") if name == "rllib" else ("ours",):
                ratios[f"{mine} over {name}"] = ratio(rates[mine][RATES[0]], rates[name][RATES[0]])
    for name, limit in TARGETS.get(case, {}).items():
        if name in ratios:
            ratios[name]["target"] = target("≥", limit, ratios[name])
    ratios["two ranks over one"] = ratio(rates["ours, two ranks"][RATES[0]], rates["ours"][RATES[0]])
    return {
        "case": case,
        "rates": {name: {what: spread(values) for what, values in each.items()} for name, each in rates.items()},
        "updates_per_step": {
            name: statistics.median(ranks(name) * r[name]["updates"] / r[name]["total_steps"] for r in made)
            for name in made[0]
        },
        "ratios": ratios,
        "runs": made,
    }


def ranks(name: str) -> int:
    return 2 if name == "ours, two ranks" else 1


def table(result: dict[str, Any]) -> Table:
    rows = result["results"]
    lines: dict[str, list[str]] = {}
    for name in rows[0]["rates"]:
        for what, unit in zip(RATES, ("steps/s", "updates/s"), strict=True):
            lines[f"{name}: {unit}"] = [cell(row["rates"][name][what]) for row in rows]
        lines[f"{name}: updates per step"] = [f"{row['updates_per_step'][name]:.3f}" for row in rows]
    lines |= {name: [cell(row["ratios"][name], ".2f") for row in rows] for name in rows[0]["ratios"]}
    return compare.table(result, "Whole training", [row["case"] for row in rows], lines)


if __name__ == "__main__":
    main()
