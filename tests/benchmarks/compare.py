"""What the comparisons share: starting each job, medians and spreads within rounds, and the table."""

import argparse
import json
import re
import shlex
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import print as show
from rich.table import Table

from hvd_dqn.bench.results import provenance
from tests.ranks import ROOT, run

HERE = Path(__file__).parent
PEERS = HERE / "peers"
PYTHON = HERE / ".peers/bin/python"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
# What each script cannot do without, by the name of its package.
NEEDS = {
    "sb3": "stable-baselines3", "tianshou": "tianshou", "rllib": "ray", "jax": "jax", "floor": "torch",
}  # fmt: skip
SCRIPTS = {"tianshou": "tianshou_dqn.py", "jax": "jax_scan.py"}
TIMEOUT = 7200

Job = Callable[[], dict[str, Any]]
Round = Mapping[str, dict[str, Any]]


def arguments(description: str | None) -> argparse.ArgumentParser:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that `run` ends what it has started
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def present(wanted: Iterable[str]) -> list[str]:
    """Those of the wanted peers that are installed; tells which are left out."""
    found = []
    asked = "import sys, importlib.metadata as m; m.version(sys.argv[1])"
    for peer in wanted:
        if PYTHON.exists() and run([PYTHON, "-c", asked, NEEDS[peer]]).returncode == 0:
            found.append(peer)
        else:
            print(f"{peer} is left out: {NEEDS[peer]} is not in {PYTHON.parent.parent}: tests/benchmarks/setup.sh installs it.",
                  file=sys.stderr)  # fmt: skip
    return found


def answer(command: Sequence[str | Path], **env: str) -> dict[str, Any]:
    """Runs `command` with one thread per rank and reads the JSON object that it prints."""
    done = run(command, timeout=TIMEOUT, **ONE_THREAD, **env)
    # horovodrun names the rank before every piece of output that arrives, within a line too.
    out = re.sub(r"\[\d+,\d+\]<stdout>: ?", "", done.stdout)
    found = re.search(r"^\{.*\}", out, re.MULTILINE)
    if done.returncode or not found:
        raise RuntimeError(
            f"{shlex.join(map(str, command))[:300]} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return json.loads(found.group())


def ours(*words: str, ranks: int = 1) -> dict[str, Any]:
    launcher = ["horovodrun", "-np", str(ranks)] if ranks > 1 else []
    return answer([*launcher, "hvd-dqn", *words])


def peer(name: str, request: Mapping[str, Any]) -> dict[str, Any]:
    # The peers see our package for its replay and its environment of images, which need no TensorFlow.
    return answer([PYTHON, PEERS / SCRIPTS.get(name, f"{name}.py"), json.dumps(request)], PYTHONPATH=str(ROOT))


def rounds(jobs: Mapping[str, Job], count: int) -> list[Round]:
    """Every round runs every job, one at a time; the first of a round is the second of the one before."""
    names, made = list(jobs), []
    for i in range(count):
        results = {}
        for name in turned(names, i):
            print(f"round {i + 1} of {count}: {name}", file=sys.stderr, flush=True)
            results[name] = jobs[name]()
        made.append(results)
    return made


def turned(names: Sequence[str], count: int) -> list[str]:
    """The same names in a circle, beginning `count` later."""
    first = count % len(names)
    return [*names[first:], *names[:first]]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of ratios that were formed within rounds."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def target(sign: str, limit: float, found: Mapping[str, float]) -> dict[str, Any]:
    met = found["median"] >= limit if sign == "≥" else found["median"] <= limit
    return {"sign": sign, "limit": limit, "met": met}


def told(benchmark: str, made: Sequence[Round] = (), **fields: Any) -> dict[str, Any]:
    """The result with all that its numbers must be told with."""
    answers = [result for a_round in made for result in a_round.values()]
    versions = {name: number for result in answers for name, number in result.get("versions", {}).items()}
    # Several where somebody changed the code while this ran.
    commits = sorted({result["commit"] for result in answers if "commit" in result})
    origin = provenance()
    return {
        "benchmark": benchmark,
        **origin,
        "commit": ", ".join(commits) or origin["commit"],
        "threads": 1,
        "command": shlex.join(["python", "-m", f"tests.benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "peers": versions,
        "rounds": len(made),
        **fields,
    }


def cell(found: Mapping[str, Any], form: str = ",.0f") -> str:
    """`12 (11 - 13)`, and whether the target is met, where there is one."""
    text = f"{found['median']:{form}} ({found['low']:{form}} - {found['high']:{form}})"
    if wanted := found.get("target"):
        text += f"\n{wanted['sign']} {wanted['limit']:g}: {'met' if wanted['met'] else 'NOT MET'}"
    return text


def table(result: Mapping[str, Any], title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    machine = result["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    measured = f"median (lowest - highest) of {result['rounds']}; {peers or 'no peers'}"
    made = Table(
        title=f"{title}, one thread per rank, {machine['cpu']} ({machine['cores']} cores)",
        caption=f"{measured}; commit {result['commit']}: {result['command']}",
        title_justify="left",
        caption_justify="left",
    )
    made.add_column("")
    for name in columns:
        made.add_column(name, justify="right")
    for label, cells in rows.items():
        made.add_row(label, *cells)
    return made


def tell(result: dict[str, Any], made: Table, as_json: bool) -> None:
    print(json.dumps(result)) if as_json else show(made)
