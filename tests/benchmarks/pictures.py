"""The benchmarks' pictures and the README's tables, from the JSON that the benchmarks print.

    python -m tests.benchmarks.pictures [--results tests/benchmarks/results] [--out tests/benchmarks]

Reads those of loop*.json, solve*.json, learner.json, scaling*.json, steps.json, project*.json and allreduce.json;
draws speed.png, scaling.png, steps.png and projection.png, and prints a Markdown table of the numbers of each file.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from hvd_dqn.config_files import load_preset
from hvd_dqn.reporting.plots import GREY, PALETTE
from tests.benchmarks.compare import HERE
from tests.benchmarks.solve import ZOO_SETTINGS
from tests.benchmarks.tables import NAMES, TABLES, Result, goal_of, markdown, told

INK, PALE = "#222222", "#B8B8B8"
COLORS = {"ours": PALETTE[0], "ours, two ranks": PALETTE[5], ZOO_SETTINGS: PALETTE[0]}
KINDS = {"weak": PALETTE[0], "strong": PALETTE[1]}
WIDTH = 9.0  # 900 px at 100 dpi


def read(path: Path) -> Result:
    """The result in what a benchmark printed; horovodrun names the rank in every line and within some."""
    text = re.sub(r"\[\d+,\d+\]<stdout>: ?", "", path.read_text())
    return json.JSONDecoder().raw_decode(text[text.index("{") :])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    found = {name: [read(path) for path in sorted(options.results.glob(f"{name}.json"))] for name in TABLES}
    drawn = {
        "speed": speed([*found["loop*"], *found["solve*"]]),
        "scaling": scaling(found["scaling*"]),
        "steps": steps(found["steps"]),
        "projection": projection(found["project*"]),
    }
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(options.out / f"{name}.png", dpi=100)
    for name, results in found.items():
        for result in results:
            print(f"{markdown(TABLES[name](result))}\n\n{told(result)}\n")


def axes_of(count: int, height: float, columns: int = 3, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many plain axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    made = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in made:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#888888")
        axes.tick_params(colors=GREY, labelsize=9, length=3)
        axes.set_axisbelow(True)
    for axes in made[count:]:
        axes.set_visible(False)
    return figure, made[:count]


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)


def legend(axes: Axes, text: str) -> None:
    axes.annotate(text, (0.03, 0.03), xycoords="axes fraction", fontsize=8, color=GREY)


def speed(results: Sequence[Result]) -> Figure | None:
    """Steps/s of whole training, and seconds to the target, a bar for each of ours and of the others."""
    rows = [row for result in results for row in result["results"]]
    if not rows:
        return None
    figure, all_axes = axes_of(len(rows), 2.3, columns=2)
    for axes, row in zip(all_axes, rows, strict=True):
        if "rates" in row:
            title(axes, f"{row['case']}: steps/s, more is better")
            bars(axes, {name: rates["steps_per_second"] for name, rates in row["rates"].items()}, loop_notes(row))
        else:
            title(
                axes,
                f"{row['preset']} to {load_preset(row['preset']).evaluation.target_return:g}: seconds, less is better",
            )
            bars(axes, {name: found["seconds"] for name, found in row["summary"].items()}, solve_notes(row))
    return figure


def loop_notes(row: Result) -> dict[str, str]:
    notes = {}
    for ratio, found in row["ratios"].items():
        mine, _, theirs = ratio.partition(" over ")
        if mine == "ours":
            notes[theirs] = f"{found['median']:.1f}x slower than ours"
    return notes


def solve_notes(row: Result) -> dict[str, str]:
    notes = {}
    for ratio, found in row["ratios"].items():
        mine, _, theirs = ratio.partition(": times as fast as ")
        if mine == "ours":
            notes[theirs] = f"{'≥ ' * found['at_least']}{found['median']:.1f}x slower than ours"
    return notes


def bars(axes: Axes, found: dict[str, Result], notes: dict[str, str]) -> None:
    """Medians with lowest and highest; None is never, which has no bar."""
    longest = max(
        [spread["median"] or 0 for spread in found.values()] + [spread["high"] or 0 for spread in found.values()]
    )
    for i, (name, spread) in enumerate(found.items()):
        middle, high = spread["median"], spread["high"]
        axes.barh(i, middle or 0, color=COLORS.get(name, PALE), height=0.62)
        end = 0.0
        if middle is not None:
            end = longest if high is None else high
            axes.plot([spread["low"], end], [i, i], color=INK, linewidth=1.1, marker="|", markersize=5)
            if high is None:
                axes.plot(end, i, color=INK, marker=">", markersize=4)
        value = "never, in most runs" if middle is None else f"{middle:,.{int(middle < 10)}f}"
        text = "\n".join([value, notes[name]] if name in notes else [value])
        axes.text(end + 0.03 * longest, i, text, va="center", fontsize=8, color=INK, linespacing=1.0)
    axes.set_yticks(range(len(found)), [NAMES.get(name, name) for name in found])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * longest)
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])


def ranks_axis(axes: Axes, ranks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ranks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("ranks", color=INK)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)


def percent_axis(axes: Axes, highest: float = 1.0) -> None:
    axes.set_ylim(0, max(1.1, 1.05 * highest))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float) -> None:
    """Names (x, y, text, colour) beside the ends of their lines, at least `gap` apart."""
    last = -float("inf")
    for x, y, text, color in sorted(ends, key=lambda end: end[1]):
        last = max(y, last + gap)
        axes.annotate(
            text, (x, last), xytext=(9, 0), textcoords="offset points", color=color, fontsize=8.5, va="center",
            annotation_clip=False,
        )  # fmt: skip


def scaling(results: Sequence[Result]) -> Figure | None:
    """Efficiency against ranks, with quartiles; hollow markers where ranks shared cores."""
    cases = list(dict.fromkeys(row["case"] for result in results for row in result["results"]))
    if not cases:
        return None
    figure, all_axes = axes_of(len(cases), 3.4, sharey=True)
    rows = [row for result in results for row in result["results"]]
    highest = max(row["efficiency"]["high"] for row in rows)
    for axes, case in zip(all_axes, cases, strict=True):
        title(axes, case)
        of_case, ends = [row for row in rows if row["case"] == case], []
        for kind, line in (("weak", "-"), ("strong", (0, (5, 2)))):
            for sync, color in (("gradients", PALETTE[0]), ("parameters", PALETTE[1])):
                points = sorted(
                    (r for r in of_case if r["ranks"] > 1 and (r["scaling"], r["sync"]) == (kind, sync)),
                    key=lambda r: r["ranks"],
                )
                if not points:
                    continue
                x, y = [r["ranks"] for r in points], [r["efficiency"]["median"] for r in points]
                axes.plot([1, *x], [1.0, *y], color=color, linestyle=line, linewidth=1.5)
                for r in points:
                    found = r["efficiency"]
                    face = "white" if r["oversubscribed"] else color
                    axes.plot([r["ranks"]] * 2, [found["low"], found["high"]], color=color, linewidth=1)
                    if goal := goal_of(r):
                        axes.plot([r["ranks"] * 0.9, r["ranks"] * 1.1], [goal] * 2, ":", color=color, linewidth=1.6)
                    axes.plot(
                        r["ranks"], found["median"], "o", color=color, markerfacecolor=face, markersize=6, zorder=3
                    )
                ends.append((x[-1], y[-1], f"{kind}, {sync}", color))
        ranks_axis(axes, sorted({row["ranks"] for row in of_case}))
        percent_axis(axes, highest)
        if axes is all_axes[-1]:
            labels(axes, ends, 0.065 * max(1.1, highest))
    all_axes[0].set_ylabel("efficiency", color=INK)
    legend(all_axes[0], "dashed: strong scaling; dotted: goals\nhollow: more ranks than cores")
    return figure


def steps(results: Sequence[Result]) -> Figure | None:
    """Total steps to the target: the median as a line, every seed as a dot, and how much the target lets it grow."""
    rows = [row for result in results for row in result["results"]]
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    if not rows:
        return None
    figure, all_axes = axes_of(len(presets), 3.5, columns=2)
    for axes, preset in zip(all_axes, presets, strict=True):
        title(axes, f"{preset}: total steps to the target")
        of_preset, ends = [row for row in rows if row["preset"] == preset], []
        reached = [run["total_steps"] for row in of_preset for run in row["runs"] if run["total_steps"] is not None]
        top = 1.15 * max(reached, default=1)
        one = next(row for row in of_preset if row["ranks"] == 1)
        for kind, color in KINDS.items():
            points = [one, *(row for row in of_preset if row["ranks"] > 1 and row["scaling"] == kind)]
            side = 0.97 if kind == "weak" else 1.03
            for row in points:
                values = [run["total_steps"] for run in row["runs"]]
                shade = GREY if row is one else color
                for value in values:
                    there = value is not None
                    axes.plot(row["ranks"] * side, value if there else top, "o" if there else "^", color=shade,
                              alpha=0.45, markersize=4.5, markeredgewidth=0)  # fmt: skip
                if one["total_steps"]["median"] is not None and (wanted := row["over_one_rank"].get("target")):
                    limit = wanted["limit"] * one["total_steps"]["median"]
                    axes.plot([row["ranks"] * 0.88, row["ranks"] * 1.12], [limit] * 2, ":", color=color, linewidth=1.6)
            y = [top if row["total_steps"]["median"] is None else row["total_steps"]["median"] for row in points]
            axes.plot([row["ranks"] * side for row in points], y, marker="o", color=color, linewidth=1.8)
            ends.append((points[-1]["ranks"] * 1.1, y[-1], f"{kind}{grown(points[-1])}", color))
        ranks_axis(axes, sorted({row["ranks"] for row in of_preset}))
        axes.set_ylim(0, 1.08 * top)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
        if len(reached) < sum(len(row["runs"]) for row in of_preset):
            axes.annotate(
                "▲ never", (0.01, top), xycoords=("axes fraction", "data"), fontsize=8, color=GREY, va="center"
            )
        labels(axes, ends, 0.13 * top)
    legend(all_axes[0], "line: medians; small dots: seeds; dotted: goals")
    return figure


def grown(row: Result) -> str:
    """By what the steps of so many ranks grew, and by what they may."""
    ratio, wanted = row["over_one_rank"]["ratio"], row["over_one_rank"].get("target")
    text = "\nnever" if ratio is None else f"\n{ratio:.2f}x"
    return text + (f" ({wanted['sign']} {wanted['limit']:g})" if wanted else "")


def projection(results: Sequence[Result]) -> Figure | None:
    """Efficiency computed for many ranks with what was measured of few, and how far the computed is from the measured."""
    if not results:
        return None
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY, labelsize=9, length=3)
        axes.set_axisbelow(True)
    ends, names = [], []
    for i, result in enumerate(results):
        color, rows = PALETTE[i], result["results"]
        left.plot([r["ranks"] for r in rows], [r["efficiency"] for r in rows], color=color, linewidth=1.8)
        ends.append(
            (
                rows[-1]["ranks"],
                rows[-1]["efficiency"],
                f"{result['sync']}\n{100 * rows[-1]['efficiency']:.0f} %",
                color,
            )
        )
        for check in result["checks"]:
            batch = f", batch {result['fit']['phase']['batch']:g}"  # of the line; others are checked on the right
            if (found := re.match(r"efficiency of (\d+) ranks", check["what"])) and check["what"].endswith(batch):
                left.plot(int(found[1]), check["measured"] / 100, "o", color=color, markersize=7, zorder=3)
            of = f", {result['sync']}" if check["unit"] == "%" else ""  # all-reduces are the same for both
            text = f"{check['what']}{of}: {check['error']:+.1f} {'points' if check['unit'] == '%' else '%'}"
            if text not in (each for _, each, _ in names):
                names.append((check, text, color if of else GREY))
    title(left, f"{', '.join(sorted({result['case'] for result in results}))}: efficiency of many ranks")
    ranks_axis(left, [row["ranks"] for row in results[0]["results"]])
    percent_axis(left)
    legend(left, "line: computed; dots: measured")
    left.set_ylabel("efficiency", color=INK)
    labels(left, ends, 0.13)
    title(right, "computed against measured")
    widest = max((abs(check["error"]) for check, _, _ in names), default=1.0) or 1.0
    right.axvline(0, color="#888888", linewidth=1, zorder=0)
    for i, (check, text, color) in enumerate(names):
        right.barh(i, check["error"], color=color, height=0.3)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        right.text(-1.05 * widest, i - 0.36, text, fontsize=8, va="center", bbox=box)
    right.set(xlim=(-1.1 * widest, 1.1 * widest), ylim=(len(names) - 0.4, -0.8), yticks=[])
    right.spines["left"].set_visible(False)
    right.set_xlabel("error, % (efficiency: points)", color=INK)
    return figure


if __name__ == "__main__":
    main()
