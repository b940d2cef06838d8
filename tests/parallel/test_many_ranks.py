"""Jobs of 16 real ranks, on however few cores: they start, learn and stop, or are refused before they start."""

import json

import pytest

from hvd_dqn.storage.run_directory import Run
from tests.ranks import run

MANY = 16
# Ranks that share a core must hand it over while they wait.
CROWDED = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(MANY)]
HOROVODRUN = ["horovodrun", "-np", str(MANY)]


@pytest.mark.parametrize(
    "launcher", [MPIRUN, pytest.param(HOROVODRUN, marks=pytest.mark.slow)], ids=lambda words: words[0]
)
def test_identity_checks_sixteen_ranks(launcher, tmp_path):
    command = ["hvd-dqn", "train", "identity", "--run-dir", tmp_path / "run", "--checkpoint.save-replay", "false"]
    done = run([*launcher, *command], timeout=600, **CROWDED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 16 ranks" in done.stdout
    about = Run(tmp_path / "run").about()
    assert (about["size"], about["result"]["return_mean"]) == (MANY, 10.0)
    (manifest, *_) = (tmp_path / "run/checkpoints").glob("*/MANIFEST.json")
    assert json.loads(manifest.read_text())["ranks"] == MANY


def test_what_sixteen_ranks_cannot_carry_out_is_said_once_before_they_connect(tmp_path):
    done = run(
        [*MPIRUN, "hvd-dqn", "train", "identity", "--ranks.scaling", "strong", "--run-dir", tmp_path / "run"], **CROWDED
    )
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "hvd-dqn: " in line]
    assert "4 on 16 ranks" in said
    assert not (tmp_path / "run").exists()
