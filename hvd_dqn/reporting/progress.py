"""Shows the progress of a run: a live display on a terminal, else one aligned line per report."""

import contextlib
import errno
import io
import math
import os
import sys
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hvd_dqn.training.ledger import Row

REFRESH_SECONDS = 0.1  # at most ten frames per second: drawing must not slow the training down
HEADER_PERIOD = 20  # lines
RATE_REPORTS = 10  # used to estimate the time left

# Title, width and content of each column. Together 78 characters.
PLAIN: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("total steps", 12, lambda row: f"{row['total_steps']:,.0f}"),
    ("done", 6, lambda row: f"{row['done']:.0%}"),
    ("left", 9, lambda row: clock(row["left"])),
    ("steps/s", 9, lambda row: short(row["steps_per_second"])),
    ("updates/s", 11, lambda row: short(row["updates_per_second"])),
    ("epsilon", 9, lambda row: short(row["epsilon"])),
    ("return", 10, lambda row: short(row["return_mean"])),
    ("loss", 12, lambda row: short(row["loss"])),
)


def open_stream() -> TextIO:
    """The terminal that HVD_DQN_TTY names, else stderr.

    horovodrun passes its ranks' output through pipes; launch/train.sh therefore names the terminal in front of it.
    """
    try:
        device = os.open(os.environ.get("HVD_DQN_TTY", ""), os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return sys.stderr
    if os.isatty(device):
        return open(device, "w", encoding="utf-8", errors="replace")
    os.close(device)
    return sys.stderr


def short(value: float) -> str:
    """A number in a few characters: 0.0123, 487.5, 9,500 (of a count), 12.3k, -1.5M; `-` for NaN."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    if abs(value) < 10:
        return f"{value:.3g}"
    if abs(value) < 9_999.5:
        return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"
    for limit, unit in ((999_950, "k"), (999_950_000, "M")):
        if abs(value) < limit:
            return f"{value / limit * 999.95:.1f}{unit}"
    return f"{value / 1e9:.1f}G"


def clock(seconds: float) -> str:
    """mm:ss, from an hour on h:mm:ss."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


class Progress:
    """Shows a run on the chief, or nothing if there is no stream.

    If the stream breaks (the terminal is closed), the run continues without it.
    """

    def __init__(self, total_steps: int, stream: TextIO | None) -> None:
        self._total_steps = total_steps
        self._broken = stream is None
        self._stream = stream = stream or io.StringIO()
        self._recent: deque[tuple[float, float]] = deque(maxlen=RATE_REPORTS)  # (total steps, seconds)
        live = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._display: _LiveDisplay | _LogDisplay = _LiveDisplay(stream) if live else _LogDisplay(stream)

    def plan(self, rows: dict[str, str]) -> None:
        """The consequences of the settings, by name."""
        self._show(lambda: self._display.plan(rows))

    def update(self, row: Row) -> None:
        """A row of the ledger."""
        self._recent.append((row["total_steps"], row["seconds"]))
        derived = {
            "total": self._total_steps,
            "done": min(row["total_steps"] / self._total_steps, 1.0),
            "left": self._seconds_left(row),
        }
        self._show(lambda: self._display.update(row | derived))

    def _seconds_left(self, row: Row) -> float:
        (first_steps, first_seconds), (steps, seconds) = self._recent[0], self._recent[-1]
        rate = (steps - first_steps) / (seconds - first_seconds) if seconds > first_seconds else row["steps_per_second"]
        return max(self._total_steps - steps, 0) / rate if rate > 0 else math.inf

    def evaluation(self, row: Row) -> None:
        """A row of evaluations.csv."""
        self._show(lambda: self._display.evaluation(row))

    def message(self, text: str) -> None:
        self._show(lambda: self._display.message(text))

    def close(self) -> None:
        self._show(self._display.close)

    def _show(self, act: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            act()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self._stream.closed:
                raise
            self._broken = True
            self._display.give_up()
            if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO):
                self._redirect_to_null()

    def _redirect_to_null(self) -> None:
        """Redirects the broken stream to /dev/null. Otherwise Python would fail to flush it at exit."""
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)


class _LogDisplay:
    """One line per report, for a log file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rows = 0

    def message(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def plan(self, rows: dict[str, str]) -> None:
        width = max(map(len, rows), default=0)
        self.message("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))

    def update(self, row: Row) -> None:
        if self._rows % HEADER_PERIOD == 0:
            self.message("".join(f"{title:>{width}}" for title, width, _ in PLAIN))
        self._rows += 1
        self.message("".join(f"{cell(row):>{width}}" for _, width, cell in PLAIN))

    def evaluation(self, row: Row) -> None:
        self.message(
            f"evaluation at {row['total_steps']:,.0f} total steps: return {short(row['return_mean'])} "
            f"({short(row['return_min'])} to {short(row['return_max'])}) in {row['episodes']:.0f} episodes"
        )

    def close(self) -> None:
        pass

    def give_up(self) -> None:
        pass


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would exit the program here


class _LiveDisplay:
    """Three lines at the bottom of a terminal, redrawn in place. All other output scrolls above them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console = _Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        # Without a thread that redraws, because it could fail on its own. Other output to stderr appears above.
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=stream is sys.stderr
        )
        self._row: Row = {}
        self._evaluation: Row = {}
        self._drawn = -math.inf

    def message(self, text: str) -> None:
        self._measure()
        self._console.print(text, soft_wrap=True)

    def plan(self, rows: dict[str, str]) -> None:
        self._measure()
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(Text(name, style="dim"), Text(value))
        self._console.print(table)
        self._console.print()

    def update(self, row: Row) -> None:
        self._row = row
        if monotonic() - self._drawn >= REFRESH_SECONDS:
            self._draw()

    def evaluation(self, row: Row) -> None:
        self._evaluation = row
        if self._row:
            self._draw()

    def close(self) -> None:
        if self._row:
            self._draw(f"took {clock(self._row['seconds'])}")
        self._row = {}  # a second call shows nothing
        self._live.stop()

    def give_up(self) -> None:
        self._console.quiet = True
        # Restores sys.stderr. A display that broke while it started also fails to stop: rich pops an empty list.
        with contextlib.suppress(Exception):
            self._live.stop()

    def _measure(self) -> None:
        # Rich reads the size from stdin, stdout or stderr. Under horovodrun none of them is this terminal.
        with contextlib.suppress(OSError, ValueError):
            size = os.get_terminal_size(self._stream.fileno())
            self._console.size = size.columns or 80, size.lines or 25

    def _draw(self, remaining: str = "") -> None:
        self._measure()
        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor()  # a job that is killed could not restore the cursor
        self._live.update(self._picture(remaining or f"{clock(self._row['left'])} left"), refresh=True)
        self._drawn = monotonic()

    def _picture(self, remaining: str) -> Group:
        row, evaluation = self._row, self._evaluation
        top = Table.grid(padding=(0, 2), expand=True)
        top.add_column(width=4, no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        top.add_column(no_wrap=True, justify="right", min_width=10)
        top.add_row(
            Text(f"{row['done']:.0%}", style="bold"),
            ProgressBar(total=1.0, completed=row["done"], complete_style="green", finished_style="green"),
            Text(f"{short(row['total_steps'])} of {short(row['total'])} steps"),
            Text(remaining, style="bold"),
        )
        measured = f"{short(evaluation['return_mean'])} at {short(evaluation['total_steps'])}" if evaluation else "-"
        highest = "" if math.isnan(row["return_max"]) else f" (max {short(row['return_max'])})"
        below = Table.grid(padding=(0, 1))
        for width in (10, 8, 11, 22, 8, 8):
            below.add_column(width=width, no_wrap=True)
        speeds = ("steps/s", short(row["steps_per_second"])), ("updates/s", short(row["updates_per_second"]))
        returns = ("return", short(row["return_mean"]) + highest), ("evaluation", measured)
        others = ("loss", short(row["loss"])), ("epsilon", short(row["epsilon"]))
        for pairs in zip(speeds, returns, others, strict=True):
            below.add_row(
                *(text for name, value in pairs for text in (Text(name, style="dim"), Text(value, style="cyan")))
            )
        return Group(top, below)
