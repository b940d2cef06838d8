"""What other libraries write to stderr while they are imported."""

import os
import re
import subprocess
import sys

import pytest

from hvd_dqn import loading
from hvd_dqn.errors import InputError, RunError
from tests.ranks import ROOT

LOADS = """
import os, sys, types
import hvd_dqn.loading as loading
def noisy(name):
    os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n"
                b"I0000 port.cc:153] oneDNN custom operations are on. You may see slightly different results\\n"
                b"what matters\\n")
    if {fails}:
        raise ImportError("no such library")
loading.importlib = types.SimpleNamespace(import_module=noisy)
try:
    loading.load_tensorflow()
finally:
    os.write(2, b"afterwards\\n")
"""


def run(code, shell='exec "$@"'):
    command = ["bash", "-c", shell, "-", sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_start_up_notes_are_dropped_and_all_else_is_kept():
    done = run(LOADS.format(fails=False))
    assert (done.returncode, done.stderr) == (0, "what matters\nafterwards\n")


def test_an_import_that_fails_says_why_in_its_last_line_and_nothing_before():
    done = run(LOADS.format(fails=True))
    assert done.returncode == 1
    assert done.stderr.startswith("afterwards\nTraceback")
    last = done.stderr.splitlines()[-1]
    assert re.match(
        r"hvd_dqn.errors.LibraryError: tensorflow\S* [\d.]+ cannot be loaded: ImportError: no such library", last
    )


def test_a_process_without_stderr_can_load():
    done = run("import hvd_dqn.loading as loading; loading.load_tensorflow(); print('loaded')", shell='exec "$@" 2>&-')
    assert (done.returncode, done.stdout) == (0, "loaded\n")


NUMPY_1 = """raise ImportError('''
A module that was compiled using NumPy 1.x cannot be run in
NumPy 2.0.0 as it may crash.''')
"""


@pytest.mark.parametrize(
    "command", [["train", "cartpole"], ["presets"], ["bench", "learner"], ["doctor"], ["--version"]]
)
@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("numpy", {"numpy/__init__.py": NUMPY_1}),
        ("pydantic", {"pydantic.py": "raise AttributeError('no such thing')"}),
    ],
)
def test_a_broken_library_is_told_in_the_first_line_of_every_command_with_its_cure(command, library, files, tmp_path):
    done = with_files(files, command, tmp_path)
    (line,) = done.stderr.splitlines()
    assert re.match(rf"hvd-dqn: {library} [\d.]+ cannot be loaded: (Import|Attribute)Error: \S+", line), done.stderr
    assert line.endswith(
        f"This mends it: {sys.executable} -m pip install --force-reinstall --no-deps {library}=={pin(library)}"
    )
    assert done.returncode == 2
    # The doctor goes on with what needs neither.
    assert ("limits" in done.stdout) == (command == ["doctor"])


@pytest.mark.parametrize(
    ("command", "loads"), [(["train", "identity"], True), (["doctor"], True), (["presets"], False)]
)
def test_commands_that_need_tensorflow_tell_that_it_is_broken(command, loads, tmp_path):
    noise = (
        "import sys\nfor i in range(9): print('Traceback', file=sys.stderr)\nraise ImportError('undefined symbol: x')\n"
    )
    done = with_files({"tensorflow/__init__.py": noise}, command, tmp_path)
    if not loads:
        assert (done.returncode, done.stderr) == (0, "")
        return
    (line,) = done.stderr.splitlines()
    assert re.match(
        r"hvd-dqn: tensorflow-cpu [\d.]+ cannot be loaded: ImportError: undefined symbol: x\. This mends it", line
    )
    assert done.returncode == 2


def test_a_replaced_package_is_named_in_the_cure(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/constraints.txt").write_text("# pins\nnumpy==1.0\nnot-there==3\nrich==0.1\n")
    monkeypatch.setattr(loading, "PINS", tmp_path / "launch/constraints.txt")
    assert loading.replaced() == []  # not this environment's pins
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert [(package, pin) for package, _, pin in loading.replaced()] == [("numpy", "1.0"), ("rich", "0.1")]
    said = loading.explain("tensorflow", ImportError("numpy.core.multiarray failed to import"))
    assert re.search(r"numpy [\d.]+ is installed, and 1.0 belongs here. rich", said)
    assert said.endswith("-m pip install --force-reinstall --no-deps numpy==1.0 rich==0.1")


def test_outside_of_a_checkout_the_cure_asks_for_what_the_package_requires(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PINS", tmp_path / "none")
    assert re.search(r"--force-reinstall 'numpy\S*2\S*'$", loading.explain("numpy", ImportError("x")))


@pytest.mark.parametrize("error", [ValueError("wrong"), InputError("wrong"), RunError("lost")])
def test_other_errors_are_no_broken_library(error):
    with pytest.raises(type(error)) as raised, loading.loading():
        raise error
    assert raised.value is error


def with_files(files, command, folder):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    env = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    code = "from hvd_dqn.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *command], env=env, capture_output=True, text=True, cwd=folder, timeout=60
    )


def pin(package):
    return re.search(rf"^{package}==(.*)$", (ROOT / "launch/constraints.txt").read_text(), re.MULTILINE)[1]
