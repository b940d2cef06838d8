"""All scripts parse, and the set-up: what it refuses and what it says. Nothing is installed here."""

import configparser
import fcntl
import os
import re
import shutil
import subprocess

import pytest

from tests.unit.scripts import ROOT, copy_project, run, write_script

SCRIPTS = [
    ROOT / ".ci/run",
    *sorted(path for place in ("launch", "docker", "tests/*") for path in ROOT.glob(f"{place}/*.sh")),
]


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_says_what_it_does_and_is_strict(script):
    assert run("bash", "-n", script).stderr == ""
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")
    assert "set -euo pipefail" in lines
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    found = run("shellcheck", *SCRIPTS)
    assert found.returncode == 0, found.stdout


def test_every_requirement_is_pinned_once():
    pins = [line for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", pin) for pin in pins), pins
    names = [pin.split("==")[0] for pin in pins]
    assert len(names) == len(set(names))

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    for requirement in "\n".join(required).split("\n"):
        name = re.match(r"[\w.-]*", requirement).group().lower().replace("_", "-")
        assert not name or name in names, f"setup.cfg asks for {requirement}, launch/constraints.txt does not pin it"


def test_unsupported_python_is_answered_with_the_supported_ones(project, tmp_path):
    for minor in range(10, 14):  # as pyenv's shims do for versions that are not active
        name = f"python3.{minor}"
        write_script(tmp_path / "bin" / name, f"echo '{name}: command not found' >&2; exit 127")
    write_script(tmp_path / "bin" / "python3", "echo 3.14")
    done = run(project / "launch" / "setup.sh", env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert "Python 3.10 to 3.13 are supported" in done.stderr
    assert "python3 is 3.14" in done.stderr
    assert not (project / ".venv").exists()


def test_a_chosen_python_that_does_not_run_is_named(project):
    done = run(project / "launch" / "setup.sh", env={"PYTHON": "/nowhere/python3.11"})
    assert done.returncode == 1
    assert "Python 3.10 to 3.13 are supported" in done.stderr
    assert "/nowhere/python3.11 does not run" in done.stderr


def test_a_failed_step_ends_with_the_reason_and_the_place_of_its_log(project, tmp_path):
    fake = write_script(
        tmp_path / "python",
        'case "$*" in *print*) echo 3.11 ;; *ensurepip*) ;; *) echo "OSError: No space left"; exit 1 ;; esac',
    )
    done = run(project / "launch" / "setup.sh", env={"PYTHON": str(fake)})
    assert done.returncode == 1
    assert f"FAILED: {fake} -m venv" in done.stderr
    assert "No space left" in done.stderr
    log = project / ".venv" / "setup-logs" / "venv.log"
    assert done.stderr.rstrip().endswith(str(log))
    assert "No space left" in log.read_text()


def test_a_second_setup_waits_for_the_first(project):
    with (project / "launch" / "constraints.txt").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [project / "launch" / "setup.sh"],
            env={**os.environ, "PYTHON": "/nowhere/python3.11"},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert "Another set-up is running here" in second.stderr.readline()
            assert second.poll() is None
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
            said = second.communicate(timeout=60)[1]
    assert "/nowhere/python3.11 does not run" in said


def test_a_file_system_without_locks_is_no_reason_to_wait(project, tmp_path):
    write_script(tmp_path / "bin" / "flock", "exit 69")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = run(project / "launch" / "setup.sh", env={"PATH": path, "PYTHON": "/nowhere/python3.11"})
    assert "has no locks: start one set-up at a time" in done.stderr
    assert "/nowhere/python3.11 does not run" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc", path="/usr/bin:/bin") is not None, reason="the CUDA toolkit is installed")
def test_a_gpu_build_needs_cuda_and_hands_its_place_to_horovod(project, tmp_path):
    fake = write_script(
        tmp_path / "python",
        'case "$*" in *print*) echo 3.11 ;; *ensurepip*) ;; *) echo "CUDA: $HOROVOD_CUDA_HOME"; exit 1 ;; esac',
    )
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(fake)}
    without = run(project / "launch" / "setup.sh", "--gpu", env={**env, "CUDA_HOME": "/nowhere"})
    assert "a GPU build needs the CUDA 12 toolkit" in without.stderr
    assert not (project / ".venv").exists()
    write_script(tmp_path / "cuda" / "bin" / "nvcc", "")
    run(project / "launch" / "setup.sh", "--gpu", env={**env, "CUDA_HOME": str(tmp_path / "cuda")})
    assert f"CUDA: {tmp_path / 'cuda'}" in (project / ".venv" / "setup-logs" / "venv.log").read_text()


@pytest.mark.skipif(not (ROOT / ".venv" / ".ready").exists(), reason="no .venv made by launch/setup.sh")
def test_setup_of_a_ready_venv_does_nothing():
    before = (ROOT / ".venv" / ".ready").stat().st_mtime_ns
    done = run(ROOT / "launch" / "setup.sh")
    assert (done.returncode, done.stderr) == (0, "set-up: nothing to do, .venv is ready\n")
    assert (ROOT / ".venv" / ".ready").stat().st_mtime_ns == before


@pytest.mark.skipif(not (ROOT / ".venv" / ".ready").exists(), reason="no .venv made by launch/setup.sh")
def test_pip_in_the_venv_keeps_to_the_pins():
    done = run(ROOT / ".venv" / "bin" / "pip", "install", "--dry-run", "numpy==1.26.4")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert re.search(r"\(constraint\) numpy==2\.", said), said  # not for want of a network


def test_a_package_that_was_replaced_is_told_and_the_setup_repeated(project, tmp_path):
    fake = write_script(
        tmp_path / "python",
        'case "$*" in *print\\(*sys*) echo 3.12 ;; *" -e "*) exit 1 ;; esac',
    )
    venv = project / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").write_text(str(venv))
    (venv / "bin" / "python").symlink_to(fake)
    for name in ["numpy-2.5.5", "PyYAML-6.0.3", "ml_dtypes-0.6.0", "unknown-1.0"]:
        folder = venv / "lib" / "python3.12" / "site-packages" / f"{name}.dist-info"
        folder.mkdir(parents=True)
        (folder / "INSTALLER").touch()
    done = run(project / "launch" / "setup.sh", env={"PYTHON": str(fake)})
    assert re.findall("replaced since: .*", done.stderr) == ["replaced since: numpy 2.5.5 for 2.2.6"]
