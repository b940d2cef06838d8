"""The run directory: nobody's run is written over, but a job may make its own again."""

import pytest

from hvd_dqn.config import Config
from hvd_dqn.errors import InputError
from hvd_dqn.storage.run_directory import Run


def test_a_directory_is_made_again_only_by_the_job_that_is_running_in_it(tmp_path):
    run = Run(tmp_path / "run")
    run.create(Config(), {"size": 2})
    with pytest.raises(InputError, match=r"already holds a run.*--resume.*--run-dir"):
        run.create(Config(), {"size": 1})
    run.create(Config(seed=1), {"size": 1}, again=True)  # an elastic job that lost a rank before its first commit
    assert (run.about()["size"], run.config().seed) == (1, 1)
    run.note(ended="finished")
    with pytest.raises(InputError, match=r"already holds a run"):
        run.create(Config(), {"size": 1}, again=True)
