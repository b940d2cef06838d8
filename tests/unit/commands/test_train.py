"""`hvd-dqn train`: options that do not go together are refused before anything large is loaded."""

import pytest

from hvd_dqn.commands.train import run
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--ranks.silence-seconds 9",
            r"^--ranks.silence-seconds is for the watchdog, which an --elastic job does not have",
        ),
        ("--ranks.stall-seconds 9", r"^--ranks.stall-seconds is for the watchdog.*Leave it out"),
        ("--ranks.scaling strong", r"--elastic needs --ranks.scaling weak"),
        ("", r"--elastic needs --run-dir"),
    ],
)
def test_what_an_elastic_job_cannot_use_is_refused(words, line, monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    with pytest.raises(InputError, match=line):
        run(["identity", "--elastic", *words.split()], Solo())
