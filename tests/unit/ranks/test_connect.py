"""A Horovod that cannot be used is found out before ranks depend on it."""

import json

import pytest
import tensorflow as tf

from tests.ranks import ROOT, run

SAME_MINOR = ".".join([*tf.__version__.split(".")[:2], "99"])


@pytest.mark.parametrize(
    ("built", "horovod", "tensorflow", "said"),
    [
        (tf.__version__, "", None, "None"),
        (SAME_MINOR, "", None, "None"),  # patches of one minor version fit each other
        (None, "", None, "None"),  # built by somebody else, without a word about its TensorFlow
        ("2.9.0", "", None, f"it was built with TensorFlow 2.9.0, but TensorFlow {tf.__version__} is installed"),
        (tf.__version__, "raise ImportError('undefined\\nsymbol')", None, "ImportError: undefined symbol"),
        (tf.__version__, "", "raise ImportError('numpy is too new')", "ImportError: numpy is too new"),
    ],
)
def test_a_horovod_that_does_not_fit_is_told_in_one_line(built, horovod, tensorflow, said, tmp_path):
    (tmp_path / "horovod/tensorflow").mkdir(parents=True)
    (tmp_path / "horovod/__init__.py").touch()
    (tmp_path / "horovod/tensorflow/__init__.py").write_text(horovod)
    if built:
        (tmp_path / "horovod/metadata.json").write_text(json.dumps({"tensorflow": built}))
    if tensorflow:
        (tmp_path / "tensorflow.py").write_text(tensorflow)
    command = ["python", "-c", "from hvd_dqn.ranks.world import horovod_misfit; print(horovod_misfit())"]
    done = run(command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.stdout == f"{said}\n", done.stderr
