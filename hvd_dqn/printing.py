"""Keeps what environments print apart from results, and short: a line in every step would drown the display."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import TextIO

MOST_LINES = 20


class FewLines(io.TextIOBase):
    """Passes the first `most` lines on to stderr, and drops the rest."""

    def __init__(self, most: int) -> None:
        self._left, self._is_told = most, most == 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True) if self._left or not self._is_told else []:
            if self._left == 0:
                sys.stderr.write(
                    f"hvd-dqn: The environment prints. What follows its first {MOST_LINES} lines is dropped.\n"
                )
                self._is_told = True
                break
            sys.stderr.write(line)
            self._left -= line.endswith("\n")
        return len(text)


@contextlib.contextmanager
def few_printed_lines(most: int = MOST_LINES) -> Iterator[TextIO]:
    """Inside, `most` lines that are printed reach stderr. Yields the stream for results, which is the stdout before."""
    results = sys.stdout
    with contextlib.redirect_stdout(FewLines(most)):
        yield results
