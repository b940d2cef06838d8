"""Helpers of all benchmarks: timing, where a number was measured, and tables."""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from rich.table import Table

from hvd_dqn import __version__
from hvd_dqn.ranks.placement import cores


def seconds_of(job: Callable[[], Any], barrier: Callable[[], None]) -> float:
    """Seconds that `job` takes on this rank, from the moment at which all ranks are ready."""
    barrier()
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def provenance() -> dict[str, Any]:
    """Where a number comes from: commit, machine, threads and command."""
    return {
        "commit": revision(),
        "machine": {
            "cpu": cpu(),
            "cores": cores(),
            "gpus": [
                tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
                for gpu in tf.config.get_visible_devices("GPU")
            ],
        },
        "threads": int(os.environ.get("TF_NUM_INTRAOP_THREADS", cores())),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def revision() -> str:
    """The commit of this package, `-dirty` if its files were changed; its version outside of a checkout."""
    here = Path(__file__)
    # An installed package may be inside the checkout of another project, which does not track it.
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    commit = _git(here.parent, "describe", "--always", "--dirty", "--abbrev=10") if tracked else ""
    return commit or __version__


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def result_table(result: dict[str, Any], measured: str, *headings: str, left: int = 0) -> Table:
    """A table without rows: the machine above, what was `measured` below. All columns but the first `left` align right."""
    machine = result["machine"]
    threads, where = count(result["threads"], "thread"), ", ".join(machine["gpus"]) or machine["cpu"]
    ranks = f"{count(result['ranks'], 'rank')} of {threads}" if "ranks" in result else f"ranks of {threads}"
    title = f"{ranks} on {where} ({count(machine['cores'], 'core')})"
    caption = f"{measured}; commit {result['commit']}: {result['command']}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", min_width=60)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right")
    return table


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def with_spread(spread: dict[str, float], unit: str = "") -> str:
    half = (spread["high"] - spread["low"]) / 2
    return f"{spread['median']:,.0f}{unit} ± {100 * half / spread['median']:.0f} %"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
