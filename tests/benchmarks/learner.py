"""The learner against Stable-Baselines3's `DQN.train`, and two ranks against one, on this machine.

    tests/benchmarks/setup.sh && .venv/bin/python -m tests.benchmarks.learner [--rounds 5] [--json]

Every round starts three jobs, one after the other, each of one thread per rank: SB3, `hvd-dqn bench learner`, and the
same under `horovodrun -np 2`. Networks, batch, Adam, Huber loss, clipping to a gradient norm of 10 and the updates
between two copies into the target network are equal; double Q-learning is off on both sides. SB3 draws a batch inside
every update, so the ratio that counts has our sampling included; the one without is reported beside it. Ratios are
formed within a round; their median over rounds is given with the lowest and the highest.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import print as show
from rich.table import Table

from hvd_dqn.bench import CASES, provenance
from tests.ranks import run

HERE = Path(__file__).parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
OURS = ("hvd-dqn", "bench", "learner", "--json")
PEER_REPEATS = 5
# At least so many times as many updates per second as SB3, and at most so many times one rank's time on two ranks.
TARGETS = {"mlp-64-64": (5.0, None), "mlp-256-256": (4.0, 1.6), "nature-cnn": (1.0, None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    peers = HERE / ".peers" / "bin" / "python"
    if not peers.exists():
        sys.exit(f"{peers} does not exist: run tests/benchmarks/setup.sh first.")
    rounds = []
    for i in range(options.rounds):
        print(f"round {i + 1} of {options.rounds}", file=sys.stderr, flush=True)
        rounds.append(one_round(peers))
    result = summary(rounds)
    print(json.dumps(result)) if options.json else show(table(result))


def one_round(peers: Path) -> dict[str, Any]:
    request = {"repeats": PEER_REPEATS, "cases": {name: case._asdict() for name, case in CASES.items()}}
    return {
        "sb3": answer([peers, HERE / "peer.py", json.dumps(request)]),
        "one": answer(OURS),
        "two": answer(["horovodrun", "-np", "2", *OURS]),
    }


def answer(command: Sequence[str | Path]) -> dict[str, Any]:
    """Runs `command` and reads the JSON object that it prints."""
    done = run(command, **ONE_THREAD)
    # horovodrun names the rank before every piece of output that arrives, within a line too.
    out = re.sub(r"\[\d+,\d+\]<stdout>: ?", "", done.stdout)
    found = re.search(r"\{.*\}", out)
    if done.returncode or not found:
        sys.exit(
            f"{' '.join(map(str, command[:4]))} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return json.loads(found.group())


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def ours(a_round: dict[str, Any], job: str, network: str, what: str) -> float:
        return next(row for row in a_round[job]["results"] if row["network"] == network)[what]["median"]

    results = []
    for name, case in CASES.items():
        sb3 = [r["sb3"]["microseconds"][name] for r in rounds]
        one, one_sampled, two, two_sampled = (
            [ours(r, job, name, what) for r in rounds]
            for job in ("one", "two")
            for what in ("microseconds_per_update", "microseconds_with_sampling")
        )
        results.append(
            {
                "network": name,
                "batch": case.batch,
                "updates_per_phase": case.updates,
                "microseconds": {
                    "sb3": spread(sb3),
                    "one_rank": spread(one),
                    "one_rank_with_sampling": spread(one_sampled),
                    "two_ranks": spread(two),
                    "two_ranks_with_sampling": spread(two_sampled),
                },
                "sb3_over_ours_with_sampling": spread(ratios(sb3, one_sampled)),
                "sb3_over_ours_without_sampling": spread(ratios(sb3, one)),
                "two_ranks_over_one": spread(ratios(two, one)),
                "targets": {"sb3_over_ours": TARGETS[name][0], "two_ranks_over_one": TARGETS[name][1]},
            }
        )
    return {
        "benchmark": "learner against Stable-Baselines3",
        **provenance(),
        # Several where somebody changed the code while this ran.
        "commit": ", ".join(sorted({r[job]["commit"] for r in rounds for job in ("one", "two")})),
        "threads": 1,
        "command": " ".join(["python -m tests.benchmarks.learner", *sys.argv[1:]]),
        "peers": rounds[0]["sb3"]["versions"],
        "rounds": len(rounds),
        "results": results,
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def table(result: dict[str, Any]) -> Table:
    machine = result["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    measured = f"median (lowest - highest) of {result['rounds']} rounds; {peers}"
    made = Table(
        title=f"µs per update, one thread per rank, {machine['cpu']} ({machine['cores']} cores)",
        caption=f"{measured}; commit {result['commit']}: {result['command']}",
        title_justify="left",
        caption_justify="left",
    )
    made.add_column("")
    for row in result["results"]:
        made.add_column(row["network"], justify="right")

    def add(label: str, *names: str, form: str = ",.0f", target: str = "", sign: str = "") -> None:
        cells = []
        for row in result["results"]:
            value: Any = row
            for name in names:
                value = value[name]
            wanted = row["targets"].get(target)
            cell = f"{value['median']:{form}} ({value['low']:{form}} - {value['high']:{form}})"
            cells.append(f"{cell}, wanted {sign} {wanted:g}" if wanted else cell)
        made.add_row(label, *cells)

    add("SB3, sampling included", "microseconds", "sb3")
    add("ours, sampling included", "microseconds", "one_rank_with_sampling")
    add("ours, the update alone", "microseconds", "one_rank")
    add("ours, two ranks", "microseconds", "two_ranks")
    add("times as fast as SB3", "sb3_over_ours_with_sampling", form=".2f", target="sb3_over_ours", sign="≥")
    add("without our sampling", "sb3_over_ours_without_sampling", form=".2f")
    add("two ranks over one", "two_ranks_over_one", form=".2f", target="two_ranks_over_one", sign="≤")
    return made


if __name__ == "__main__":
    main()
