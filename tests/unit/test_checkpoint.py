"""A checkpoint exists when its manifest does, and nothing in it is believed unchecked."""

import json
import os

import numpy as np
import pytest

from hvd_dqn.checkpoint import MANIFEST, Checkpoints, Damaged, load, write
from hvd_dqn.distributed import Solo
from hvd_dqn.errors import InputError

ARRAYS = {"online/0": np.arange(5, dtype=np.float32), "optimizer/0": np.array(3, np.int64)}
STATE = {"updates": 7, "best": [1.5, 100]}


@pytest.fixture
def saved(tmp_path):
    Checkpoints(tmp_path, Solo()).save(100, ARRAYS, STATE)
    return tmp_path / "checkpoints" / "100"


def test_what_was_saved_is_loaded_field_by_field(saved):
    snapshot = load(saved)
    assert (snapshot.total_steps, snapshot.state) == (100, STATE)
    assert snapshot.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(snapshot.arrays[name], array)
        assert snapshot.arrays[name].dtype == array.dtype


def test_no_temporary_file_is_left(saved):
    assert sorted(os.listdir(saved)) == [MANIFEST, "model.npz", "state.json"]


@pytest.mark.parametrize("step", range(3))
def test_death_while_writing_leaves_the_checkpoint_before(step, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, Solo())
    checkpoints.save(100, ARRAYS, STATE)
    calls = []

    def dying(path, content):
        calls.append(path.name)
        if len(calls) > step:
            path.with_name(path.name + ".tmp").write_bytes(content[: len(content) // 2])
            raise OSError("no space left on device")
        write(path, content)

    monkeypatch.setattr("hvd_dqn.checkpoint.write", dying)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(200, ARRAYS, STATE)
    assert calls[-1] == ["model.npz", "state.json", MANIFEST][step]  # the manifest comes last
    assert checkpoints.newest(print).total_steps == 100
    monkeypatch.undo()
    checkpoints.save(200, ARRAYS, STATE)
    assert checkpoints.newest(print).total_steps == 200


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def escape(path):
    manifest = json.loads(path.read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("file", "harm", "complaint"),
    [
        ("model.npz", flip, "model.npz does not have the checksum"),
        ("state.json", flip, "state.json does not have the checksum"),
        ("model.npz", lambda path: path.write_bytes(path.read_bytes()[:-9]), "model.npz has .* bytes instead of"),
        ("model.npz", lambda path: path.unlink(), "model.npz is missing"),
        (MANIFEST, lambda path: path.unlink(), "MANIFEST.json is missing"),
        (MANIFEST, lambda path: path.write_text("[1, 2]"), "cannot be read"),
        (MANIFEST, lambda path: path.write_text("{"), "cannot be read"),
        (MANIFEST, escape, "outside of it"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_taken(file, harm, complaint, tmp_path):
    checkpoints, said = Checkpoints(tmp_path, Solo()), []
    checkpoints.save(100, ARRAYS, STATE)
    checkpoints.save(200, ARRAYS, STATE)
    harm(tmp_path / "checkpoints" / "200" / file)
    with pytest.raises(Damaged, match=complaint):
        load(tmp_path / "checkpoints" / "200")
    assert checkpoints.newest(said.append).total_steps == 100
    # Without a manifest there is no checkpoint to speak of.
    assert len(said) == (0 if "MANIFEST.json is missing" in complaint else 1)
    with pytest.raises(InputError, match="no usable checkpoint"):
        checkpoints.at(200)


def test_pickled_arrays_are_not_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path, Solo())
    checkpoints.save(100, {"online/0": np.array([{"a": 1}], dtype=object)}, STATE)
    with pytest.raises(Damaged, match="allow_pickle=False"):
        load(tmp_path / "checkpoints" / "100")


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, Solo(), keep=2)
    for steps in (100, 200, 300, 400, 1_000):
        checkpoints.save(steps, ARRAYS, STATE, best=200)
    assert sorted(int(name) for name in os.listdir(tmp_path / "checkpoints")) == [200, 400, 1_000]
    assert checkpoints.at(200).total_steps == 200


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert Checkpoints(tmp_path, Solo()).newest(print) is None
