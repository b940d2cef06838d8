"""Archives are written whole or not at all, in one pass, and read back row by row without pickle."""

import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dqn.storage import arrays
from hvd_dqn.storage.arrays import UNREADABLE, entry_of, read_arrays, write, write_arrays

ARRAYS = {
    "a/matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "part": np.arange(24, dtype=np.int64).reshape(4, 6)[:, :5],  # a view whose rows do not touch
    "scalar": np.array(7),
    "empty": np.zeros((2, 0), np.uint8),
    "frames": np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5),
}


@pytest.mark.parametrize("compress", [False, True])
def test_arrays_come_back_bit_by_bit_as_numpy_reads_them_too(compress, tmp_path):
    entry = write_arrays(tmp_path / "a.npz", ARRAYS, compress)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        kinds = {member.compress_type for member in archive.infolist()}
    assert kinds == {zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED}
    assert entry == entry_of(tmp_path / "a.npz")
    read = read_arrays(tmp_path / "a.npz")
    assert list(read) == list(ARRAYS)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as by_numpy:
        for name, array in ARRAYS.items():
            rows = read[name]
            assert (rows.shape, rows.dtype) == (array.shape, array.dtype)
            assert np.array_equal(rows.read(), array)
            assert np.array_equal(by_numpy[name], array)
            if array.ndim:
                assert np.array_equal(np.array(list(rows)).reshape(array.shape), array)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("gap", [0, 8, 1 << 14])
def test_values_are_read_from_their_places_also_when_a_ring_wraps(compress, gap, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "GAP", gap)
    ring = np.arange(3 * 50 * 2, dtype=np.int16).reshape(3, 50, 2)
    write_arrays(tmp_path / "a.npz", {"before": np.ones(5), "ring": ring, "after": np.ones(5)}, compress)
    rows = read_arrays(tmp_path / "a.npz")["ring"]
    rows = pickle.loads(pickle.dumps(rows))
    for columns in ([], [7], [0, 1, 2], [3, 4, 9, 30, 31, 49], [48, 49, 0, 1], [20, 21, 10, 11]):
        for row in range(3):
            where = np.array(columns, np.int64)
            assert np.array_equal(rows[row, where], ring[row, where]), (row, columns)


def test_a_file_that_ends_early_is_told_when_its_end_is_read(tmp_path):
    path = tmp_path / "a.npz"
    write_arrays(path, {"ring": np.zeros((2, 1000), np.int64)})
    rows = read_arrays(path)["ring"]
    path.write_bytes(path.read_bytes()[:9_000])
    assert rows[0, np.arange(5)].tolist() == [0] * 5
    with pytest.raises(EOFError, match=r"ends after"):
        rows[1, np.arange(900, 905)]


def test_no_second_copy_of_an_array_is_made_in_memory(tmp_path):
    ring = np.ones((8, 1_000_000, 4), np.float32)  # 128 MB
    tracemalloc.start()
    write_arrays(tmp_path / "a.npz", {"ring": ring[:, :900_000]})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < ring.nbytes / 2
    tracemalloc.start()
    for row in read_arrays(tmp_path / "a.npz")["ring"]:
        assert row.shape == (900_000, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < ring.nbytes / 2


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.npz"
    write_arrays(path, {"a": np.zeros(3)})
    before = entry_of(path)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        write_arrays(path, {"a": np.zeros(3), "b": np.array([{}], dtype=object)})
    assert entry_of(path) == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", evil=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="Python objects"):
        read_arrays(tmp_path / "a.npz")


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in ARRAYS.items():
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    return buffer.getvalue()


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), st.floats(0, 1), st.booleans())
def test_a_damaged_archive_raises_only_what_is_announced(tmp_path_factory, changes, keep, cut):
    content = bytearray(archive())
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    path = tmp_path_factory.mktemp("fuzz") / "a.npz"
    write(path, bytes(content[: int(keep * len(content))] if cut else content))
    try:
        for rows in read_arrays(path).values():
            rows.read()
    except UNREADABLE:
        pass
