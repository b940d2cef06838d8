"""Measures scaling: N ranks of one job against N independent processes that train at the same time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from hvd_dqn.bench.jobs import check_launcher, run_independently, run_job
from hvd_dqn.bench.loop import PARTS, TRAINING_CASES, case_config
from hvd_dqn.bench.results import count, provenance, result_table, spread, with_spread
from hvd_dqn.errors import InputError, tell
from hvd_dqn.ranks.placement import cores
from hvd_dqn.ranks.world import World

Answers = dict[tuple[int, str, str], list[dict[str, Any]]]  # of one round, by (ranks, scaling, sync or BASELINE)
BASELINE = "independent"


def measure(
    world: World,
    case: str,
    ranks: Sequence[int],
    *,
    scaling: str = "both",
    sync: str = "both",
    total_steps: int | None = None,
    rounds: int = 5,
) -> dict[str, Any]:
    """Efficiency: the steps per second of a job of N ranks over the sum of those of N independent processes.

    Each process does the work of a rank, with one thread. XLA compiles it if that pays; ranks that average gradients
    cannot be compiled. Every round measures each job and each baseline once, in turns. Weak scaling: each rank has the
    batch and the environments of the case. Strong scaling: each has a share of them; left out if they do not divide.
    `total_steps` are those of one rank; under strong scaling those of all ranks together.
    """
    case_config(case, 1, total_steps=total_steps)  # raises InputError before anything starts
    if not ranks or min(ranks) < 1 or rounds < 1:
        raise InputError(f"--ranks and --rounds must be at least 1. Received: {list(ranks)} and {rounds}.")
    check_launcher()
    scalings = ("weak", "strong") if scaling == "both" else (scaling,)
    syncs = ("gradients", "parameters") if sync == "both" else (sync,)
    layouts = [(n, kind) for n in ranks for kind in scalings if n > 1 or kind == scalings[0]]  # alone both are the same
    left_out = [(n, kind) for n, kind in layouts if kind == "strong" and _share(case, n) is None]
    layouts = [layout for layout in layouts if layout not in left_out]
    measured: list[Answers] = []
    for i in range(rounds):
        answers: Answers = {}
        for n, kind in layouts:
            names = [BASELINE, *syncs] if n > 1 else [BASELINE]
            for name in names if i % 2 else names[::-1]:  # so that neither always runs on the warmer machine
                tell(f"round {i + 1} of {rounds}: {n} ranks, {kind}, {name}")
                answers[n, kind, name] = _measure_layout(case, n, kind, name, total_steps)
        measured.append(answers)
    rows = [_row(case, n, kind, sync, measured) for n, kind in layouts for sync in (syncs if n > 1 else ["none"])]
    return {
        "benchmark": "scaling", **provenance(), "threads": 1, "rounds": rounds,
        "left_out": [f"{n} ranks, {kind}" for n, kind in left_out], "results": rows,
    }  # fmt: skip


def _share(case: str, ranks: int) -> tuple[int, int] | None:
    """Batch and environments of one rank under strong scaling; None if they do not divide."""
    config = TRAINING_CASES[case].settings
    whole = config["learner"]["batch_size"], config["env"]["envs_per_rank"]
    return None if any(amount % ranks for amount in whole) else (whole[0] // ranks, whole[1] // ranks)


def _measure_layout(case: str, ranks: int, kind: str, name: str, total_steps: int | None) -> list[dict[str, Any]]:
    """The results of the independent processes, or of the one job."""
    arguments = ["loop", case]
    steps = TRAINING_CASES[case].total_steps if total_steps is None else total_steps
    if kind == "strong" and (share := _share(case, ranks)):
        batch, envs = share
        arguments += ["--batch", str(batch), "--envs", str(envs)]
        # As much work altogether as one rank's alone, but at least as much after the warm-up as during it.
        warm_up = case_config(case, 1, batch=batch, envs=envs, total_steps=10**9).learner.learn_start
        steps = max(steps // ranks, 2 * warm_up)
    if name == BASELINE:
        answers = run_independently(ranks, [*arguments, "--total-steps", str(steps)])
        return [answer["results"][0] for answer in answers]
    return run_job(ranks, [*arguments, "--sync", name, "--total-steps", str(ranks * steps)])["results"]


def _row(case: str, ranks: int, kind: str, sync: str, rounds: Sequence[Answers]) -> dict[str, Any]:
    independent = [answers[ranks, kind, BASELINE] for answers in rounds]
    baseline = np.array([sum(row["steps_per_second"] for row in rows) for rows in independent])
    jobs = [answers[ranks, kind, sync][0] for answers in rounds] if ranks > 1 else []
    of_job = np.array([job["steps_per_second"] for job in jobs]) if jobs else baseline
    return {
        "case": case,
        "ranks": ranks,
        "scaling": kind,
        "sync": sync,
        "batch": independent[0][0]["batch"],
        "envs": independent[0][0]["envs"],
        "oversubscribed": ranks > cores(),
        "steps_per_second": spread(of_job),
        "independent_steps_per_second": spread(baseline),
        "efficiency": spread(of_job / baseline),
        "phase": mean_phase([row["phase"] for rows in independent for row in rows]),
        # Parts of the job's time, as means over rounds.
        "shares": {
            part: float(np.mean([job["time"][part] / job["seconds"] for job in jobs])) for part in PARTS if jobs
        },
    }


def mean_phase(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the phases measured by several processes."""
    return {
        "count": sum(phase["count"] for phase in phases),
        **{name: float(np.mean([phase[name] for phase in phases])) for name in ("updates", "seconds", "deviation")},
        "least": min(phase["least"] for phase in phases),
        "message_bytes": phases[0]["message_bytes"],
    }


def communicate_and_idle(row: dict[str, Any]) -> str:
    """The shares of a job's time spent on averaging and on waiting for slower ranks."""
    shares = row["shares"]
    return f"{100 * shares['communicate']:.0f}, {100 * shares['idle']:.0f} %" if shares else ""


def render(result: dict[str, Any]) -> Table:
    left_out = f"; left out, because they do not divide: {', '.join(result['left_out'])}" if result["left_out"] else ""
    measured = (
        f"{result['results'][0]['case']}: median of {count(result['rounds'], 'round')} and half the interquartile range; "
        f"* more ranks than cores{left_out}"
    )
    headings = ("scaling", "sync", "ranks", "batch", "steps/s", "independent", "efficiency", "communicate, idle")
    table = result_table(result, measured, *headings, left=2)
    for row in result["results"]:
        table.add_row(
            row["scaling"],
            row["sync"],
            f"{row['ranks']}{'*' * row['oversubscribed']}",
            str(row["batch"]),
            with_spread(row["steps_per_second"]),
            with_spread(row["independent_steps_per_second"]),
            "" if row["ranks"] == 1 else with_spread({k: 100 * v for k, v in row["efficiency"].items()}, " %"),
            communicate_and_idle(row),
        )
    return table
