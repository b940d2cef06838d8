"""Writes the rows of a run as CSV and for TensorBoard, and reads the CSV files back."""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from time import time

import numpy as np

from hvd_dqn.errors import InputError
from hvd_dqn.training.ledger import COLUMNS, Row


class Writers:
    """Several writers as one."""

    def __init__(self, *writers: "CsvWriter | TensorBoardWriter") -> None:
        self._writers = writers

    def write(self, row: Row) -> None:
        for writer in self._writers:
            writer.write(row)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class CsvWriter:
    """Writes a line per row and flushes it at once. NaN is an empty cell.

    With `append_after` an existing file is continued after that many total steps. Later rows are dropped, because the
    resumed run writes them again. Without it the file is replaced. Only in `optional` columns may the file differ: those of
    it and of `columns` are then in it, and rows without one have an empty cell.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str] = COLUMNS,
        append_after: int | None = None,
        optional: Sequence[str] = (),
    ) -> None:
        kept: list[str] = []
        self._columns = tuple(columns)
        if append_after is not None:
            self._columns, kept = _continued(path, self._columns, append_after, optional)
        header = ",".join(self._columns) + "\n"
        # Renamed into place, so that a crash in here loses no row from before the checkpoint.
        temporary = path.with_name(path.name + ".tmp")
        self._file = temporary.open("w", encoding="utf-8", newline="\n")
        self._file.writelines([header, *kept])
        self._file.flush()
        os.fsync(self._file.fileno())
        temporary.replace(path)

    def write(self, row: Row) -> None:
        self._file.write(",".join(_cell(row.get(column, math.nan)) for column in self._columns) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _cell(value: float) -> str:
    if isinstance(value, int | np.integer):
        return str(value)
    return "" if math.isnan(value) else f"{value:.6g}"


def _whole_lines(path: Path) -> list[str]:
    """The lines of `path`, without an incomplete last line from a process that died."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _continued(
    path: Path, columns: tuple[str, ...], total_steps: int, optional: Sequence[str]
) -> tuple[tuple[str, ...], list[str]]:
    """The columns of the file from now on, and its lines up to `total_steps`."""
    lines = _whole_lines(path) if path.exists() else []
    if not lines:
        return columns, []
    found = tuple(lines[0].rstrip("\n").split(","))
    if [name for name in found if name not in optional] != [name for name in columns if name not in optional]:
        raise InputError(
            f"Cannot continue {path}: it was written with other columns. "
            f"Expected: {','.join(columns)}. Received: {lines[0].strip()}."
        )
    steps = read_csv(path)["total_steps"]
    kept = [line.rstrip("\n").split(",") for line, step in zip(lines[1:], steps, strict=True) if step <= total_steps]
    columns += tuple(name for name in found if name not in columns)
    cells = (dict(zip(found, line, strict=True)) for line in kept)
    return columns, [",".join(row.get(name, "") for name in columns) + "\n" for row in cells]


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV file that we wrote, [rows] float64 each, NaN for empty cells."""
    expected = "Expected: a file like a run's metrics.csv."
    try:
        header, *rows = csv.reader(_whole_lines(path), strict=True)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Cannot read {path}: {error}. {expected}") from None
    except ValueError:
        raise InputError(f"{path} has no header line. {expected}") from None
    table = np.full((len(rows), len(header)), math.nan)
    for index, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"{path}, line {index + 2}: {len(row)} cells under {len(header)} columns. {expected}")
        for column, cell in enumerate(row):
            try:
                table[index, column] = float(cell) if cell else math.nan
            except ValueError:
                raise InputError(
                    f"{path}, line {index + 2}: `{header[column]}` is {cell!r}, not a number. {expected}"
                ) from None
    return {name: table[:, column] for column, name in enumerate(header)}


class TensorBoardWriter:
    """The same numbers for TensorBoard, one scalar per column, over total steps.

    Two writers at the same time need a directory each: TensorBoard follows only the newest file of a directory.

    `append_after` is as of `CsvWriter`: with it TensorBoard drops what earlier files say of later total steps.
    """

    def __init__(self, directory: Path, append_after: int | None = None) -> None:
        # TensorBoard's own writer: TensorFlow's grows by 1.4 kB of memory with every row.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._file = EventFileWriter(str(directory))
        # The first start of a directory begins a run. Each later one tells that what follows replaces what was at its step
        # or later.
        begins = SessionLog(status=SessionLog.SessionStatus.START)
        self._file.add_event(
            Event(wall_time=time(), step=0 if append_after is None else append_after + 1, session_log=begins)
        )
        self._file.flush()

    def write(self, row: Row) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        summary = Summary()
        for name, value in row.items():
            if name != "total_steps" and not math.isnan(value):
                summary.value.extend(scalar_pb(name, value).value)
        self._file.add_event(Event(wall_time=time(), step=int(row["total_steps"]), summary=summary))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
