"""Saves and finds checkpoints: one exists when its manifest does."""

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvd_dqn.distributed import World
from hvd_dqn.errors import InputError

MANIFEST = "MANIFEST.json"


class Snapshot(NamedTuple):
    """What a checkpoint holds, in memory."""

    path: Path
    total_steps: int
    state: dict[str, Any]  # counters and statistics, of JSON's types
    arrays: dict[str, np.ndarray]  # the model's and optimizer's variables


class Damaged(Exception):
    """Says what is wrong with a checkpoint."""


def load(path: Path) -> Snapshot:
    """Reads a checkpoint and checks every file against its manifest. Raises Damaged.

    Runs no code from the files: JSON, and arrays without pickle.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        contents = {}
        for name, expected in manifest["files"].items():
            if Path(name).name != name:
                raise Damaged(f"its manifest names {name!r}, which lies outside of it")
            contents[name] = content = (path / name).read_bytes()
            if len(content) != expected["bytes"]:
                raise Damaged(f"{name} has {len(content):,} bytes instead of {expected['bytes']:,}")
            if hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise Damaged(f"{name} does not have the checksum in its manifest")
        with np.load(io.BytesIO(contents["model.npz"]), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return Snapshot(path, int(manifest["total_steps"]), json.loads(contents["state.json"]), arrays)
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise Damaged(f"it cannot be read ({type(error).__name__}: {error})") from None


class Checkpoints:
    """The checkpoints of a run directory: the newest `keep`, and the best by evaluation."""

    def __init__(self, run_dir: Path, world: World, keep: int = 3) -> None:
        self._directory, self._world, self._keep = run_dir / "checkpoints", world, keep

    def save(
        self, total_steps: int, arrays: dict[str, np.ndarray], state: dict[str, Any], best: int | None = None
    ) -> None:
        """Writes a checkpoint, or leaves a complete one of this step as it is. A collective; only the chief writes.

        `state` is made of JSON's types; `best` are the total steps of a checkpoint that is kept whatever its age.
        """
        target = self._directory / str(total_steps)
        if self._world.rank == 0:
            if not (target / MANIFEST).exists():
                target.mkdir(parents=True, exist_ok=True)
                content = io.BytesIO()
                np.savez(content, **arrays)
                files = {"model.npz": content.getvalue(), "state.json": json.dumps(state, indent=1).encode()}
                for name, data in files.items():
                    write(target / name, data)
                manifest = {
                    "total_steps": total_steps,
                    "ranks": self._world.size,
                    "files": {
                        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                        for name, data in files.items()
                    },
                }
                write(target / MANIFEST, json.dumps(manifest, indent=1).encode())
            self._prune(best)
        self._world.barrier()

    def _prune(self, best: int | None) -> None:
        for old in self._complete()[self._keep :]:
            if old.name != str(best):
                # The manifest goes first: a half-removed checkpoint is none.
                (old / MANIFEST).unlink()
                shutil.rmtree(old)

    def _complete(self) -> list[Path]:
        """The directories that have a manifest, newest first."""
        found = [manifest.parent for manifest in self._directory.glob(f"*/{MANIFEST}")]
        return sorted((path for path in found if path.name.isdecimal()), key=lambda p: int(p.name), reverse=True)

    def newest(self, say: Callable[[str], None]) -> Snapshot | None:
        """The newest undamaged checkpoint; damaged ones are told to `say` and skipped."""
        for path in self._complete():
            try:
                return load(path)
            except Damaged as damage:
                say(f"The checkpoint {path} is damaged: {damage}. Going back to the one before.")
        return None

    def at(self, total_steps: int) -> Snapshot:
        """The checkpoint of exactly these total steps. Raises InputError where there is none or it is damaged."""
        path = self._directory / str(total_steps)
        try:
            return load(path)
        except Damaged as damage:
            raise InputError(f"There is no usable checkpoint {path}: {damage}.") from None


def write(path: Path, content: bytes) -> None:
    """Makes the file appear whole or not at all: temporary name, fsync, rename, fsync of the directory."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
