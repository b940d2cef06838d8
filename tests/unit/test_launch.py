"""The launch scripts: what they refuse, what they say, what they pass on. Nothing is installed here."""

import configparser
import fcntl
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sh")), ROOT / ".ci" / "run"]


def run(*command, env=None):
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts in a project that has no .venv, seen by an environment that asks for nothing special."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "setup.cfg", root)
    return root


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    passed_on = (
        "SLURM_",
        "PBS_",
        "LSB_",
        "HVD_DQN_",
        "HOROVOD_",
        "NCCL_",
        "TF_",
        "OMP_",
        "XLA_",
        "MALLOC_",
        "OMPI_MCA_",
    )
    for name in ["PYTHON", "LD_LIBRARY_PATH", "PYTHONPATH", *os.environ]:
        if name in ("PYTHON", "LD_LIBRARY_PATH", "PYTHONPATH") or name.startswith(passed_on):
            monkeypatch.delenv(name, raising=False)


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
    for name in ["python3.10", "python3.11"]:  # as pyenv's shims do for versions that are not active
        write_script(tmp_path / "bin" / name, f"echo '{name}: command not found' >&2; exit 127")
    write_script(tmp_path / "bin" / "python3", "echo 3.12")
    done = run(project / "launch" / "setup.sh", env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert "Python 3.10 and 3.11 are supported" in done.stderr
    assert "python3 is 3.12" in done.stderr
    assert not (project / ".venv").exists()


def test_a_chosen_python_that_does_not_run_is_named(project):
    done = run(project / "launch" / "setup.sh", env={"PYTHON": "/nowhere/python3.11"})
    assert done.returncode == 1
    assert "Python 3.10 and 3.11 are supported" in done.stderr
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


@pytest.mark.skipif(not (ROOT / ".venv" / ".ready").exists(), reason="no .venv made by launch/setup.sh")
def test_setup_of_a_ready_venv_does_nothing():
    before = (ROOT / ".venv" / ".ready").stat().st_mtime_ns
    done = run(ROOT / "launch" / "setup.sh")
    assert (done.returncode, done.stderr) == (0, "set-up: nothing to do, .venv is ready\n")
    assert (ROOT / ".venv" / ".ready").stat().st_mtime_ns == before


@pytest.mark.parametrize("arguments", [[], ["-np"], ["-np", "2"], ["-np", "0", "cartpole"], ["-np", "two", "cartpole"]])
def test_train_without_preset_or_ranks_is_one_line_and_exit_code_2(arguments):
    done = run(ROOT / "launch" / "train.sh", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "[-np N] PRESET" in done.stderr


#  arguments                                           ranks  what `hvd-dqn train` receives
@pytest.mark.parametrize(
    ("arguments", "ranks", "passed"),
    [
        (["cartpole"],                                   "2", ["cartpole"]),
        (["-np", "4", "cartpole", "--seed", "3"],        "4", ["cartpole", "--seed", "3"]),
        (["cartpole", "--run-dir", "two words"],         "2", ["cartpole", "--run-dir", "two words"]),
        (["-np", "1", "--config", "my.yaml"],            "1", ["--config", "my.yaml"]),
    ],
)  # fmt: skip
def test_train_starts_the_ranks_and_returns_their_exit_code(project, path, arguments, ranks, passed):
    write_script(project / "launch" / "setup.sh", "")
    write_script(project / ".venv" / "bin" / "hvd-dqn", "")
    write_script(project / ".venv" / "bin" / "horovodrun", "printf '%s\\n' \"$@\"; exit 75")
    done = run(project / "launch" / "train.sh", *arguments, env={"PATH": path})
    assert done.returncode == 75
    received = done.stdout.splitlines()
    assert received[:2] == ["-np", ranks]
    assert received[received.index("hvd-dqn") :] == ["hvd-dqn", "train", *passed]
    assert f"horovodrun -np {ranks} " in done.stderr


@pytest.fixture
def path(tmp_path):
    """A PATH with an Open MPI that only tells its name, an ssh that fails as the real one does, and no other host known."""
    # Where mpirun is not the system's own, the ranks on other hosts must be told its place.
    write_script(tmp_path / "mpi" / "bin" / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
    write_script(tmp_path / "mpi" / "bin" / "id", "echo 1000")
    write_script(tmp_path / "mpi" / "bin" / "getent", "exit 2")
    write_script(tmp_path / "mpi" / "bin" / "ssh", "echo 'ssh: connect to host: Connection refused' >&2; exit 255")
    return f"{tmp_path / 'mpi' / 'bin'}:/usr/bin:/bin"


LOCAL = "TF_CPP_MIN_LOG_LEVEL=2 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_odls_base_sigkill_timeout=5"
FAR = (
    "OMPI_MCA_oob_tcp_keepalive_time=10 OMPI_MCA_oob_tcp_keepalive_intvl=5 OMPI_MCA_oob_tcp_keepalive_probes=3 "
    "OMPI_MCA_plm_rsh_agent={root}/launch/ssh.sh"
)
NETWORK = (
    "TF_CPP_MIN_LOG_LEVEL=2 NCCL_SOCKET_IFNAME=e0 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_odls_base_sigkill_timeout=5 "
    "OMPI_MCA_btl_tcp_if_include=e0 OMPI_MCA_oob_tcp_if_include=e0"
)
MPIRUN = "--bind-to none --map-by slot -mca pml ob1 -mca btl ^openib"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "horovodrun.sh train cartpole",
            f"{LOCAL} horovodrun -np 2 -H localhost:2 --mpi-args=-mca\\ orte_tag_output\\ 0 hvd-dqn train cartpole",
        ),
        (
            "horovodrun.sh --gloo -np 3 doctor --json",
            "TF_CPP_MIN_LOG_LEVEL=2 horovodrun -np 3 -H localhost:3 --gloo hvd-dqn doctor --json",
        ),
        (
            "horovodrun.sh -H a.x:2,b.x:2 -p 2222 -i {root}/setup.cfg --interface e0 --extra --verbose train cartpole",
            f"{NETWORK} OMPI_MCA_plm_rsh_args=-p\\ 2222\\ -i\\ {{root}}/setup.cfg {FAR} horovodrun -np 4 -H a.x:2,b.x:2 "
            "--network-interfaces e0 -p 2222 -i {root}/setup.cfg "
            "--mpi-args=-mca\\ orte_tag_output\\ 0\\ --prefix\\ {mpi} --verbose hvd-dqn train cartpole",
        ),
        (
            "horovodrun.sh --gloo -H a.x:2,b.x:2 --interface e0 -np 3 train cartpole",
            "TF_CPP_MIN_LOG_LEVEL=2 NCCL_SOCKET_IFNAME=e0 horovodrun -np 3 -H a.x:2,b.x:2 --network-interfaces e0 --gloo "
            "hvd-dqn train cartpole",
        ),
        (
            "mpirun.sh -np 2 bench learner",
            f"{LOCAL} mpirun -np 2 -H localhost:2 {MPIRUN} -x PATH -x TF_CPP_MIN_LOG_LEVEL hvd-dqn bench learner",
        ),
        (
            "mpirun.sh --hostfile {root}/hosts --extra --report-bindings --extra --timeout\\ 60 train cartpole --seed 3",
            f"{LOCAL} {FAR} mpirun -np 6 -H a.x:3,b.x:2,c.x:1 --prefix {{mpi}} {MPIRUN} -x PATH -x TF_CPP_MIN_LOG_LEVEL "
            "--report-bindings --timeout 60 hvd-dqn train cartpole --seed 3",
        ),
        (
            "mpirun.sh -H a.x:1,b.x:1 -p 2222 --interface e0 train cartpole",
            f"{NETWORK} OMPI_MCA_plm_rsh_args=-p\\ 2222 {FAR} mpirun -np 2 -H a.x:1,b.x:1 --prefix {{mpi}} {MPIRUN} "
            "-x NCCL_SOCKET_IFNAME -x PATH -x TF_CPP_MIN_LOG_LEVEL hvd-dqn train cartpole",
        ),
    ],
)
def test_a_dry_run_prints_the_command_and_starts_nothing(project, path, words, line):
    (project / "hosts").write_text("# ours\na.x slots=2\n\nb.x slots = 2  # two\na.x\nc.x\n")
    places = {"root": project, "mpi": path.split("/bin:")[0]}
    script, *arguments = shlex.split(words.format(**places))
    done = run(project / "launch" / script, "--dry-run", *arguments, env={"PATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"PATH={project}/.venv/bin:$PATH {line.format(**places)}\n"


def test_what_is_set_before_the_call_is_kept_and_travels(project, path):
    env = {"PATH": path, "HOROVOD_CYCLE_TIME": "1", "OMPI_MCA_mpi_yield_when_idle": "0", "PYTHONPATH": "/my"}
    done = run(project / "launch" / "mpirun.sh", "--dry-run", "train", "cartpole", env=env)
    assert "OMPI_MCA_mpi_yield_when_idle=0 " in done.stdout
    assert "-x HOROVOD_CYCLE_TIME -x PATH -x PYTHONPATH -x TF_CPP_MIN_LOG_LEVEL " in done.stdout


@pytest.mark.parametrize("script", ["horovodrun.sh", "mpirun.sh"])
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("", "expected what hvd-dqn shall do"),
        ("-np 2", "expected what hvd-dqn shall do"),
        ("--nodes 2 train cartpole", "unknown option --nodes"),
        ("-np", "-np needs a value"),
        ("-np two train cartpole", "-np takes a number of ranks, not two"),
        ("-np 0 train cartpole", "-np takes a number of ranks, not 0"),
        ("-p ssh train cartpole", "-p takes the number of ssh's port, not ssh"),
        ("-i /nowhere/key train cartpole", "no readable file /nowhere/key"),
        ("--hostfile /nowhere/hosts train cartpole", "no readable file /nowhere/hosts"),
        ("--hostfile /dev/null train cartpole", "/dev/null names no host"),
        ("--hostfile /dev/null -H a:1 train cartpole", "give one"),
        ("-H a:b train cartpole", "expected hosts as a:2,b:2 (name:slots), not a:b"),
        ("-H a:0 train cartpole", "not a:0"),
        ("-np 5 -H a:2,b:2 train cartpole", "5 ranks do not fit into the 4 slots of a:2,b:2"),
        ("-np 1 -H host.nowhere:1 train cartpole", "host.nowhere cannot be reached by ssh (ssh: connect to host: Conn"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(project, path, script, arguments, line):
    write_script(project / ".venv" / "bin" / "hvd-dqn", "")
    done = run(project / "launch" / script, *arguments.split(), env={"PATH": path})
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: ")
    assert line in done.stderr


@pytest.mark.parametrize("script", ["horovodrun.sh", "mpirun.sh"])
def test_without_venv_the_setup_is_named(project, path, script):
    done = run(project / "launch" / script, "train", "cartpole", env={"PATH": path})
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{project}/launch/setup.sh" in done.stderr


@pytest.mark.parametrize(
    ("mpirun", "script", "line"),
    [
        ("echo 'HYDRA build details'", "mpirun.sh", "mpirun is not Open MPI"),
        (None, "mpirun.sh", "no mpirun on PATH"),
        (None, "horovodrun.sh", "no mpirun on PATH"),
    ],
)
def test_an_mpi_that_cannot_do_it_is_named(project, tmp_path, mpirun, script, line):
    tools = tmp_path / "tools"
    for tool in ["bash", "dirname", "basename", "hostname", "id", "sort", "env"]:
        (tools / tool).parent.mkdir(exist_ok=True)
        (tools / tool).symlink_to(shutil.which(tool))
    if mpirun:
        write_script(tools / "mpirun", mpirun)
    done = run(project / "launch" / script, "train", "cartpole", env={"PATH": str(tools)})
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert line in done.stderr


@pytest.mark.parametrize(
    ("script", "env", "code"),
    [
        ("mpirun.sh", {}, 2),
        ("mpirun.sh", {"SLURM_JOB_ID": "7"}, 0),
        ("horovodrun.sh", {"SLURM_JOB_ID": "7"}, 2),  # it needs ssh even there
        ("mpirun.sh", {"OMPI_MCA_plm_rsh_agent": "rsh"}, 0),
    ],
)
def test_no_ssh_is_asked_for_where_mpirun_needs_none(project, path, script, env, code):
    for launcher in ["hvd-dqn", "horovodrun"]:
        write_script(project / ".venv" / "bin" / launcher, "")
    done = run(project / "launch" / script, "-H", "a.x:1,b.x:1", "train", "cartpole", env={"PATH": path, **env})
    assert done.returncode == code, done.stderr
    assert ("cannot be reached" in done.stderr) == (code == 2)


def test_a_host_that_lacks_the_shared_folders_is_named(project, path, tmp_path):
    write_script(project / ".venv" / "bin" / "hvd-dqn", "")
    write_script(tmp_path / "mpi" / "bin" / "ssh", 'case "${!#}" in true) ;; *) exit 1 ;; esac')
    done = run(project / "launch" / "mpirun.sh", "-H", "a.x:1,b.x:1", "train", "cartpole", env={"PATH": path})
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    for host in ("a.x", "b.x"):
        assert f"{host} does not see {project}/.venv and {os.getcwd()}" in done.stderr


@pytest.mark.parametrize("code", [0, 3, 255])
def test_the_ssh_of_mpirun_ends_as_ssh_does_and_at_once(tmp_path, code):
    write_script(tmp_path / "bin" / "ssh", f'printf "%s\\n" "$@"; exit {code}')
    done = run(
        ROOT / "launch" / "ssh.sh", "-p", "22", "a.x", " orted 'a b'", env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.splitlines()[-4:] == ["-p", "22", "a.x", " orted 'a b'"]
