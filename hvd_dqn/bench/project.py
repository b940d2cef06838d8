"""Projects the efficiency of many ranks from measurements of few: fits a cost model, checks it, and computes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from hvd_dqn.bench import scaling
from hvd_dqn.bench.jobs import check_launcher, run_independently, run_job
from hvd_dqn.bench.loop import TRAINING_CASES, case_config
from hvd_dqn.bench.projection import (
    Interconnect,
    Line,
    PhaseTime,
    at_batch,
    batch_for,
    cost,
    efficiency,
    fit_interconnect,
    fit_line,
)
from hvd_dqn.bench.results import provenance, rate
from hvd_dqn.errors import InputError, tell
from hvd_dqn.ranks.placement import cores
from hvd_dqn.ranks.world import World

TARGET = 0.9
# What the projection reads of each benchmark's result, and of each of its rows.
FIELDS = {
    "loop": (("commit", "machine", "ranks"), ("case", "batch", "envs", "phase")),
    "allreduce": (("commit", "machine", "ranks"), ("bytes", "horovod")),
    "scaling": (
        ("commit", "machine"),
        ("case", "ranks", "scaling", "sync", "batch", "envs", "oversubscribed", "efficiency", "phase"),
    ),
}
MOST_BYTES = 30e6  # the largest message to fit: a case sends 20 MB at most, and larger ones exceed the caches
Results = Sequence[dict[str, Any]]
Points = Sequence[tuple[float, float]]  # batch, seconds per update


class Fit(NamedTuple):
    """The parts of the model, and the measurements they were fitted to. Other measurements check them."""

    phase: PhaseTime  # with the case's own batch
    per_update: Line  # seconds by batch
    batches: list[float]
    interconnect: Interconnect
    sizes: list[float]  # of messages, bytes

    def at_batch(self, batch: float) -> PhaseTime:
        return at_batch(self.phase, self.per_update, batch)


def measure(
    world: World,
    case: str,
    ranks: int,
    *,
    sync: str = "gradients",
    files: Sequence[Path] = (),
    latency: float | None = None,
    bandwidth: float | None = None,
    rounds: int = 3,
) -> dict[str, Any]:
    """The efficiency of up to `ranks` ranks with the batch of the case, and the batch per rank that reaches `TARGET`.

    Reads `files` that `bench loop`, `allreduce` and `scaling` made; without any, measures all that now. `latency` (µs) and
    `bandwidth` (GB/s) describe another interconnect for the projection; the checks keep the measured one.
    """
    case_config(case, 1)
    results = [_read(path) for path in files] if files else _measure_now(world, case, sync, rounds)
    machine, *others = [result["machine"] for result in results]
    if any(other != machine for other in others):
        raise InputError(
            f"--files must all be of one machine. Received: {machine} and {next(o for o in others if o != machine)}."
        )
    allreduce = next((result for result in results if result["benchmark"] == "allreduce"), None)
    if allreduce is None:
        raise InputError("The files hold no all-reduces: add `horovodrun -np 2 hvd-dqn bench allreduce --json`.")
    scaled = [row for result in results if result["benchmark"] == "scaling" for row in result["results"]]
    # The model does not describe ranks that share cores.
    scaled = [row for row in scaled if row["case"] == case and not row["oversubscribed"]]
    alone = [row for r in results if r["benchmark"] == "loop" and r["ranks"] == 1 for row in r["results"]]
    phase, points = _work_points(case, scaled + [row for row in alone if row["case"] == case])
    fit = _fit(phase, points, allreduce)
    jobs = [row for row in scaled if row["sync"] == sync and row["ranks"] > 1]
    projected = interconnect_with(fit.interconnect, latency, bandwidth)
    return {
        "benchmark": "project",
        **provenance(),
        "machine": machine,
        "measured_at": sorted({result["commit"] for result in results}),
        "threads": 1,
        "case": case,
        "sync": sync,
        "measured_ranks": allreduce["ranks"],
        "fit": {
            "seconds_per_update": fit.per_update._asdict(),
            "batches": fit.batches,
            "network": fit.interconnect._asdict(),
            "bytes": fit.sizes,
            "phase": fit.phase._asdict(),
        },
        "network": projected._asdict(),
        "checks": _checks(fit, points, allreduce, jobs, sync),
        "results": [_row(fit, projected, n, sync) for n in _powers(ranks)],
    }


def _measure_now(world: World, case: str, sync: str, rounds: int) -> Results:
    """What the model needs, on this machine: three batches, all-reduces, and jobs to check it with."""
    check_launcher()
    if cores() < 2:
        raise InputError(
            "The projection needs two ranks with a core each, but this process may use one. Measure elsewhere with "
            "`bench loop`, `allreduce` and `scaling --json`, and give --files."
        )
    batch, results = TRAINING_CASES[case].settings["learner"]["batch_size"], []
    for i in range(rounds):
        for larger in (2 * batch, 4 * batch):  # half the batch would change the number of updates in a phase
            tell(f"round {i + 1} of {rounds}: two independent processes, batch {larger}")
            results += run_independently(2, ["loop", case, "--batch", str(larger)])
    tell("all-reduces of two ranks")
    results.append(run_job(2, ["allreduce"]))
    results.append(scaling.measure(world, case, (2,), sync=sync, rounds=rounds))
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        # horovodrun writes the rank before and after the JSON.
        result, _ = json.JSONDecoder().raw_decode(text[max(text.find("{"), 0) :])
        if result["benchmark"] in FIELDS:
            of_result, of_row = FIELDS[result["benchmark"]]
            for name, place in [(n, result) for n in of_result] + [
                (n, row) for row in result["results"] for n in of_row
            ]:
                place[name]
            return result
        came = f"the result of bench {result['benchmark']}"
    except (OSError, UnicodeDecodeError) as error:
        came = str(error)
    except (ValueError, KeyError, TypeError) as error:
        came = f"{type(error).__name__}: {error}"
    raise InputError(f"--files takes what `bench loop`, `allreduce` and `scaling` print with --json. {path}: {came}.")


def _work_points(case: str, rows: Results) -> tuple[PhaseTime, Points]:
    """The phase of a rank with the case's own batch, and the seconds per update of ranks with a core of their own."""
    own, envs = (TRAINING_CASES[case].settings[s][n] for s, n in (("learner", "batch_size"), ("env", "envs_per_rank")))
    # Measured beside as many others as there are cores for, as ranks are.
    most = max((row.get("ranks", 1) for row in rows if row["batch"] == own), default=0)
    phases = [row["phase"] for row in rows if row["batch"] == own and row.get("ranks", 1) == most]
    if not phases:
        raise InputError(
            f"The files say nothing of one rank's {case} with its own batch of {own}: add "
            f"`hvd-dqn bench scaling --case {case} --json` or `hvd-dqn bench loop {case} --json`."
        )
    mean = scaling.mean_phase(phases)
    phase = PhaseTime(
        own, round(mean["updates"]), mean["seconds"], mean["least"], mean["deviation"], mean["message_bytes"]
    )
    updates = next(row["phase"]["updates"] for row in rows if row["batch"] == own)
    points = [(float(own), each["seconds"] / each["updates"]) for each in phases]
    points += [
        (float(row["batch"]), row["phase"]["seconds"] / row["phase"]["updates"])
        for row in rows
        # Other phases have another ratio of steps to updates.
        if row["batch"] != own and row["envs"] == envs and math.isclose(row["phase"]["updates"], updates)
    ]
    return phase, points


def _fit(phase: PhaseTime, points: Points, allreduce: dict[str, Any]) -> Fit:
    batches = _fitted(sorted({batch for batch, _ in points}))
    per_update = fit_line([point for point in points if point[0] in batches])
    rows = {row["bytes"]: row for row in allreduce["results"]}
    sizes = _fitted(sorted(size for size in rows if size <= MOST_BYTES))
    seconds = {size: rows[size]["horovod"]["seconds"]["median"] for size in sizes}
    mpi = {size: rows[size]["mpi"]["seconds"]["median"] for size in sizes if "mpi" in rows[size]}
    return Fit(phase, per_update, batches, fit_interconnect(allreduce["ranks"], seconds, mpi), sizes)


def _fitted(values: Sequence[float]) -> list[float]:
    """The values to fit to. Every second inner value is held out to check the fit."""
    return [value for i, value in enumerate(values) if i % 2 == 0 or i == len(values) - 1]


def interconnect_with(measured: Interconnect, latency: float | None, bandwidth: float | None) -> Interconnect:
    """The interconnect with another latency (µs) and bandwidth (GB/s)."""
    return Interconnect(
        measured.latency if latency is None else 1e-6 * latency,
        measured.seconds_per_byte if bandwidth is None else 1e-9 / bandwidth,
        measured.overhead,
    )


def _check(what: str, measured: float, computed: float, unit: str) -> dict[str, Any]:
    error = computed - measured if unit == "%" else 100 * (computed / measured - 1)
    return {"what": what, "measured": measured, "computed": computed, "unit": unit, "error": error}


def _checks(fit: Fit, points: Points, allreduce: dict[str, Any], jobs: Results, sync: str) -> list[dict[str, Any]]:
    """What was measured and held out of the fit: updates, all-reduces, and jobs of several ranks."""
    checks = []
    for batch in sorted({batch for batch, _ in points} - set(fit.batches)):
        measured = float(np.mean([1e6 * seconds for each, seconds in points if each == batch]))
        checks.append(_check(f"one rank's update, batch {batch:g}", measured, 1e6 * fit.per_update(batch), "µs"))
    for row in allreduce["results"]:
        if row["bytes"] not in fit.sizes:
            what = f"all-reduce of {row['bytes']:,} B, {allreduce['ranks']} ranks"
            computed = fit.interconnect.allreduce(allreduce["ranks"], row["bytes"])
            checks.append(_check(what, 1e6 * row["horovod"]["seconds"]["median"], 1e6 * computed, "µs"))
    for row in jobs:
        what = f"efficiency of {row['ranks']} ranks, {row['scaling']}, batch {row['batch']}"
        computed = efficiency(cost(fit.at_batch(row["batch"]), fit.interconnect, row["ranks"], sync))
        checks.append(_check(what, 100 * row["efficiency"]["median"], 100 * computed, "%"))
    return checks


def _row(fit: Fit, interconnect: Interconnect, ranks: int, sync: str) -> dict[str, Any]:
    phase = fit.at_batch(fit.phase.batch)
    parts = cost(phase, interconnect, ranks, sync)
    return {
        "ranks": ranks,
        "efficiency": efficiency(parts),
        "times_one_rank": ranks * efficiency(parts),
        "seconds": parts,
        "batch_for_target": batch_for(TARGET, phase, fit.per_update, interconnect, ranks, sync),
    }


def _powers(ranks: int) -> list[int]:
    powers = [2**i for i in range(ranks.bit_length())]
    return powers if powers[-1] == ranks else [*powers, ranks]


def render(result: dict[str, Any]) -> RenderableType:
    """The result of `measure` for display: the projection, its errors and its assumptions."""
    fit, network, phase = result["fit"], result["network"], result["fit"]["phase"]
    table = Table(title=f"{result['case']}, {phase['batch']} transitions per update on each rank", title_justify="left")
    for heading in ("ranks", "efficiency", "times one rank", "work", "waiting", "talking", f"batch for {TARGET:.0%}"):
        table.add_column(heading, justify="right")
    for row in result["results"]:
        whole = sum(row["seconds"].values())
        shares = (f"{100 * row['seconds'][name] / whole:.0f} %" for name in ("work", "waiting", "talking"))
        batch = "none" if row["batch_for_target"] is None else f"{row['batch_for_target']:,}"
        table.add_row(str(row["ranks"]), f"{row['efficiency']:.0%}", rate(row["times_one_rank"]), *shares, batch)
    checked = Table(title="Measured, and not used for the fit", title_justify="left")
    checked.add_column("what")
    for heading in ("measured", "computed", "error"):
        checked.add_column(heading, justify="right")
    for row in result["checks"]:
        numbers = (f"{row[name]:,.4g} {row['unit']}" for name in ("measured", "computed"))
        checked.add_row(row["what"], *numbers, f"{row['error']:+.1f} {'points' if row['unit'] == '%' else '%'}")
    per_update, last = fit["seconds_per_update"], result["results"][-1]["ranks"]
    assumptions = (
        f"An update takes {1e6 * per_update['fixed']:,.0f} µs + {1e6 * per_update['slope']:.3g} µs per transition. "
        f"A hop takes {1e6 * network['latency']:,.3g} µs, at {1e-9 / max(network['seconds_per_byte'], 1e-15):.3g} GB/s; "
        f"Horovod adds {1e6 * network['overhead']:,.3g} µs and two small all-reduces. A phase has {phase['updates']} updates "
        f"of {phase['message']:,} B each and takes {1e3 * phase['seconds']:.3g} ms. Assumed: each rank has a core of its own, "
        "as fast as those measured; any two ranks are as near as the measured ones (else give --latency and --bandwidth); "
        "ranks are late independently of each other; nothing is sent while a rank computes, and Horovod's thread takes no "
        "time from it; averaging gradients leaves the phase as fast as on one rank alone, which XLA may compile. "
        f"From {result['measured_ranks']} ranks on {result['machine']['cores']} cores to {last} is "
        f"{last / result['measured_ranks']:,.0f} times as far as was measured. Averaging: {result['sync']}; measured at "
        f"commit {', '.join(result['measured_at'])}, computed at {result['commit']}: {result['command']}"
    )
    return Group(table, checked if result["checks"] else "No measurement was left to check the fit.", assumptions)
