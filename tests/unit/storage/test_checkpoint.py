"""A checkpoint exists when its manifest does, and nothing in it is believed unchecked."""

import contextlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dqn.errors import JobError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.storage import checkpoint
from hvd_dqn.storage.arrays import entry_of
from hvd_dqn.storage.checkpoint import MANIFEST, Checkpoints, Damaged, divide, load, small

ARRAYS = {"online/0": np.arange(5, dtype=np.float32), "optimizer/0": np.array(3, np.int64)}
STATE = {"updates": 7, "best": [1.5, 100]}
PART = {
    "replay": {"frames": np.arange(6.0).reshape(2, 3), "rng": {"state": 2**100}},
    "envs": {"copies": {"frame": np.ones(2)}},
}
FILES = ["MANIFEST.json", "model.npz", "rank-00000.json", "replay-00000-of-00001.npz", "state.json"]


def save(folder: Path, steps: int = 100, **changes) -> Path:
    Checkpoints(folder, Solo()).save(steps, ARRAYS, STATE, **{"part": PART, **changes})
    return folder / "checkpoints" / str(steps)


def test_what_was_saved_is_loaded_field_by_field(tmp_path):
    snapshot = load(save(tmp_path))
    assert (snapshot.total_steps, snapshot.state, snapshot.ranks, snapshot.complete) == (100, STATE, 1, True)
    assert snapshot.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(snapshot.arrays[name], array)
        assert snapshot.arrays[name].dtype == array.dtype
    part = small(snapshot.part(0))
    assert part["replay"]["rng"] == PART["replay"]["rng"]
    assert np.array_equal(part["replay"]["frames"], PART["replay"]["frames"])
    assert np.array_equal(part["envs"]["copies"]["frame"], np.ones(2))


def test_arrays_leave_a_tree_by_their_paths():
    rest, arrays = divide({"a": {"b": np.ones(1), "c": {"d": None}}, "e": [1]})
    assert rest == {"a": {"c": {"d": None}}, "e": [1]}
    assert list(arrays) == ["a/b"]


def test_only_whole_files_are_there_afterwards(tmp_path):
    assert sorted(os.listdir(save(tmp_path))) == FILES


class Death(BaseException):
    """The process is gone: nothing after it runs."""


@pytest.mark.parametrize("moment", range(15))
def test_death_at_any_moment_leaves_the_checkpoint_before(moment, tmp_path, monkeypatch):
    save(tmp_path)
    calls = []

    def dying(name):
        real = getattr(os, name)

        def call(*arguments, **options):
            calls.append(name)
            if len(calls) > moment:
                raise Death
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", dying("fsync"))
    monkeypatch.setattr(os, "rename", dying("rename"))
    with pytest.raises(Death):
        save(tmp_path, 200)
    monkeypatch.undo()
    assert Checkpoints(tmp_path, Solo()).newest(print).total_steps == 100
    save(tmp_path, 200)
    assert Checkpoints(tmp_path, Solo()).newest(print).total_steps == 200


def test_a_full_disk_leaves_the_checkpoint_before_and_frees_its_place(tmp_path, monkeypatch):
    save(tmp_path)

    def full(path, *_):
        path.with_name(path.name + ".tmp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    with pytest.raises(JobError, match=r"checkpoints/200 cannot be written \(rank 0 on \S+: .*No space left"):
        save(tmp_path, 200)
    assert os.listdir(tmp_path / "checkpoints") == ["100"]


class TwoRanks(Solo):
    """A rank of two whose other one answers what it is told to."""

    def __init__(self, rank: int, other) -> None:
        super().__init__()
        self.rank, self.size, self.other = rank, 2, other

    def gather(self, value):
        return [value, self.other] if self.rank == 0 else [self.other, value]


def test_all_ranks_give_up_when_one_cannot_write(tmp_path):
    world = TwoRanks(0, (None, "rank 1 on b: [Errno 28] No space left on device"))
    with pytest.raises(JobError, match="rank 1 on b"):
        Checkpoints(tmp_path, world).save(100, ARRAYS, STATE, part=PART)
    assert not (tmp_path / "checkpoints" / "100").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


def escape(path):
    manifest = json.loads(path.read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(manifest))


def forget_replay(path):
    manifest = json.loads(path.read_text())
    del manifest["files"]["replay-00000-of-00001.npz"]
    path.write_text(json.dumps(manifest))


def of_another_run(path):
    save(path.parent.parent.parent / "other", part={"replay": {"frames": np.zeros((2, 3)), "rng": {}}})
    path.write_bytes((path.parent.parent.parent / "other/checkpoints/100" / path.name).read_bytes())


@pytest.mark.parametrize(
    ("file", "harm", "complaint"),
    [
        ("model.npz", flip, "model.npz does not have the checksum"),
        ("state.json", flip, "state.json does not have the checksum"),
        ("rank-00000.json", flip, "rank-00000.json does not have the checksum"),
        ("replay-00000-of-00001.npz", flip, "replay-00000-of-00001.npz does not have the checksum"),
        ("replay-00000-of-00001.npz", shorten, "replay-00000-of-00001.npz has .* bytes instead of"),
        ("replay-00000-of-00001.npz", of_another_run, "replay-00000-of-00001.npz"),
        ("model.npz", shorten, "model.npz has .* bytes instead of"),
        ("model.npz", Path.unlink, "model.npz is missing"),
        ("rank-00000.json", Path.unlink, "rank-00000.json is missing"),
        (MANIFEST, lambda path: path.write_text("[1, 2]"), "cannot be read"),
        (MANIFEST, lambda path: path.write_text("{"), "cannot be read"),
        (MANIFEST, escape, "outside of it"),
        (MANIFEST, forget_replay, "does not name replay-00000-of-00001.npz"),
        (MANIFEST, Path.unlink, None),  # without a manifest there is no checkpoint to speak of
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_taken(file, harm, complaint, tmp_path):
    said = []
    save(tmp_path)
    harm(save(tmp_path, 200) / file)
    assert Checkpoints(tmp_path, Solo()).newest(said.append).total_steps == 100
    assert len(said) == (complaint is not None)
    assert complaint is None or re.search(complaint, said[0])


@pytest.mark.parametrize("file", FILES[1:])
def test_of_two_ranks_one_checks_each_file(file, tmp_path):
    snapshot = load(save(tmp_path))
    flip(snapshot.path / file)
    found = [Checkpoints(tmp_path, TwoRanks(rank, None))._complaint_about(snapshot) for rank in (0, 1)]
    (complaint,) = filter(None, found)
    assert complaint.startswith(f"{file} does not have the checksum")


def test_pickled_arrays_are_not_loaded(tmp_path):
    path = save(tmp_path)
    np.savez(path / "model.npz", **{"online/0": np.array([{"a": 1}], dtype=object)})
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["model.npz"] = entry_of(path / "model.npz")._asdict()
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="Python objects"):
        load(path)


def test_the_newest_to_go_on_from_and_the_weights_of_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, Solo(), keep=2)
    for steps in (100, 200, 300):
        checkpoints.save(steps, ARRAYS, STATE, part=PART, best=250 if steps > 250 else None)
        if steps == 200:
            checkpoints.save(250, ARRAYS, STATE, resumable=False, best=250)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["200", "250", "300"]
    checkpoints.save(350, ARRAYS, STATE, resumable=False, best=350)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["200", "300", "350"]
    assert checkpoints.newest(print).total_steps == 300
    assert checkpoints.weights(None, print).total_steps == 350
    assert checkpoints.weights(200, print).total_steps == 200
    assert checkpoints.weights(50, print) is None


def test_what_a_dead_process_left_behind_is_cleared_away(tmp_path):
    (tmp_path / "checkpoints" / "150").mkdir(parents=True)
    (tmp_path / "checkpoints" / "150" / "replay-00000-of-00001.npz.tmp").write_bytes(b"half")
    save(tmp_path, 200)
    assert os.listdir(tmp_path / "checkpoints") == ["200"]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert Checkpoints(tmp_path, Solo()).newest(print) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["total_steps", "ranks", "complete", "files", None]), json_values)
def test_a_manifest_of_any_json_is_damaged_or_sound(tmp_path_factory, name, value):
    path = save(tmp_path_factory.mktemp("fuzz"))
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, name: value} if name else value))
    with contextlib.suppress(Damaged):
        load(path)
    Checkpoints(path.parent.parent, Solo()).newest(lambda text: None)


@pytest.mark.parametrize(
    ("ranks", "line"), [(2**60, "does not name replay-00000-of-"), (0, "0 ranks"), (-1, "-1 ranks")]
)
def test_a_manifest_of_an_impossible_number_of_ranks_is_damaged_at_once(ranks, line, tmp_path):
    path = save(tmp_path)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "ranks": ranks}))
    with pytest.raises(Damaged, match=line):
        load(path)


@given(st.binary(max_size=200))
def test_a_manifest_of_any_bytes_is_damaged(tmp_path_factory, content):
    path = save(tmp_path_factory.mktemp("fuzz"))
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(Damaged):
        load(path)


def test_an_old_checkpoint_that_cannot_be_removed_costs_no_new_one(tmp_path, monkeypatch):
    save(tmp_path)

    def refuse(*_, **__):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Checkpoints, "_prune", refuse)
    save(tmp_path, 200)
    assert Checkpoints(tmp_path, Solo()).newest(print).total_steps == 200


def test_a_checkpoint_that_is_amended_is_whole_at_every_moment(tmp_path):
    path = save(tmp_path)
    replay = (path / FILES[3]).read_bytes()
    checkpoints, seen = Checkpoints(tmp_path, Solo()), []
    write, unlink = checkpoint.write, Path.unlink

    def looking(act):
        def watched(*arguments, **named):
            seen.append(load(path).state["updates"])
            result = act(*arguments, **named)
            seen.append(load(path).state["updates"])
            return result

        return watched

    for updates in (8, 9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "write", looking(write))
            patch.setattr(Path, "unlink", looking(unlink))
            checkpoints.amend(100, STATE | {"updates": updates})
        snapshot = checkpoints.newest(print)
        assert (snapshot.state["updates"], snapshot.complete) == (updates, True)
        assert (path / FILES[3]).read_bytes() == replay
        assert len(os.listdir(path)) == len(FILES)
    assert seen == sorted(seen)
    assert set(seen) == {7, 8, 9}


def test_a_checkpoint_that_cannot_be_amended_stays_as_it_is(tmp_path, monkeypatch):
    path = save(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(JobError, match="No space left"):
        Checkpoints(tmp_path, Solo()).amend(100, STATE | {"updates": 8})
    assert load(path).state == STATE
