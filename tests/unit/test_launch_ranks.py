"""The scripts that start ranks: what they refuse, what they say, what they pass on. Nothing is started here."""

import os
import pty
import shlex
import shutil
import subprocess

import pytest

from tests.unit.scripts import ROOT, copy_project, run, write_script


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path)


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
            f"{LOCAL} horovodrun -np 2 -H localhost:2 --mpi-args=-mca\\ orte_tag_output\\ 0 -- hvd-dqn train cartpole",
        ),
        (
            "horovodrun.sh --gloo -np 3 doctor --json",
            "TF_CPP_MIN_LOG_LEVEL=2 horovodrun -np 3 -H localhost:3 --gloo hvd-dqn doctor --json",
        ),
        (
            "horovodrun.sh -H a.x:2,b.x:2 -p 2222 -i {root}/setup.cfg --interface e0 --extra --verbose train cartpole",
            f"{NETWORK} OMPI_MCA_plm_rsh_args=-p\\ 2222\\ -i\\ {{root}}/setup.cfg {FAR} horovodrun -np 4 -H a.x:2,b.x:2 "
            "--network-interfaces e0 -p 2222 -i {root}/setup.cfg "
            "--mpi-args=-mca\\ orte_tag_output\\ 0\\ --prefix\\ {mpi} --verbose -- hvd-dqn train cartpole",
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
    names = ("HOROVOD_A", "HVD_DQN_A", "LD_LIBRARY_PATH", "MALLOC_A", "NCCL_A", "OMP_A", "PATH", "PYTHONPATH", "TF_A",
             "TF_CPP_MIN_LOG_LEVEL", "XLA_A")  # fmt: skip
    env = {**dict.fromkeys(names, "1"), "PATH": path, "OMPI_MCA_mpi_yield_when_idle": "0", "MINE": "1", "XPATH": "1"}
    done = run(project / "launch" / "mpirun.sh", "--dry-run", "train", "cartpole", env=env)
    assert "OMPI_MCA_mpi_yield_when_idle=0 " in done.stdout
    assert f" {' '.join(f'-x {name}' for name in names)} hvd-dqn" in done.stdout


@pytest.mark.parametrize(("hosts", "shown"), [([], True), (["-H", "a.x:1"], False)])
def test_the_rank_that_draws_the_display_is_told_the_terminal_where_it_is_on_this_host(hosts, shown, project, path):
    master, terminal = pty.openpty()
    command = [project / "launch" / "mpirun.sh", *hosts, "--dry-run", "train", "cartpole"]
    done = subprocess.run(command, env={"PATH": path}, stdout=subprocess.PIPE, stderr=terminal, text=True, timeout=60)
    assert (f"HVD_DQN_TTY={os.ttyname(terminal)} " in done.stdout) == shown
    assert ("-x HVD_DQN_TTY " in done.stdout) == shown
    os.close(master), os.close(terminal)


@pytest.mark.parametrize(("devices", "travels"), [("", True), ("-1", True), ("0,1", False), ("GPU-8f", False)])
def test_that_no_gpu_is_to_be_seen_travels_and_which_ones_are_does_not(devices, travels, project, path):
    env = {"PATH": path, "CUDA_VISIBLE_DEVICES": devices}
    done = run(project / "launch" / "mpirun.sh", "--dry-run", "train", "cartpole", env=env)
    assert ("-x CUDA_VISIBLE_DEVICES hvd-dqn" in done.stdout) == travels


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
        ("-H a:b train cartpole", "expected hosts as a:2,b:2, not a:b"),
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
    asked = f"test -x {project}/.venv/bin/hvd-dqn && test -d {os.getcwd()}"
    write_script(tmp_path / "mpi" / "bin" / "ssh", f'[ "${{!#}}" != "{asked}" ]')
    done = run(project / "launch" / "mpirun.sh", "-H", "a.x:1,b.x:1", "train", "cartpole", env={"PATH": path})
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    for host in ("a.x", "b.x"):
        assert f"{host} does not see {project}/.venv and {os.getcwd()}" in done.stderr


@pytest.mark.parametrize("code", [0, 3, 255])
def test_the_ssh_of_mpirun_ends_as_ssh_does_and_at_once(tmp_path, code):
    write_script(tmp_path / "bin" / "ssh", f'printf "%s\\n" "$@"; exit {code}')
    mpirun = write_script(tmp_path / "bin" / "mpirun", f"{ROOT}/launch/ssh.sh -p 22 a.x \" orted 'a b'\"; exit $?")
    done = run(mpirun, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.splitlines()[-4:] == ["-p", "22", "a.x", " orted 'a b'"]
