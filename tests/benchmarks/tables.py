"""What the benchmarks print as JSON, as the Markdown tables of the README."""

from collections.abc import Callable, Sequence
from typing import Any

from hvd_dqn.bench.project import TARGET
from hvd_dqn.bench.scaling import communicate_and_idle
from tests.benchmarks.solve import OURS, ZOO_SETTINGS

NAMES = {
    "sb3": "Stable-Baselines3", "tianshou": "Tianshou", "rllib": "RLlib",
    "ours, two ranks": "ours, 2 ranks", ZOO_SETTINGS: "ours, zoo's settings",
}  # fmt: skip
# What two ranks that average gradients shall reach, of weak scaling; with averaged parameters 0.95 everywhere.
EFFICIENCY = {"pixels": 0.95, "cartpole-zoo": 0.85, "cartpole-16": 0.75}
Result = dict[str, Any]


def told(result: Result) -> str:
    machine, count = result["machine"], result.get("rounds", result.get("repeats"))
    left_out = f" Left out: {'; '.join(result['left_out'])}." if result.get("left_out") else ""
    of = f", {count} rounds or seeds" if count else ""
    # `hvd-dqn bench` gives quartiles, the comparisons of a few rounds the lowest and the highest.
    ends = "quartiles" if result["benchmark"] in ("scaling", "allreduce") else "lowest to highest"
    of += f", medians ({ends})" if count else ""
    return (
        f"`{result['command']}` at commit {result['commit']}{of}, {machine['cpu']}, {machine['cores']} cores.{left_out}"
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(found: Result, form: str = ",.0f", factor: float = 1.0) -> str:
    """`12 (11 to 13)`; None is never."""
    texts = ("never" if found[n] is None else f"{factor * found[n]:{form}}" for n in ("median", "low", "high"))
    return "{} ({} to {})".format(*texts)


def met(found: Result) -> str:
    wanted = found.get("target")
    return f", {wanted['sign']} {wanted['limit']:g} {'met' if wanted['met'] else '**not met**'}" if wanted else ""


def loop_table(result: Result) -> list[list[str]]:
    rows = result["results"]
    made = [["steps/s", *(row["case"] for row in rows)]]
    for name in rows[0]["rates"]:
        made.append([NAMES.get(name, name), *(spread(row["rates"][name]["steps_per_second"]) for row in rows)])
    for name in rows[0]["updates_per_step"]:
        made.append(
            [f"{NAMES.get(name, name)}: updates per step", *(f"{r['updates_per_step'][name]:.3f}" for r in rows)]
        )
    return made + [[n, *(spread(row["ratios"][n], ".2f") for row in rows)] for n in rows[0]["ratios"]]


def solve_table(result: Result) -> list[list[str]]:
    made = [["preset", "who", "seconds", "total steps", "solved", *(f"{NAMES.get(n, n)}, times as fast" for n in OURS)]]
    for row in result["results"]:
        for name, found in row["summary"].items():
            ratios = [row["ratios"].get(f"{mine}: times as fast as {name}") for mine in OURS]
            times = [f"{'≥ ' * r['at_least']}{spread(r, '.1f')}{met(r)}" if r else "" for r in ratios]
            solved = f"{found['solved']} of {len(row['runs'][name])}"
            who = NAMES.get(name, name)
            made.append([row["preset"], who, spread(found["seconds"]), spread(found["total_steps"]), solved, *times])
    return made


def learner_table(result: Result) -> list[list[str]]:
    rows = result["results"]
    made = [["µs per update", *(row["network"] for row in rows)]]
    for key, form in (("microseconds", ",.0f"), ("ratios", ".2f")):
        for name in dict.fromkeys(name for row in rows for name in row[key]):
            made.append(
                [name, *(spread(r[key][name], form) + met(r[key][name]) if name in r[key] else "" for r in rows)]
            )
    return made


def goal_of(row: Result) -> float | None:
    """The efficiency that so many ranks shall reach; None where nobody has said."""
    if row["ranks"] != 2 or row["scaling"] != "weak" or row["case"] not in EFFICIENCY:
        return None
    return EFFICIENCY[row["case"]] if row["sync"] == "gradients" else 0.95


def scaling_table(result: Result) -> list[list[str]]:
    head = ["case", "ranks", "scaling", "averaging", "batch", "steps/s", "independent, steps/s", "efficiency, %"]
    made = [[*head, "communicate, idle"]]
    for row in result["results"]:
        ranks = f"{row['ranks']}{' (more than cores)' * row['oversubscribed']}"
        cells = [row["case"], ranks, row["scaling"], row["sync"], str(row["batch"])]
        rates = [spread(row["steps_per_second"]), spread(row["independent_steps_per_second"])]
        wanted = {}
        if goal := goal_of(row):
            wanted = {"target": {"sign": "≥", "limit": 100 * goal, "met": row["efficiency"]["median"] >= goal}}
        made.append([*cells, *rates, spread(row["efficiency"], ".0f", 100) + met(wanted), communicate_and_idle(row)])
    return made


def steps_table(result: Result) -> list[list[str]]:
    made = [["preset", "ranks", "scaling", "total steps", "reached", "times one rank's"]]
    for row in result["results"]:
        over, many = row["over_one_rank"], row["ranks"] > 1
        times = (f"{over['ratio']:.2f}" if over["ratio"] is not None else "never") + met(over) if many else ""
        kind, there = row["scaling"] if many else "", f"{row['reached']} of {len(row['runs'])}"
        made.append([row["preset"], str(row["ranks"]), kind, spread(row["total_steps"]), there, times])
    return made


def project_table(result: Result) -> list[list[str]]:
    made = [["ranks", "efficiency, %", "times one rank", f"batch for {TARGET:.0%}"]]
    for row in result["results"]:
        batch = "none" if row["batch_for_target"] is None else f"{row['batch_for_target']:,}"
        made.append([str(row["ranks"]), f"{100 * row['efficiency']:.0f}", f"{row['times_one_rank']:.1f}", batch])
    for row in result["checks"]:
        numbers = [f"measured {row['measured']:,.4g} {row['unit']}", f"computed {row['computed']:,.4g} {row['unit']}"]
        made.append([row["what"], *numbers, f"{row['error']:+.1f} {'points' if row['unit'] == '%' else '%'}"])
    return made


def allreduce_table(result: Result) -> list[list[str]]:
    made = [["bytes", "Horovod, µs", "MPI alone, µs"]]
    for row in result["results"]:
        times = [spread(row[n]["seconds"], ",.0f", 1e6) if n in row else "" for n in ("horovod", "mpi")]
        made.append([f"{row['bytes']:,}", *times])
    return made


TABLES: dict[str, Callable[[Result], list[list[str]]]] = {
    "loop*": loop_table, "solve*": solve_table, "learner": learner_table, "scaling*": scaling_table,
    "steps": steps_table, "project*": project_table, "allreduce": allreduce_table,
}  # fmt: skip
