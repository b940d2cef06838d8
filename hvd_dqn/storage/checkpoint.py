"""Saves and finds checkpoints. A checkpoint exists when its manifest does."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from hvd_dqn.errors import JobError
from hvd_dqn.ranks.world import World
from hvd_dqn.storage.arrays import UNREADABLE, Entry, Rows, entry_of, read_arrays, sync_directory, write, write_arrays

if TYPE_CHECKING:
    from hvd_dqn.storage.resharding import Survey

T = TypeVar("T")
MANIFEST, MODEL, STATE = "MANIFEST.json", "model.npz", "state.json"
AMENDED = "state-amended.json"  # and STATE again after another `amend`: the manifest names the one that counts


class Damaged(Exception):
    """A checkpoint is damaged; the message tells how."""


class Snapshot(NamedTuple):
    """A checkpoint: the part that all ranks share, in memory, and the path of each rank's own part on disk."""

    path: Path
    total_steps: int
    ranks: int  # the number of ranks that wrote it
    complete: bool  # whether it has the ranks' own parts
    state: dict[str, Any]  # counters and statistics, of JSON's types
    arrays: dict[str, np.ndarray]  # the model's and optimizer's variables
    files: dict[str, Entry]
    survey: "Survey | None" = None  # of its replays, if this number of ranks must redistribute them

    def part(self, rank: int) -> dict[str, Any]:
        """What this rank saved: a tree with `Rows` for arrays, which are read on use. Raises Damaged."""
        try:
            tree = json.loads((self.path / rank_file(rank)).read_text())
            for name, rows in read_arrays(self.path / replay_file(rank, self.ranks)).items():
                *branches, leaf = name.split("/")
                place = tree
                for branch in branches:
                    place = place.setdefault(branch, {})
                place[leaf] = rows
            return tree
        except UNREADABLE as error:
            raise Damaged(f"the part of rank {rank} cannot be read ({type(error).__name__}: {error})") from None


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def replay_file(rank: int, size: int) -> str:
    return f"replay-{rank:05d}-of-{size:05d}.npz"


def load(path: Path) -> Snapshot:
    """Reads what all ranks share and checks it against the manifest. The ranks' parts must exist. Raises Damaged.

    Runs no code from the files: they are JSON, and arrays without pickle.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        ranks, complete = int(manifest["ranks"]), bool(manifest["complete"])
        if ranks < 1:
            raise Damaged(f"its manifest names {ranks} ranks")
        files = {str(name): Entry(int(e["bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        state_file = AMENDED if AMENDED in files else STATE
        for name in files:
            if Path(name).name != name:
                raise Damaged(f"its manifest names {name!r}, which lies outside of it")
        # Not a list: a damaged manifest may claim more ranks than fit into memory.
        parts = (name for rank in range(ranks) for name in (rank_file(rank), replay_file(rank, ranks)))
        for name in itertools.chain([MODEL, state_file], parts if complete else []):
            if name not in files:
                raise Damaged(f"its manifest does not name {name}")
            if (path / name).stat().st_size != files[name].bytes:
                raise Damaged(f"{name} has {(path / name).stat().st_size:,} bytes instead of {files[name].bytes:,}")
        for name in (MODEL, state_file):
            verify(path / name, files[name])
        arrays = {name: rows.read() for name, rows in read_arrays(path / MODEL).items()}
        state = json.loads((path / state_file).read_text())
        if not isinstance(state, dict):
            raise Damaged(f"{state_file} holds no object")
        return Snapshot(path, int(manifest["total_steps"]), ranks, complete, state, arrays, files)
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except UNREADABLE as error:
        raise Damaged(f"it cannot be read ({type(error).__name__}: {error})") from None


def verify(file: Path, expected: Entry) -> None:
    """Raises Damaged unless the file has the size and the checksum of its manifest."""
    try:
        found = entry_of(file)
    except OSError as error:
        raise Damaged(f"{file.name} cannot be read ({error.strerror})") from None
    if found.bytes != expected.bytes:
        raise Damaged(f"{file.name} has {found.bytes:,} bytes instead of {expected.bytes:,}")
    if found.sha256 != expected.sha256:
        raise Damaged(f"{file.name} does not have the checksum in its manifest")


def divide(tree: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Separates the arrays from a tree of dictionaries. Their names are their paths: "envs/frame"."""
    rest: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, np.ndarray):
            arrays[prefix + name] = value
        elif isinstance(value, Mapping):
            rest[name], inner = divide(value, f"{prefix}{name}/")
            arrays |= inner
        else:
            rest[name] = value
    return rest, arrays


class Checkpoints:
    """The checkpoints of a run directory: the newest `keep`, and the weights of the best evaluation."""

    def __init__(self, run_dir: Path, world: World, keep: int = 3, compress: bool = False) -> None:
        self._directory, self._world = run_dir / "checkpoints", world
        self._keep, self._compress = keep, compress

    def save(
        self,
        total_steps: int,
        arrays: Mapping[str, np.ndarray],
        state: Mapping[str, Any],
        *,
        part: Mapping[str, Any] | None = None,
        resumable: bool = True,
        best: int | None = None,
    ) -> int:
        """Writes a checkpoint and returns its bytes. A collective. Raises JobError, on all ranks, if one cannot write.

        All ranks share `arrays` and `state` (JSON values), which the chief writes. `part` is a rank's own tree of both.
        A checkpoint that is not `resumable` is kept only as long as its total steps are `best`.
        """
        target = self._directory / str(total_steps)
        self._together(target, lambda: self._prepare(target) if self._world.rank == 0 else None)
        files: dict[str, Entry] = {}
        for each in self._together(target, lambda: {} if part is None else self._write_part(target, part)):
            files |= each

        def finish() -> None:
            if self._world.rank == 0:
                files[MODEL] = write_arrays(target / MODEL, arrays)
                files[STATE] = write(target / STATE, json.dumps(state, indent=1).encode())
                manifest = {
                    "total_steps": total_steps,
                    "ranks": self._world.size,
                    "complete": part is not None,
                    "resumable": resumable,
                    "files": {name: entry._asdict() for name, entry in sorted(files.items())},
                }
                write(target / MANIFEST, json.dumps(manifest, indent=1).encode())

        self._together(target, finish)
        if self._world.rank == 0:
            with contextlib.suppress(OSError):  # what cannot be removed now is removed after the next checkpoint
                self._prune(target, best)
        return sum(entry.bytes for entry in files.values())

    def amend(self, total_steps: int, state: Mapping[str, Any], *, best: int | None = None) -> None:
        """Replaces what all ranks share, besides the weights, in a checkpoint that this job has saved. A collective.

        The checkpoint exists all the time, as it was or as it becomes. Raises JobError, on all ranks, as `save` does.
        """
        target = self._directory / str(total_steps)

        def finish() -> None:
            if self._world.rank == 0:
                manifest = json.loads((target / MANIFEST).read_text())
                old, new = (AMENDED, STATE) if AMENDED in manifest["files"] else (STATE, AMENDED)
                entry = write(target / new, json.dumps(state, indent=1).encode())
                files = {name: each for name, each in manifest["files"].items() if name != old}
                manifest["files"] = dict(sorted({**files, new: entry._asdict()}.items()))
                write(target / MANIFEST, json.dumps(manifest, indent=1).encode())
                (target / old).unlink()

        self._together(target, finish, gives_up=False)
        if self._world.rank == 0:
            with contextlib.suppress(OSError):
                self._prune(target, best)

    def _together(self, target: Path, action: Callable[[], T], gives_up: bool = True) -> list[T]:
        """Does `action` on every rank. If one of them cannot write, all give up the checkpoint."""
        result, complaint = None, None
        try:
            result = action()
        except OSError as error:
            complaint = f"rank {self._world.rank} on {self._world.hostname}: {error}"
        answers = self._world.gather((result, complaint))
        complaints = [each[1] for each in answers if each and each[1]]
        if not complaints:
            return [each[0] for each in answers if each]
        if self._world.rank == 0 and gives_up:
            shutil.rmtree(target, ignore_errors=True)  # it would take the space that is missing
        self._world.barrier()
        raise JobError(
            f"The checkpoint {target} cannot be written ({'; '.join(complaints)}). The one before is untouched."
        )

    def _prepare(self, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        # These files are of a run that was resumed from an earlier checkpoint. Remove the manifest first: see `_prune`.
        (target / MANIFEST).unlink(missing_ok=True)
        for old in target.iterdir():
            old.unlink()
        sync_directory(target.parent)

    def _write_part(self, target: Path, part: Mapping[str, Any]) -> dict[str, Entry]:
        rank, size = self._world.rank, self._world.size
        rest, arrays = divide(part)
        return {
            rank_file(rank): write(target / rank_file(rank), json.dumps(rest).encode()),
            replay_file(rank, size): write_arrays(target / replay_file(rank, size), arrays, self._compress),
        }

    def _prune(self, target: Path, best: int | None) -> None:
        spared = {target.name, str(best)}
        resumable = [path for path in self._found() if _is_resumable(path)]
        spared |= {path.name for path in resumable[: self._keep]}
        for old in self._directory.iterdir():
            if old.name.isdecimal() and old.name not in spared:
                # Remove the manifest first: without it, a half-removed checkpoint does not exist.
                (old / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(old)

    def _found(self) -> list[Path]:
        """The directories that have a manifest, newest first."""
        found = [manifest.parent for manifest in self._directory.glob(f"*/{MANIFEST}")]
        return sorted((path for path in found if path.name.isdecimal()), key=lambda p: int(p.name), reverse=True)

    def newest(self, say: Callable[[str], None]) -> Snapshot | None:
        """The newest undamaged checkpoint to resume from, with every file checked. `say` reports damaged ones.

        A collective: the chief chooses, the ranks share the checking, and all return the same checkpoint.
        """
        paths: list[Path] = self._world.gather(self._found() if self._world.rank == 0 else [])[0]
        for path in paths:
            snapshot, complaint = None, None
            if self._world.rank == 0:
                try:
                    snapshot = load(path) if _is_resumable(path) else None
                except Damaged as damage:
                    complaint = str(damage)
            snapshot, complaint = self._world.gather((snapshot, complaint))[0]
            if snapshot is not None and snapshot.complete:
                complaint = self._complaint_about(snapshot)
            if complaint is not None:
                say(f"The checkpoint {path} is damaged: {complaint}. Going back to the one before.")
            elif snapshot is not None:
                return snapshot
        return None

    def _complaint_about(self, snapshot: Snapshot) -> str | None:
        """Each rank checks its share of the files. A collective."""
        complaint = None
        try:
            for name in sorted(snapshot.files)[self._world.rank :: self._world.size]:
                verify(snapshot.path / name, snapshot.files[name])
        except Damaged as damage:
            complaint = str(damage)
        return next((each for each in self._world.gather(complaint) if each), None)

    def weights(self, total_steps: int | None, say: Callable[[str], None]) -> Snapshot | None:
        """The newest undamaged checkpoint, or that of `total_steps`, without the ranks' parts. Not a collective."""
        for path in self._found():
            if total_steps in (None, int(path.name)):
                try:
                    return load(path)
                except Damaged as damage:
                    say(f"The checkpoint {path} is damaged: {damage}.")
        return None


def _is_resumable(path: Path) -> bool:
    """Whether a run can resume from it. True if the manifest cannot be read: `load` then raises the error."""
    try:
        return bool(json.loads((path / MANIFEST).read_text())["resumable"])
    except UNREADABLE:
        return True


def small(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with its `Rows` read into memory."""
    return {
        name: small(value) if isinstance(value, Mapping) else value.read() if isinstance(value, Rows) else value
        for name, value in tree.items()
    }
