"""Writes files atomically, and arrays as .npz archives without pickle. Archives are read row by row."""

import contextlib
import hashlib
import io
import math
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
GAP = 1 << 14  # bytes between two values that are read with them, because another read would take longer
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a member, section 4.3.7 of PKWARE's APPNOTE: the last two are lengths
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
    """One array of an archive on disk. Iterating over it reads one row of its first axis at a time.

    It can be sent to another rank, which then reads from the same file.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, begin: int | None) -> None:
        self._path, self._name, self.shape, self.dtype = path, name, shape, dtype
        self._begin = begin  # of the values in the file; None if they are compressed

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        with zipfile.ZipFile(self._path) as archive, archive.open(f"{self._name}.npy") as member:
            _header(member)
            yield member

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        with self._open() as member:
            for _ in range(self.shape[0]):
                row = np.empty(self.shape[1:], self.dtype)
                _fill(member, row)
                yield row

    def __getitem__(self, place: tuple[int, np.ndarray]) -> np.ndarray:
        """`rows[row, columns]` with ascending runs of columns, as from an array. Reads little more than these values."""
        row, columns = place
        values = np.empty((len(columns), *self.shape[2:]), self.dtype)
        if len(columns) == 0 or values.nbytes == 0:
            return values
        size = values[:1].nbytes
        with self._open_at(row) as (file, begin):
            # Values that lie close to each other are read together.
            bounds = np.flatnonzero((np.diff(columns) < 1) | (np.diff(columns) * size > GAP)) + 1
            for some in np.split(np.arange(len(columns)), bounds):
                first, last = int(columns[some[0]]), int(columns[some[-1]])
                read = np.empty((last - first + 1, *self.shape[2:]), self.dtype)
                file.seek(begin + first * size)
                _fill(file, read)
                values[some] = read[columns[some] - first]
        return values

    @contextlib.contextmanager
    def _open_at(self, row: int) -> Iterator[tuple[Any, int]]:
        """A file, and where this row begins in it."""
        offset = row * math.prod(self.shape[1:]) * self.dtype.itemsize
        if self._begin is None:
            with self._open() as member:
                # To read from a place, all before it is decompressed.
                yield member, member.tell() + offset
        else:
            with self._path.open("rb", buffering=0) as file:
                yield file, self._begin + offset

    def read(self) -> np.ndarray:
        with self._open() as member:
            array = np.empty(self.shape, self.dtype)
            _fill(member, array)
            return array


def read_arrays(path: Path) -> dict[str, Rows]:
    """The arrays of an archive by name. Reading one raises one of UNREADABLE if the archive is damaged."""
    arrays = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as member:
                shape, dtype = _header(member)
                header = member.tell()
            begin = None
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset)
                begin = info.header_offset + _local_header_bytes(file.read(LOCAL_HEADER.size)) + header
            arrays[name] = Rows(path, name, shape, dtype, begin)
    return arrays


def _local_header_bytes(header: bytes) -> int:
    """The bytes between a member's header in a zip file and its content: fixed, then the name, then extra fields."""
    *_, name, extra = LOCAL_HEADER.unpack(header)
    return LOCAL_HEADER.size + int(name) + int(extra)


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
