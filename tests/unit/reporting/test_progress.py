"""What a person sees: in a log, in a terminal, and when the terminal goes away."""

import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from contextlib import closing
from pathlib import Path

import pytest

from hvd_dqn.reporting.progress import Progress, clock, open_stream, short
from hvd_dqn.training.ledger import COLUMNS

PLAN = {"environment": "CartPole-v1", "global batch": "2 ranks x 64 = 128"}
EVALUATION = {"total_steps": 25_000, "episodes": 20, "return_mean": 487.0, "return_min": 450.0, "return_max": 500.0}


def row(total_steps, **others):
    values = {
        "total_steps": total_steps,
        "seconds": total_steps / 1000,  # 1,000 steps per second over the whole run
        "steps_per_second": 12_345.6,
        "updates_per_second": 1543.25,
        "epsilon": 0.05,
        "loss": 0.01234,
        "return_mean": 312.44,
        "return_max": 500.0,
    }
    return dict.fromkeys(COLUMNS, 0.0) | values | others


class Terminal:
    """A pseudo terminal of the given width; `screen` is what came out of it, without colours and cursor moves."""

    def __init__(self, columns):
        self._ours, theirs = pty.openpty()
        self.name = os.ttyname(theirs)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, columns, 0, 0))
        self.stream = os.fdopen(theirs, "w", encoding="utf-8")
        self._read = b""
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self):
        while True:
            try:
                self._read += os.read(self._ours, 4096)
            except OSError:  # EIO: the last writer closed it
                return

    def close(self):
        self.stream.close()
        self._reader.join(5)

    @property
    def screen(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._read.decode()).replace("\r\n", "\n").replace("\r", "\n")


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    made = []

    def make(columns=80):
        made.append(Terminal(columns))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_numbers_are_short():
    for value, expected in [
        (0.0, "0"),
        (0.012345, "0.0123"),
        (-7.25, "-7.25"),
        (487.46, "487.5"),
        (-110.0, "-110.0"),
        (9_500, "9,500"),
        (9_999.4, "9999.4"),
        (9_999.6, "10.0k"),
        (12_345.6, "12.3k"),
        (-123_456, "-123.5k"),
        (999_949, "999.9k"),
        (999_951, "1.0M"),
        (1_500_000, "1.5M"),
        (2_000_000_000, "2.0G"),
        (math.nan, "-"),
        (math.inf, "inf"),
    ]:
        assert short(value) == expected


def test_times_are_minutes_and_seconds_with_hours_in_front_where_needed():
    for seconds, expected in [
        (0, "00:00"),
        (59.6, "01:00"),
        (754, "12:34"),
        (3600, "1:00:00"),
        (180_061, "50:01:01"),
        (math.inf, "-"),
        (math.nan, "-"),
    ]:
        assert clock(seconds) == expected


def test_a_log_gets_one_aligned_line_per_report_with_the_numbers_under_their_titles():
    log = io.StringIO()
    with closing(Progress(50_000, log)) as progress:
        progress.plan(PLAN)
        progress.message("a word between")
        progress.update(row(1_000, return_mean=math.nan, loss=math.nan))
        progress.evaluation(EVALUATION)
        progress.update(row(26_000))
    assert log.getvalue().splitlines() == [
        "environment   CartPole-v1",
        "global batch  2 ranks x 64 = 128",
        "a word between",
        " total steps  done     left  steps/s  updates/s  epsilon    return        loss",
        "       1,000    2%    00:04    12.3k     1543.2     0.05         -           -",
        "evaluation at 25,000 total steps: return 487.0 (450.0 to 500.0) in 20 episodes",
        "      26,000   52%    00:24    12.3k     1543.2     0.05     312.4      0.0123",
    ]


def test_the_header_comes_again_every_twenty_lines():
    log = io.StringIO()
    progress = Progress(50_000, log)
    for step in range(1, 42):
        progress.update(row(step * 1000))
    headers = [i for i, line in enumerate(log.getvalue().splitlines()) if "total steps" in line]
    assert headers == [0, 21, 42]


def test_time_left_follows_the_rate_of_the_last_ten_reports():
    log = io.StringIO()
    progress = Progress(100_000, log)
    for report in range(1, 31):  # 100 steps per second at first, 1,000 after 10,000 steps
        seconds = report * 10 if report <= 10 else 100 + (report - 10)
        progress.update(row(report * 1000, seconds=seconds))
    assert log.getvalue().splitlines()[-1].split()[2] == "01:10"  # 70,000 steps at 1,000 per second


def test_a_run_that_takes_more_steps_than_asked_is_done_at_100_percent():
    log = io.StringIO()
    Progress(1_000, log).update(row(1_024))
    assert log.getvalue().splitlines()[-1].split()[:3] == ["1,024", "100%", "00:00"]


def test_a_terminal_shows_the_key_numbers_and_never_wraps(terminal):
    for columns in (60, 80, 120):
        screen = terminal(columns)
        with closing(Progress(50_000, screen.stream)) as progress:
            progress.plan(PLAN)
            progress.update(row(26_000))
            progress.evaluation(EVALUATION)
            progress.message("[rank 1/2] saved")
            progress.close()  # and once more where the with block ends
        screen.close()
        lines = [line.rstrip() for line in screen.screen.splitlines()]
        assert max(map(len, lines)) <= columns
        assert "environment   CartPole-v1" in lines
        assert "[rank 1/2] saved" in lines
        if columns >= 80:
            assert re.fullmatch(r"52%  +━+[╸╺]?━+  26\.0k of 50\.0k steps +took 00:26", lines[-3])
            assert lines[-2].split() == ["steps/s", "12.3k", "return", "312.4", "(max", "500.0)", "loss", "0.0123"]
            assert lines[-1].split()[2:] == ["evaluation", "487.0", "at", "25.0k", "epsilon", "0.05"]
            assert any("00:02 left" in line for line in lines)
            assert sum("took 00:26" in line for line in lines) == 2  # rich draws the last picture twice


def test_a_terminal_is_not_drawn_more_often_than_a_person_can_see(terminal):
    screen = terminal()
    progress = Progress(50_000, screen.stream)
    for step in range(1, 1001):
        progress.update(row(step * 10))
    progress.close()
    screen.close()
    assert 1 < screen.screen.count("steps/s") < 500
    assert "10.0k of 50.0k" in screen.screen  # the last row is shown in any case


def test_what_others_print_to_the_same_stderr_goes_above_the_display(terminal, monkeypatch):
    screen = terminal()
    monkeypatch.setattr(sys, "stderr", screen.stream)
    with closing(Progress(50_000, sys.stderr)) as progress:
        progress.update(row(1_000))
        print("a stray warning", file=sys.stderr)
    assert sys.stderr is screen.stream
    screen.close()
    lines = [line.rstrip() for line in screen.screen.splitlines()]
    assert "a stray warning" in lines
    assert lines[-1].startswith("updates/s")


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = terminal()
    Progress(50_000, screen.stream).update(row(1_000))
    screen.close()
    assert screen.screen.splitlines()[1].split()[:2] == ["1,000", "2%"]


def test_the_stream_is_the_terminal_that_the_launcher_names_else_stderr(terminal, monkeypatch, tmp_path):
    screen = terminal()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HVD_DQN_TTY", screen.name)
    with open_stream() as stream:
        assert stream.isatty()
        assert os.ttyname(stream.fileno()) == screen.name
    for name in ("", "not a tty", "/dev/null", str(tmp_path), str(tmp_path / "file")):
        monkeypatch.setenv("HVD_DQN_TTY", name)
        assert open_stream() is sys.stderr
    monkeypatch.delenv("HVD_DQN_TTY")
    assert open_stream() is sys.stderr


def test_a_reader_that_leaves_does_not_stop_the_run_nor_spoil_its_exit_code():
    program = """
import sys
from hvd_dqn.reporting.progress import Progress
from tests.unit.reporting.test_progress import PLAN, row

sys.stderr.isatty = lambda: sys.argv[1] == "terminal"
progress = Progress(50_000, sys.stderr)
progress.plan(PLAN)
if sys.argv[2] == "late":
    progress.update(row(500))
input()  # until the reader has left
for report in range(1, 9):
    progress.update(row(report * 1000))
progress.message("word")
progress.close()
print("finished")
"""
    for kind, moment in [("log", "early"), ("terminal", "early"), ("terminal", "late")]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, kind, moment],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])},
            text=True,
        )
        assert process.stderr is not None
        assert "environment" in process.stderr.readline()
        process.stderr.close()
        process.stderr = None
        out, _ = process.communicate("go\n", timeout=60)
        assert (out, process.returncode) == ("finished\n", 0), (kind, moment)


def test_a_terminal_that_is_closed_in_the_middle_silences_the_display(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for side in ("theirs", "ours"):
        ours, theirs = pty.openpty()
        stream = os.fdopen(theirs, "w", encoding="utf-8")
        progress = Progress(50_000, stream)
        progress.update(row(1_000))
        os.close(ours) if side == "theirs" else stream.close()
        for step in range(2, 5):
            progress.evaluation(EVALUATION | {"total_steps": step})
            progress.update(row(step * 1000))
        progress.message("word")
        progress.close()
        stream.close() if side == "theirs" else os.close(ours)


def test_a_mistake_of_ours_is_not_taken_for_a_broken_stream():
    progress = Progress(1_000, io.StringIO())
    with pytest.raises(ValueError, match="Unknown format code"):
        progress.evaluation(EVALUATION | {"total_steps": "many"})
    with pytest.raises(KeyError, match="loss"):
        progress.update({name: value for name, value in row(100).items() if name != "loss"})
