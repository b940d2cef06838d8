"""What talking costs: N ranks of one job against N processes that train alone at the same time."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from hvd_dqn.bench.jobs import apart, check_launcher, together
from hvd_dqn.bench.loop import CASES, PARTS, settings
from hvd_dqn.bench.results import count, made_table, provenance, spread, with_spread
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.placement import cores


def scaling(
    case: str,
    ranks: Sequence[int] = (1, 2, 4, 8),
    *,
    scalings: Sequence[str] = ("weak", "strong"),
    syncs: Sequence[str] = ("gradients", "parameters"),
    total_steps: int | None = None,
    rounds: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Efficiency: steps per second of a job of N ranks over the sum of those of N silent processes, of which each does the
    same work as a rank, compiled by XLA where that pays, which ranks that average gradients cannot be. Both have one thread
    per rank; in every round each is measured once, in turns.

    Weak: each rank has the case's batch and environments. Strong: a part of them; left out where they do not divide.
    `total_steps` are those of one rank, under strong scaling of all together.
    """
    settings(case, 1, total_steps=total_steps)  # what cannot be is refused before anything starts
    if not ranks or min(ranks) < 1 or rounds < 1:
        raise InputError(f"--ranks and --rounds must be at least 1. Received: {list(ranks)} and {rounds}.")
    check_launcher()
    layouts = [(n, kind) for n in ranks for kind in scalings if n > 1 or kind == scalings[0]]  # alone both are the same
    skipped = [f"{n} ranks, strong" for n, kind in layouts if kind == "strong" and _divided(case, n) is None]
    layouts = [(n, kind) for n, kind in layouts if kind == "weak" or _divided(case, n) is not None]
    measured: list[dict[tuple[int, str, str], Any]] = []
    for i in range(rounds):
        answers: dict[tuple[int, str, str], Any] = {}
        for n, kind in layouts:
            names = ["silent", *syncs] if n > 1 else ["silent"]
            for name in names if i % 2 else names[::-1]:  # neither always has the warmer machine
                say(f"round {i + 1} of {rounds}: {n} ranks, {kind}, {name}")
                answers[n, kind, name] = _measure(case, n, kind, name, total_steps)
        measured.append(answers)
    rows = [_row(case, n, kind, sync, measured) for n, kind in layouts for sync in (syncs if n > 1 else ["none"])]
    return {
        "benchmark": "scaling", **provenance(), "threads": 1, "rounds": rounds,
        "left_out": skipped, "results": rows,
    }  # fmt: skip


def _divided(case: str, ranks: int) -> tuple[int, int] | None:
    """Batch and environments of one rank under strong scaling; None where they do not divide."""
    given = CASES[case].settings
    whole = given["learner"]["batch_size"], given["env"]["envs_per_rank"]
    return None if any(amount % ranks for amount in whole) else (whole[0] // ranks, whole[1] // ranks)


def _measure(case: str, ranks: int, kind: str, name: str, total_steps: int | None) -> list[dict[str, Any]]:
    """The results of the silent processes, or of the one job."""
    words = ["loop", case]
    parts = _divided(case, ranks) if kind == "strong" else None
    if parts:
        words += ["--batch", str(parts[0]), "--envs", str(parts[1])]
    steps = CASES[case].total_steps if total_steps is None else total_steps
    if parts:  # as much work altogether as one rank's alone, but enough of it to measure
        steps = max(steps // ranks, _least(case, parts))
    if name == "silent":
        return [answer["results"][0] for answer in apart(ranks, [*words, "--total-steps", str(steps)])]
    words += ["--sync", name, "--total-steps", str(ranks * steps)]
    return [together(ranks, words)["results"][0]]


def _least(case: str, parts: tuple[int, int]) -> int:
    """The total steps after whose warm-up as many are left to measure."""
    return 2 * settings(case, 1, batch=parts[0], envs=parts[1], total_steps=10**9).learner.learn_start


def _row(
    case: str, ranks: int, kind: str, sync: str, rounds: Sequence[dict[tuple[int, str, str], Any]]
) -> dict[str, Any]:
    silent = [each[ranks, kind, "silent"] for each in rounds]
    rates = np.array([sum(row["steps_per_second"] for row in rows) for rows in silent])
    jobs = [each[ranks, kind, sync][0] for each in rounds] if ranks > 1 else []
    of_job = np.array([row["steps_per_second"] for row in jobs]) if jobs else rates
    phases = [row["phase"] for rows in silent for row in rows]
    first = silent[0][0]
    return {
        "case": case,
        "ranks": ranks,
        "scaling": kind,
        "sync": sync,
        "batch": first["batch"],
        "envs": first["envs"],
        "oversubscribed": ranks > cores(),
        "steps_per_second": spread(of_job),
        "silent_steps_per_second": spread(rates),
        "efficiency": spread(of_job / rates),
        "phase": mean_phase(phases),
        # Parts of the job's time, the mean of its rounds: what talking and waiting take, and what they leave.
        "shares": {
            part: float(np.mean([job["time"][part] / job["seconds"] for job in jobs])) for part in PARTS if jobs
        },
    }


def mean_phase(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of what several processes measured of their phases."""
    return {
        "count": sum(phase["count"] for phase in phases),
        "updates": float(np.mean([phase["updates"] for phase in phases])),
        "seconds": float(np.mean([phase["seconds"] for phase in phases])),
        "least": min(phase["least"] for phase in phases),
        "deviation": float(np.mean([phase["deviation"] for phase in phases])),
        "message_bytes": phases[0]["message_bytes"],
    }


def communicate_and_idle(row: dict[str, Any]) -> str:
    """What part of a job's time goes into averaging, and into waiting for slower ranks."""
    shares = row["shares"]
    return f"{100 * shares['communicate']:.0f}, {100 * shares['idle']:.0f} %" if shares else ""


def table(result: dict[str, Any]) -> Table:
    """The result of `scaling` for people."""
    left_out = f"; left out, for they do not divide: {', '.join(result['left_out'])}" if result["left_out"] else ""
    rounds = count(result["rounds"], "round")
    case = result["results"][0]["case"]
    measured = f"{case}: median of {rounds} and half the interquartile range; * more ranks than cores{left_out}"
    made = made_table(result, measured)
    for heading in ("ranks", "scaling", "sync", "batch"):
        made.add_column(heading, justify="right" if heading in ("ranks", "batch") else "left")
    for heading in ("steps/s", "silent, steps/s", "efficiency", "communicate, idle"):
        made.add_column(heading, justify="right")
    for row in result["results"]:
        made.add_row(
            f"{row['ranks']}{'*' if row['oversubscribed'] else ''}",
            row["scaling"],
            row["sync"],
            str(row["batch"]),
            with_spread(row["steps_per_second"]),
            with_spread(row["silent_steps_per_second"]),
            "" if row["ranks"] == 1 else with_spread({k: 100 * v for k, v in row["efficiency"].items()}, " %"),
            communicate_and_idle(row),
        )
    return made
