"""What many ranks would reach, from measurements of few: fits the cost model, checks it, and computes."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from hvd_dqn.bench.jobs import apart, check_launcher, together
from hvd_dqn.bench.loop import CASES, settings
from hvd_dqn.bench.projection import (
    Line,
    Network,
    Phase,
    at_batch,
    batch_for,
    cost,
    efficiency,
    fit_line,
    fit_network,
)
from hvd_dqn.bench.results import provenance, rate
from hvd_dqn.bench.scaling import mean_phase, scaling
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.placement import cores

TARGET = 0.9
# What is taken from each benchmark's result, and from each of its rows.
FIELDS = {
    "loop": (("commit", "machine", "ranks"), ("case", "batch", "envs", "phase")),
    "allreduce": (("commit", "machine", "ranks"), ("bytes", "horovod")),
    "scaling": (
        ("commit", "machine"),
        ("case", "ranks", "scaling", "sync", "batch", "envs", "oversubscribed", "efficiency", "phase"),
    ),
}
MOST_BYTES = 30e6  # a case sends 20 MB at most; of larger messages, which no cache holds, the line need not know
Results = Sequence[dict[str, Any]]


def project(
    case: str,
    ranks: int = 512,
    *,
    sync: str = "gradients",
    files: Sequence[Path] = (),
    latency: float | None = None,
    bandwidth: float | None = None,
    rounds: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The efficiency of up to `ranks` ranks, each with the case's batch, and the batch at which `TARGET` is reached.

    From `files` of `bench loop`, `allreduce` and `scaling`; without, measures all that now. A network of this `latency`
    (µs) and `bandwidth` (GB/s) takes the place of the measured one for the projection, not for the checks.
    """
    settings(case, 1)
    if ranks < 2 or rounds < 1 or not all(value is None or value > 0 for value in (latency, bandwidth)):
        raise InputError(
            "--ranks must be at least 2, --rounds at least 1, and --latency and --bandwidth above 0. "
            f"Received: {ranks}, {rounds}, {latency} and {bandwidth}."
        )
    measured = [_read(path) for path in files] if files else measure(case, sync, rounds, say)
    machine, *others = [result["machine"] for result in measured]
    if any(other != machine for other in others):
        raise InputError(
            f"--files must all be of one machine. Received: {machine} and {next(o for o in others if o != machine)}."
        )
    base, points = work_points(case, measured)
    fitted_on = _held_out(sorted({batch for batch, _ in points}))
    per_update = fit_line([point for point in points if point[0] in fitted_on])
    network, sizes = _network(measured)
    checks = [
        *_check_batches(points, fitted_on, per_update),
        *_check_sizes(measured, sizes, network),
        *_check_jobs(case, sync, measured, base, per_update, network),
    ]
    projected = elsewhere(network, latency, bandwidth)
    phase = at_batch(base, per_update, base.batch)
    return {
        "benchmark": "project",
        **provenance(),
        "machine": machine,
        "measured_at": sorted({result["commit"] for result in measured}),
        "threads": 1,
        "case": case,
        "sync": sync,
        "measured_ranks": _allreduces(measured)["ranks"],
        "fit": {
            "seconds_per_update": per_update._asdict(),
            "batches": fitted_on,
            "network": network._asdict(),
            "bytes": sizes,
            "phase": base._asdict(),
        },
        "network": projected._asdict(),
        "checks": checks,
        "results": [_row(n, phase, per_update, projected, sync) for n in _powers(ranks)],
    }


def measure(case: str, sync: str, rounds: int, say: Callable[[str], None]) -> Results:
    """What the model needs, on this machine: three batches, all-reduces, and jobs to check it with."""
    check_launcher()
    if cores() < 2:
        raise InputError(
            "What is computed rests on two ranks with a core each, and this process may use one. Measure elsewhere with "
            "`bench loop`, `allreduce` and `scaling --json`, and give --files."
        )
    batch, found = CASES[case].settings["learner"]["batch_size"], []
    for i in range(rounds):
        for other in (2 * batch, 4 * batch):  # with half of it phases would not be of as many updates
            say(f"round {i + 1} of {rounds}: two processes that do not talk, batch {other}")
            found += apart(2, ["loop", case, "--batch", str(other)])
    say("all-reduces of two ranks")
    found.append(together(2, ["allreduce"]))
    found.append(scaling(case, (2,), syncs=(sync,), scalings=("weak", "strong"), rounds=rounds, say=say))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        # Before and after the JSON may stand what horovodrun writes around the lines of a rank.
        result, _ = json.JSONDecoder().raw_decode(text[max(text.find("{"), 0) :])
        if result["benchmark"] in FIELDS:
            needed, of_row = FIELDS[result["benchmark"]]
            for name, place in [(n, result) for n in needed] + [(n, row) for row in result["results"] for n in of_row]:
                place[name]
            return result
        came = f"the result of bench {result['benchmark']}"
    except (OSError, UnicodeDecodeError) as error:
        came = str(error)
    except (ValueError, KeyError, TypeError) as error:
        came = f"{type(error).__name__}: {error}"
    raise InputError(f"--files takes what `bench loop`, `allreduce` and `scaling` print with --json. {path}: {came}.")


def work_points(case: str, measured: Results) -> tuple[Phase, list[tuple[float, float]]]:
    """The phase of a rank with the case's own batch, and (batch, seconds per update) of ranks alone on a core of theirs."""
    rows = []
    for result in measured:
        if result["benchmark"] == "loop" and result["ranks"] == 1:
            rows += result["results"]
        elif result["benchmark"] == "scaling":
            rows += [row for row in result["results"] if not row["oversubscribed"]]
    rows = [row for row in rows if row["case"] == case]
    own, envs = CASES[case].settings["learner"]["batch_size"], CASES[case].settings["env"]["envs_per_rank"]
    # Beside as many others as a core each allows: that is how ranks are.
    most = max((row.get("ranks", 1) for row in rows if row["batch"] == own), default=0)
    same = [row["phase"] for row in rows if row["batch"] == own and row.get("ranks", 1) == most]
    if not same:
        raise InputError(
            f"The files say nothing of one rank's {case} with its own batch of {own}: add "
            f"`hvd-dqn bench scaling --case {case} --json` or `hvd-dqn bench loop {case} --json`."
        )
    mean = mean_phase(same)
    phase = Phase(own, round(mean["updates"]), mean["seconds"], mean["least"], mean["deviation"], mean["message_bytes"])
    alike = [row["phase"]["updates"] for row in rows if row["batch"] == own]
    points = [(float(own), each["seconds"] / each["updates"]) for each in same]
    points += [
        (float(row["batch"]), row["phase"]["seconds"] / row["phase"]["updates"])
        for row in rows
        # Others' phases are another mixture of steps and updates.
        if row["batch"] != own and row["envs"] == envs and math.isclose(row["phase"]["updates"], alike[0])
    ]
    return phase, points


def _held_out(values: Sequence[float]) -> list[float]:
    """Those to fit to: all but every second one inside, which are for checking."""
    return [value for i, value in enumerate(values) if i % 2 == 0 or i == len(values) - 1]


def _allreduces(measured: Results) -> dict[str, Any]:
    for result in measured:
        if result["benchmark"] == "allreduce":
            return result
    raise InputError("The files hold no all-reduces: add `horovodrun -np 2 hvd-dqn bench allreduce --json`.")


def _network(measured: Results) -> tuple[Network, list[float]]:
    result = _allreduces(measured)
    rows = {row["bytes"]: row for row in result["results"]}
    sizes = _held_out(sorted(size for size in rows if size <= MOST_BYTES))
    horovod = {size: rows[size]["horovod"]["seconds"]["median"] for size in sizes}
    raw = {size: rows[size]["mpi"]["seconds"]["median"] for size in sizes if "mpi" in rows[size]}
    return fit_network(result["ranks"], horovod, raw), sizes


def elsewhere(network: Network, latency: float | None, bandwidth: float | None) -> Network:
    """The network with another latency (µs) and bandwidth (GB/s)."""
    hop = network.latency if latency is None else 1e-6 * latency
    seconds_per_byte = network.seconds_per_byte if bandwidth is None else 1e-9 / bandwidth
    return Network(hop, seconds_per_byte, network.overhead)


def _check(what: str, measured: float, computed: float, unit: str) -> dict[str, Any]:
    error = computed - measured if unit == "%" else 100 * (computed / measured - 1)
    return {"what": what, "measured": measured, "computed": computed, "unit": unit, "error": error}


def _check_batches(points: Iterable[tuple[float, float]], fitted: Sequence[float], line: Line) -> list[dict[str, Any]]:
    held: dict[float, list[float]] = {}
    for batch, seconds in points:
        if batch not in fitted:
            held.setdefault(batch, []).append(1e6 * seconds)
    return [
        _check(f"one rank's update, batch {batch:g}", float(np.mean(found)), 1e6 * line(batch), "µs")
        for batch, found in sorted(held.items())
    ]


def _check_sizes(measured: Results, fitted: Sequence[float], network: Network) -> list[dict[str, Any]]:
    result = _allreduces(measured)
    return [
        _check(
            f"all-reduce of {row['bytes']:,} B, {result['ranks']} ranks",
            1e6 * row["horovod"]["seconds"]["median"],
            1e6 * network.allreduce(result["ranks"], row["bytes"]),
            "µs",
        )
        for row in result["results"]
        if row["bytes"] not in fitted
    ]


def _check_jobs(
    case: str, sync: str, measured: Results, base: Phase, per_update: Line, network: Network
) -> list[dict[str, Any]]:
    """Jobs of several ranks: none of them was used for the fit. Those with more ranks than cores are another matter."""
    rows = [row for result in measured if result["benchmark"] == "scaling" for row in result["results"]]
    return [
        _check(
            f"efficiency of {row['ranks']} ranks, {row['scaling']}, batch {row['batch']}",
            100 * row["efficiency"]["median"],
            100 * efficiency(cost(at_batch(base, per_update, row["batch"]), network, row["ranks"], sync)),
            "%",
        )
        for row in rows
        if row["case"] == case and row["sync"] == sync and row["ranks"] > 1 and not row["oversubscribed"]
    ]


def _powers(ranks: int) -> list[int]:
    powers = [2**i for i in range(ranks.bit_length())]
    return powers if powers[-1] == ranks else [*powers, ranks]


def _row(ranks: int, phase: Phase, per_update: Line, network: Network, sync: str) -> dict[str, Any]:
    parts = cost(phase, network, ranks, sync)
    reached = efficiency(parts)
    return {
        "ranks": ranks,
        "efficiency": reached,
        "times_one_rank": ranks * reached,
        "seconds": parts,
        "batch_for_target": batch_for(TARGET, phase, per_update, network, ranks, sync),
    }


def table(result: dict[str, Any]) -> RenderableType:
    """The result of `project` for people: the projection, how far measured jobs are from it, and what it assumes."""
    fit, network, phase = result["fit"], result["network"], result["fit"]["phase"]
    made = Table(title=f"{result['case']}, {phase['batch']} transitions per update on each rank", title_justify="left")
    for heading in ("ranks", "efficiency", "times one rank", "work", "waiting", "talking", f"batch for {TARGET:.0%}"):
        made.add_column(heading, justify="right")
    for row in result["results"]:
        whole = sum(row["seconds"].values())
        shares = (f"{100 * row['seconds'][name] / whole:.0f} %" for name in ("work", "waiting", "talking"))
        batch = row["batch_for_target"]
        made.add_row(
            str(row["ranks"]), f"{row['efficiency']:.0%}", rate(row["times_one_rank"]), *shares,
            "none" if batch is None else f"{batch:,}",
        )  # fmt: skip
    checked = Table(title="Measured, and not used for the fit", title_justify="left")
    checked.add_column("what")
    for heading in ("measured", "computed", "error"):
        checked.add_column(heading, justify="right")
    for row in result["checks"]:
        of = "points" if row["unit"] == "%" else "%"
        numbers = (f"{row[name]:,.4g} {row['unit']}" for name in ("measured", "computed"))
        checked.add_row(row["what"], *numbers, f"{row['error']:+.1f} {of}")
    per_update, times = fit["seconds_per_update"], result["results"][-1]["ranks"] / result["measured_ranks"]
    assumes = (
        f"An update takes {1e6 * per_update['fixed']:,.0f} µs + {1e6 * per_update['slope']:.3g} µs per transition; "
        f"a hop {1e6 * network['latency']:,.3g} µs + {1e-9 / max(network['seconds_per_byte'], 1e-15):.3g} GB/s; Horovod "
        f"{1e6 * network['overhead']:,.3g} µs and two small all-reduces more; {phase['updates']} updates of "
        f"{phase['message']:,} B in each phase of {1e3 * phase['seconds']:.3g} ms. Assumed: each rank has a core of its own "
        "and is as fast as those measured; any two ranks are as near as these (else give --latency and --bandwidth); ranks "
        "are late independently of each other, by gamma distributed times; nothing is sent while a rank computes, and "
        "Horovod's thread takes no time from it; phases of ranks that average gradients take as long as those of one alone, "
        "which XLA may compile. "
        f"From {result['measured_ranks']} ranks on {result['machine']['cores']} cores to {result['results'][-1]['ranks']} "
        f"is {times:,.0f} times as far as was measured. averaging: {result['sync']}; measured at commit "
        f"{', '.join(result['measured_at'])}, computed at {result['commit']}: {result['command']}"
    )
    return Group(made, checked if result["checks"] else "Nothing was measured that could check it.", assumes)
