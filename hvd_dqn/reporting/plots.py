"""Plots learning curves from run directories: the return over total steps and over wall time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from hvd_dqn.errors import InputError
from hvd_dqn.reporting.writers import read_csv

# Distinguishable with every kind of colour vision. Source: Okabe & Ito 2008, "Color Universal Design".
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#555555"
TRAINING: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.35, "zorder": 2}
EVALUATION: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 3.5, "zorder": 4}
ALONE: dict[str, Any] = {"linewidth": 1.0, "marker": "o", "markersize": 2.0, "alpha": 0.7, "zorder": 3}
TARGET: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (4, 3)), "color": GREY, "zorder": 1}


@dataclass(frozen=True)
class Curve:
    """Returns at rising total steps and seconds, all [n]; `low` and `high` bound each return."""

    total_steps: np.ndarray
    seconds: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class RunCurve:
    """What a run directory says about its learning."""

    name: str
    env: str
    preset: str | None
    size: int  # number of ranks
    scaling: str | None
    seed: int | None
    target_return: float | None
    training: Curve  # mean return of the episodes of each report, with exploration
    evaluations: Curve  # mean, lowest and highest return of each evaluation


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seed. They have one colour."""

    label: str
    color: str
    runs: Sequence[RunCurve]


def read_run(path: Path) -> RunCurve:
    try:
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        size = int(run["size"])
    except OSError:
        raise InputError(
            f"{path} is no run: it has no readable run.json. Expected: a directory that `hvd-dqn train` made."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'run.json'} does not describe a run: {type(error).__name__} {error}.") from None
    training = _read_curve(path / "metrics.csv", "return_mean", "return_mean", "return_mean")
    evaluated = path / "evaluations.csv"
    evaluations = _read_curve(evaluated, "return_mean", "return_min", "return_max") if evaluated.exists() else None
    return RunCurve(
        name=path.resolve().name,
        env=str(run.get("env") or ""),
        preset=run.get("preset"),
        size=size,
        scaling=run.get("scaling"),
        seed=run.get("seed"),
        target_return=run.get("target_return"),
        training=training,
        evaluations=evaluations or _select(training, np.zeros(len(training.mean), bool)),
    )


def _read_curve(path: Path, mean: str, low: str, high: str) -> Curve:
    table = read_csv(path)
    if missing := {"total_steps", "seconds", mean, low, high} - table.keys():
        raise InputError(
            f"{path} has no column {', '.join(sorted(missing))}. Expected: a file that `hvd-dqn train` made."
        )
    curve = Curve(table["total_steps"], table["seconds"], table[mean], table[low], table[high])
    # Reports without an episode have no return. Of two evaluations at one step the second, final one has more episodes.
    last = np.append(curve.total_steps[1:] > curve.total_steps[:-1], True)[: len(curve.mean)]
    return _select(curve, last & np.isfinite(curve.mean) & np.isfinite(curve.seconds))


def _select(curve: Curve, chosen: np.ndarray) -> Curve:
    return Curve(**{name: values[chosen] for name, values in vars(curve).items()})


def plot(run_dirs: Sequence[Path], output: Path) -> None:
    """Plots the return over total steps (left) and over wall time (right), in one colour per group of runs.

    Runs that differ only in their seed form a group, drawn as the mean with a band from the lowest to the highest. The
    ending of `output` names the format.
    """
    runs = [read_run(path) for path in run_dirs]
    groups = group_by_seed(runs)
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    seconds = max((x for run in runs for x in (*run.training.seconds[-1:], *run.evaluations.seconds[-1:])), default=0.0)
    unit, unit_seconds = ("s", 1) if seconds < 180 else ("min", 60) if seconds < 3 * 3600 else ("h", 3600)
    for axes, x, scale in [(left, "total_steps", 1), (right, "seconds", unit_seconds)]:
        _style(axes)
        for one in groups:
            _draw(axes, one, x, scale, bands_over_seeds=any(len(other.runs) > 1 for other in groups))
        for target in sorted({run.target_return for run in runs if run.target_return is not None}):
            axes.axhline(target, **TARGET)
    left.set_xlim(left=0)
    right.set_xlim(left=0)
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    left.set(xlabel="total steps", ylabel="return per episode")
    right.set(xlabel=f"wall time ({unit})")
    environments = sorted({run.env for run in runs if run.env})
    figure.suptitle(", ".join(environments) or "learning curve", fontsize=11, fontweight="bold", color="#222222")
    _add_legend(figure, groups)
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot write the picture {output}: {error}") from None


def group_by_seed(runs: Sequence[RunCurve]) -> list[SeedGroup]:
    """Groups the runs that differ only in their seed. A group's label tells how it differs from the others."""

    def key(run: RunCurve) -> tuple[Any, ...]:
        return run.env, run.preset or "", run.size, run.scaling or "", run.target_return is None or run.target_return

    members: dict[tuple[Any, ...], list[RunCurve]] = {}
    for run in sorted(runs, key=key):
        members.setdefault(key(run), []).append(run)
    if any(len({run.seed for run in same}) < len(same) for same in members.values()):
        # Two runs with one seed differ in a setting that is not in run.json. Only their names distinguish them.
        return [SeedGroup(run.name, PALETTE[i % len(PALETTE)], [run]) for i, run in enumerate(runs)]
    groups = []
    for i, same in enumerate(members.values()):
        parts = [_differing(runs, same[0], "env"), _differing(runs, same[0], "preset")]
        if len({run.size for run in runs}) > 1:
            parts.append("1 rank" if same[0].size == 1 else f"{same[0].size} ranks")
        parts.append(_differing([run for run in runs if run.size > 1], same[0], "scaling") if same[0].size > 1 else "")
        label = ", ".join(part for part in parts if part) or (same[0].name if len(members) > 1 else "")
        if len(same) > 1:
            label = f"{label} ({len(same)} seeds)" if label else f"mean of {len(same)} seeds"
        groups.append(SeedGroup(label, PALETTE[i % len(PALETTE)], same))
    return groups


def _differing(runs: Sequence[RunCurve], run: RunCurve, name: str) -> str:
    return str(getattr(run, name) or "") if len({getattr(other, name) for other in runs}) > 1 else ""


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelsize=9, length=3, labelleft=True)
    axes.xaxis.label.set_color("#222222")
    axes.yaxis.label.set_color("#222222")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _draw(axes: Axes, one: SeedGroup, x: str, scale: float, bands_over_seeds: bool) -> None:
    for run in one.runs:
        marker = "." if len(run.training.mean) == 1 else ""  # a line through one point is invisible
        axes.plot(getattr(run.training, x) / scale, run.training.mean, color=one.color, marker=marker, **TRAINING)
    evaluated = [run.evaluations for run in one.runs if len(run.evaluations.mean)]
    if not evaluated:
        return
    curve = over_seeds(evaluated) if len(evaluated) > 1 else evaluated[0]
    for alone in evaluated:  # a seed that ran longer than the others
        rest = _select(alone, alone.total_steps >= max(curve.total_steps, default=0))
        if len(rest.mean) > 1:
            axes.plot(getattr(rest, x) / scale, rest.mean, color=one.color, **ALONE)
    if len(evaluated) > 1 or not bands_over_seeds:
        along = getattr(curve, x) / scale
        axes.fill_between(along, curve.low, curve.high, color=one.color, alpha=0.14, linewidth=0, zorder=1)
    many = len(curve.mean) > 50  # too many markers would form a thick line
    axes.plot(getattr(curve, x) / scale, curve.mean, color=one.color, **EVALUATION | ({"marker": ""} if many else {}))


def over_seeds(curves: Sequence[Curve]) -> Curve:
    """Mean, lowest and highest of several runs' means, up to the end of the shortest run."""
    steps = np.unique(np.concatenate([curve.total_steps for curve in curves]))
    first, last = max(curve.total_steps[0] for curve in curves), min(curve.total_steps[-1] for curve in curves)
    steps = steps[(steps >= first) & (steps <= last)]
    seconds = np.stack([np.interp(steps, curve.total_steps, curve.seconds) for curve in curves])  # [runs, n]
    means = np.stack([np.interp(steps, curve.total_steps, curve.mean) for curve in curves])  # [runs, n]
    return Curve(steps, seconds.mean(axis=0), means.mean(axis=0), means.min(axis=0), means.max(axis=0))


def _add_legend(figure: Figure, groups: Sequence[SeedGroup]) -> None:
    """A legend: one entry per group, then the meanings of the line styles."""
    several = any(len(one.runs) > 1 for one in groups)
    colors: list[Any] = [Line2D([], [], color=one.color, linewidth=3.5, label=one.label) for one in groups if one.label]
    handles: list[Any] = []
    neutral = groups[0].color if len(groups) == 1 else GREY
    runs = [run for one in groups for run in one.runs]
    if any(len(run.training.mean) for run in runs):
        handles.append(Line2D([], [], color=neutral, label="training, exploring", **TRAINING))
    if any(len(run.evaluations.mean) for run in runs):
        handles.append(Line2D([], [], color=neutral, label="evaluation", **EVALUATION))
        band = "lowest to highest seed" if several else "lowest to highest episode"
        handles.append(Patch(color=neutral, alpha=0.2, linewidth=0, label=band))
    for target in sorted({run.target_return for run in runs if run.target_return is not None}):
        handles.append(Line2D([], [], label=f"target {target:g}", **TARGET))
    widest = 4 if max(len(one.label) for one in groups) < 30 else 2
    rows = [part[i : i + widest] for part in (colors, handles) for i in range(0, len(part), widest)]
    width = max((len(row) for row in rows), default=0)
    # Matplotlib fills a legend column by column: pad the rows and turn them.
    padded = [row + [Line2D([], [], linestyle="", label=" ")] * (width - len(row)) for row in rows]
    figure.legend(
        handles=[handle for column in zip(*padded, strict=True) for handle in column],
        loc="outside lower center",
        ncols=max(width, 1),
        frameon=False,
        fontsize=8.5,
        handlelength=1.8,
        columnspacing=1.6,
    )
