"""A user who is not root, has no home, and can neither write the checkout nor, at times, run its .venv."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import ranks

PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGES = next(place for place in sys.path if place.endswith("site-packages"))
NOBODY = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--inh-caps=-all"]
PROGRAM = """#!{python}
import sys
from {module} import {function}
if __name__ == "__main__":
    sys.exit({function}())
"""


def python_for_all() -> str:
    """A Python of this version that every user may run; empty if there is none."""
    for place in (os.path.realpath(sys.executable), shutil.which(PYTHON, path="/usr/bin:/usr/local/bin")):
        command = [*NOBODY, "env", str(place), "-c", f"open({PACKAGES + '/numpy/__init__.py'!r})"]
        if place and subprocess.run(command, capture_output=True).returncode == 0:
            return str(place)
    return ""


pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv") or not shutil.which("mpirun") or not python_for_all(),
    reason="needs root, setpriv, mpirun and a Python that every user may run",
)


@pytest.fixture
def checkout():
    """One that belongs to root, with an environment beside it that all may use and a folder of nobody's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("launch", "hvd_dqn"):
            shutil.copytree(ranks.ROOT / part, folder / "clone" / part, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "env").mkdir()
        for program, module, function in [
            ("hvd-dqn", "hvd_dqn.cli", "main"),
            ("horovodrun", "horovod.runner.launch", "run_commandline"),
        ]:
            path = folder / "env" / program
            path.write_text(PROGRAM.format(python=python_for_all(), module=module, function=function))
            path.chmod(0o755)
        (folder / "work").mkdir()
        shutil.chown(folder / "work", "nobody")
        yield folder


def launch(checkout, script, *words, cwd="work", **env):
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{checkout / 'clone'}:{PACKAGES}", "OMP_NUM_THREADS": "1"}
    clean |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    variables = [f"{name}={value}" for name, value in (clean | env).items()]
    command = [*NOBODY, "env", "-i", *variables, checkout / "clone/launch" / script, *words]
    return ranks.run(command, cwd=checkout / cwd)


@pytest.mark.parametrize(("script", "home"), [("mpirun.sh", {}), ("horovodrun.sh", {"HOME": "/nonexistent"})])
def test_a_user_without_home_trains_from_a_checkout_that_cannot_be_written(script, home, checkout):
    words = ["-np", "2", "train", "identity", "--total-steps", "1000"]
    done = launch(checkout, script, *words, HVD_DQN_BIN=str(checkout / "env"), **home)
    assert done.returncode == 0, done.stderr
    assert "identity: return 10.0" in done.stdout
    (run,) = (checkout / "work/runs").iterdir()
    assert run.owner() == "nobody"


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh", "train.sh"])
@pytest.mark.parametrize("how", ["no environment", "closed environment", "link to a closed Python", "closed Python"])
def test_what_that_user_may_not_run_is_one_line_with_the_cure(how, script, checkout):
    venv = checkout / "clone/.venv"
    (venv / "bin").mkdir(parents=True)
    line = "found no hvd-dqn"
    if how == "closed environment":
        venv.chmod(0o700)
        line = f"nobody may not read {venv}: its owner can permit that by chmod -R go+rX"
    elif how != "no environment":
        (checkout / "secret").mkdir(mode=0o700)
        python = Path(shutil.copy("/bin/true", checkout / "secret/python"))
        if how == "link to a closed Python":
            python = venv / "bin/python"
            python.symlink_to(checkout / "secret/python")
        (venv / "bin/hvd-dqn").write_text(f"#!{python}\n")
        (venv / "bin/hvd-dqn").chmod(0o755)
        line = f"nobody may not run {python}"
    done = launch(checkout, script, *(["train"] if script != "train.sh" else []), "identity")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert line in done.stderr
    assert "You cannot write " in done.stderr
    assert "use a clone of your own" in done.stderr
