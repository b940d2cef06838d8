"""Writes files atomically, and arrays as .npz archives without pickle. Archives are read row by row."""

import contextlib
import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, NamedTuple

import numpy as np

CHUNK = 1 << 24  # bytes read at once
# The errors that reading a damaged file can raise: NumPy, zipfile and json have no common one.
UNREADABLE = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError,
    SyntaxError, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, TokenError,
)  # fmt: skip


class Entry(NamedTuple):
    """Size and checksum of a file, as in a manifest."""

    bytes: int
    sha256: str


class _HashingFile(io.RawIOBase):
    """A file that is only appended to. Its checksum is computed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha, self._bytes = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._sha.update(data)
        self._bytes += memoryview(data).nbytes
        self._file.write(data)
        return memoryview(data).nbytes

    def entry(self) -> Entry:
        return Entry(self._bytes, self._sha.hexdigest())


def write(path: Path, content: bytes) -> Entry:
    """Writes the file atomically: temporary name, fsync, rename, fsync of the directory."""
    with _replacing(path) as file:
        file.write(content)
    return Entry(len(content), hashlib.sha256(content).hexdigest())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], compress: bool = False) -> Entry:
    """Writes an .npz archive as `write` does, each array in pieces, to avoid a copy in memory."""
    with _replacing(path) as file:
        measured = _HashingFile(file)
        kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
        with zipfile.ZipFile(measured, "w", kind, allowZip64=True, compresslevel=1) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return measured.entry()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file. It replaces `path` if the block succeeds, and is deleted if not."""
    temporary = path.with_name(path.name + ".tmp")
    file = temporary.open("wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def entry_of(path: Path) -> Entry:
    """Size and checksum of a file on disk."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
            size += len(chunk)
    return Entry(size, sha.hexdigest())


class Rows:
    """One array of an archive. Iterating over it reads one row of its first axis at a time from disk."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        with self._open() as (_, self.shape, self.dtype):
            pass

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Any, tuple[int, ...], np.dtype]]:
        with zipfile.ZipFile(self._path) as archive, archive.open(f"{self._name}.npy") as member:
            yield (member, *_header(member))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        with self._open() as (member, shape, dtype):
            for _ in range(shape[0]):
                row = np.empty(shape[1:], dtype)
                _fill(member, row)
                yield row

    def read(self) -> np.ndarray:
        with self._open() as (member, shape, dtype):
            array = np.empty(shape, dtype)
            _fill(member, array)
            return array


def read_arrays(path: Path) -> dict[str, Rows]:
    """The arrays of an archive by name. Reading one raises one of UNREADABLE if the archive is damaged."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return {name.removesuffix(".npy"): Rows(path, name.removesuffix(".npy")) for name in names}


def _header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    if version != (1, 0):
        raise ValueError(f"an array of format {version}, which write_arrays does not write")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which would need pickle")
    if fortran:
        raise ValueError("an array in Fortran order, which write_arrays does not write")
    if any(length < 0 for length in shape):
        raise ValueError(f"an array of shape {shape}")
    return shape, dtype


def _fill(member: Any, array: np.ndarray) -> None:
    view = array.reshape(-1).view(np.uint8).data if array.nbytes else memoryview(b"")
    done = 0
    while done < len(view):
        count = member.readinto(view[done : done + CHUNK])
        if not count:
            raise EOFError(f"the array ends after {done:,} of {len(view):,} bytes")
        done += count
