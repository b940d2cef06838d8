"""What other libraries write to stderr while they are imported."""

import re
import subprocess
import sys

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
