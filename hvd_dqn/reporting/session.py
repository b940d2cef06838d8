"""Connects a run to its outputs: files, the display, and the last line."""

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from hvd_dqn.errors import InputError, tell
from hvd_dqn.reporting.plots import plot
from hvd_dqn.reporting.progress import Progress, open_stream, short
from hvd_dqn.reporting.writers import CsvWriter, TensorBoardWriter, Writers
from hvd_dqn.storage.checkpoint import Snapshot
from hvd_dqn.storage.run_directory import Run, differing, now
from hvd_dqn.training.build import counted
from hvd_dqn.training.evaluation import COLUMNS as EVALUATION_COLUMNS
from hvd_dqn.training.ledger import COLUMNS, COUNTED, Ledger, Row
from hvd_dqn.training.trainer import Record, Trainer


@dataclass
class ChiefSession:
    """Writes and shows the records of a run. As a context manager it records in run.json how the run ended."""

    run: Run
    trainer: Trainer
    reports: Writers
    evaluations: Writers
    display: Progress
    results: TextIO | None  # where the lines of the result are printed; None: nowhere

    def __enter__(self) -> "ChiefSession":
        return self

    def show(self, record: Record) -> None:
        if record.kind == "report":
            self.reports.write(record.row)
            self.display.update(record.row)
        elif record.kind == "evaluation":
            self.evaluations.write(record.row)
            self.display.evaluation(record.row)
        elif record.kind == "warning" and self.results is None:
            warnings.warn(record.text, RuntimeWarning, stacklevel=2)
        elif record.kind in ("message", "warning"):
            self.display.message(record.text)
        elif record.kind == "stopped":
            self._stop(record.row)
        else:
            self._finish(record.row)

    def _stop(self, row: Row) -> None:
        self.close()
        self.run.note(ended="stopped", finished=now(), stopped_at=row["total_steps"])
        self._conclude(
            f"{self.run.about()['preset']}: stopped on request after {row['total_steps']:,.0f} total steps and "
            f"{row['seconds']:.0f} s; continue with: hvd-dqn train --run-dir {self.run.path} --resume"
        )

    def _finish(self, row: Row) -> None:
        self.close()
        trainer, size = self.trainer, self.trainer.world.size
        best_return, best_steps = trainer.worker.best or (row["return_mean"], int(row["total_steps"]))
        self.run.note(ended="finished", finished=now(), result=row, best=(best_return, best_steps))
        try:
            plot([self.run.path], self.run.path / "curve.png")
        except InputError as error:  # the run itself has succeeded
            if self.results is None:
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            else:
                tell(str(error))
        self._conclude(f"{self.run.about()['preset']}: {where_the_time_went(trainer.worker.ledger)}")
        self._conclude(
            f"{self.run.about()['preset']}: return {short(row['return_mean'])} ± {short(row['return_std'])} over "
            f"{row['episodes']:.0f} episodes after {row['total_steps']:,.0f} total steps and {row['seconds']:.0f} s on "
            f"{size} rank{'s' * (size > 1)}; best evaluation {short(best_return)} at {best_steps:,}; see {self.run.path}"
        )

    def _conclude(self, text: str) -> None:
        """Prints a line of the result."""
        if self.results is not None:
            print(text, file=self.results, flush=True)

    def close(self) -> None:
        self.display.close()
        self.reports.close()
        self.evaluations.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # an error in here must not replace the one that ended the run
            with contextlib.suppress(OSError):
                self.close()
            with contextlib.suppress(InputError, OSError):
                self.run.note(ended=f"failed: {kind.__name__}: {error}", finished=now())


def where_the_time_went(ledger: Ledger) -> str:
    """The parts of this rank's time, the largest first. "idle" is only the wait before averaging."""
    spent = ledger.spent | {"rest": ledger.seconds - sum(ledger.spent.values())}
    parts = sorted(spent.items(), key=lambda part: -part[1])
    return "time: " + ", ".join(f"{100 * seconds / ledger.seconds:.0f} % {name}" for name, seconds in parts)


class NullSession(contextlib.nullcontext[None]):
    """The session of ranks other than the chief: shows and writes nothing."""

    def show(self, record: Record) -> None:
        pass


Session = ChiefSession | NullSession


def open_session(
    run: Run,
    name: str,
    trainer: Trainer,
    snapshot: Snapshot | None,
    results: TextIO | None,
    again: bool = False,
    started_from: Path | None = None,
) -> Session:
    """Creates the run directory or continues it. `again` replaces one from an unfinished start. Raises InputError.

    `started_from` is the checkpoint of a new run's first weights. Without a stream for `results` nothing is printed.
    """
    if trainer.world.rank != 0:
        return NullSession()
    config, world = trainer.config, trainer.world
    about = {
        "preset": name,
        "env": config.env.id,
        "seed": config.seed,
        "size": world.size,
        "scaling": config.ranks.scaling,
        "target_return": config.evaluation.target_return,
        "host": world.hostname,
        "plan": trainer.worker.describe(),
    }
    if started_from is not None:
        about["started_from"] = {"run": str(started_from.parents[1].resolve()), "total_steps": int(started_from.name)}
    reported = evaluated = None
    if snapshot is None:
        run.create(config, about, again)
    else:
        reported = snapshot.total_steps
        # An interrupted evaluation is repeated.
        evaluated = reported - bool(snapshot.state.get("evaluation_due"))
        changed = differing(run.config(), config)
        run.resume(config, about, reported)
    board, columns = run.path / "tensorboard", (*COLUMNS, *counted(config))
    reports = Writers(
        CsvWriter(run.path / "metrics.csv", columns, reported, optional=COUNTED),
        TensorBoardWriter(board / "training", reported),
    )
    evaluations = Writers(
        CsvWriter(run.path / "evaluations.csv", EVALUATION_COLUMNS, evaluated),
        TensorBoardWriter(board / "evaluation", evaluated),
    )
    display = Progress(trainer.worker.plan.total_steps, None if results is None else open_stream())
    display.plan(trainer.worker.describe())
    if started_from is not None:
        display.message(f"Starting from the weights of {started_from}.")
    if snapshot is not None:
        where = snapshot.path if snapshot.path.name else "the memory of the remaining ranks"
        ended = (
            f" The run had ended; it continues to {trainer.worker.plan.total_steps:,}."
            if snapshot.state.get("finished")
            else ""
        )
        settings = f" Changed settings: {', '.join(changed)}." if changed else ""
        display.message(f"Resuming from {where}.{ended}{settings}")
    return ChiefSession(run, trainer, reports, evaluations, display, results)
