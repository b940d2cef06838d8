"""The scripts that start ranks: what they refuse, what they say, what they pass on. Nothing is started here."""

import json
import os
import pty
import shlex
import shutil
import subprocess

import pytest

from tests.ranks import BIN
from tests.unit.scripts import ROOT, copy_project, run, write_script


@pytest.fixture
def project(tmp_path):
    """The scripts in a clone whose .venv has programs that do nothing."""
    project = copy_project(tmp_path)
    for program in ("hvd-dqn", "horovodrun"):
        write_script(project / ".venv" / "bin" / program, "")
    return project


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
NAMES = "OMPI_MCA_orte_keep_fqdn_hostnames=1"
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
            f"{NETWORK} {NAMES} OMPI_MCA_plm_rsh_args=-p\\ 2222\\ -i\\ {{root}}/setup.cfg {FAR} "
            "horovodrun -np 4 -H a.x:2,b.x:2 --network-interfaces e0 -p 2222 -i {root}/setup.cfg "
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
            f"{LOCAL} {NAMES} {FAR} mpirun -np 6 -H a.x:3,b.x:2,c.x:1 --prefix {{mpi}} {MPIRUN} "
            "-x PATH -x TF_CPP_MIN_LOG_LEVEL --report-bindings --timeout 60 hvd-dqn train cartpole --seed 3",
        ),
        (
            "mpirun.sh -H a.x:1,b.x:1 -p 2222 --interface e0 train cartpole",
            f"{NETWORK} {NAMES} OMPI_MCA_plm_rsh_args=-p\\ 2222 {FAR} mpirun -np 2 -H a.x:1,b.x:1 --prefix {{mpi}} {MPIRUN} "
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


LAUNCHERS = ["horovodrun.sh", "mpirun.sh"]


@pytest.mark.parametrize("script", LAUNCHERS)
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
    done = run(project / "launch" / script, *arguments.split(), env={"PATH": path})
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: ")
    assert line in done.stderr


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
    for tool in ["bash", "dirname", "basename", "hostname", "id", "sort", "env", "tail"]:
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
    done = run(project / "launch" / script, "-H", "a.x:1,b.x:1", "train", "cartpole", env={"PATH": path, **env})
    assert done.returncode == code, done.stderr
    assert ("cannot be reached" in done.stderr) == (code == 2)


def test_a_host_that_lacks_the_shared_folders_is_named(project, path, tmp_path):
    asked = f"test -x {project}/.venv/bin/hvd-dqn && test -d {os.getcwd()}"
    write_script(tmp_path / "mpi" / "bin" / "ssh", f'[ "${{!#}}" != "{asked}" ]')
    done = run(project / "launch" / "mpirun.sh", "-H", "a.x:1,b.x:1", "train", "cartpole", env={"PATH": path})
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    for host in ("a.x", "b.x"):
        assert f"{host} does not see {project}/.venv/bin/hvd-dqn and {os.getcwd()}" in done.stderr


def dry_run(project, path, *words, script="mpirun.sh", **env):
    """What the launcher would start, as one line; what it says, if it refuses."""
    done = run(project / "launch" / script, *words, "--dry-run", "train", "cartpole", env={"PATH": path, **env})
    assert (done.returncode, len(done.stderr.splitlines())) in [(0, 0), (2, 1)], done.stderr
    return done.stdout + done.stderr


# ---- Hosts ----
#  lines of a hostfile                                          ranks and hosts
HOSTFILES = [
    ("a.x slots=2\r\nb.x slots=3\r\n",                          "5 -H a.x:2,b.x:3"),
    ("\ufeffa slots=2\n",                                       "2 -H a:2"),
    ("a\tslots\t=\t2\t# two\n\n \t\n#b slots=9",                "2 -H a:2"),
    ("a slots= 2#two\nb slots =1",                              "3 -H a:2,b:1"),
    ("a slots=2 max_slots=4\nb max-slots = 2 slots = 2",        "4 -H a:2,b:2"),
    ("a:2\nb\nb\nb",                                            "5 -H a:2,b:3"),
    ("a slots=2\nb slots=1\na slots=1",                         "4 -H a:3,b:1"),
    ("10.0.0.1 slots=2\nn_1.rack-2.site.org",                   "3 -H 10.0.0.1:2,n_1.rack-2.site.org:1"),
]  # fmt: skip


def test_a_hostfile_is_taken_as_it_is_found(project, path):
    for lines, taken in HOSTFILES:
        (project / "my hosts").write_bytes(lines.encode())
        assert f" mpirun -np {taken} " in dry_run(project, path, "--hostfile", project / "my hosts"), lines


NO_HOSTS = [
    ("a slots=0", "not `a slots=0`"),
    ("a slots=two", "not `a slots=two`"),
    ("a slots", "not `a slots`"),
    ("a 2", "not `a 2`"),
    ("a:2 slots=2", "not `a:2 slots=2`"),
    ("a slots=2 slots=3", "not `a slots=2 slots=3`"),
    ("a max_slots=2", "not `a max_slots=2`"),
    ("a slots=4 max_slots=2", "not `a slots=4 max_slots=2`"),
    ("a slots=99999999999999999999", "not `a slots=99999999999999999999`"),
    ("-oProxyCommand=date", "not `-oProxyCommand=date`"),
    ("hôte slots=1", "not `hôte slots=1`"),
    ("me@a slots=2", "not `me@a slots=2`, since ssh's user belongs in ~/.ssh/config (Host a, User me)"),
    ("me@a.x:2", "(Host a.x, User me)"),
    ("[::1]:2", "not `[::1]:2`, an IPv6 address"),
    (
        "fe80::1 slots=2",
        "an IPv6 address, which Open MPI's and Horovod's lists of hosts have not: give the host's name",
    ),
]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_line_that_names_no_host_is_refused_with_its_number(script, project, path):
    for entry, line in NO_HOSTS:
        (project / "hosts").write_text(f"# ours\nb slots=2\n{entry}\n")
        said = dry_run(project, path, "--hostfile", project / "hosts", script=script)
        expected = "expected `host`, `host slots=2` or `host:2`, "
        assert said.startswith(f"{script}: {project}/hosts, line 3: {expected}"), said
        assert line in said


@pytest.mark.parametrize(
    ("hosts", "line"),
    [
        ("me@a:2,b", "not me@a:2, since ssh's user belongs in ~/.ssh/config (Host a, User me)"),
        ("[::1]:2", "not [::1]:2, an IPv6 address"),
        ("a:2,*", "not *."),
        (",", "not ,."),
        ("a:1000000", "not a:1000000."),
    ],
)
def test_a_word_that_names_no_host_is_refused(hosts, line, project, path):
    assert f"expected hosts as a:2,b:2, {line}" in dry_run(project, path, "-H", hosts)


def test_a_host_that_is_named_twice_has_the_slots_of_both_and_blanks_are_taken(project, path):
    assert " -np 6 -H a:3,b:3 " in dry_run(project, path, "-H", "a:2, b:3,a")


def test_many_hosts_are_folded_where_they_are_shown(project, path):
    hosts = ",".join(f"n{number}:1" for number in range(300))
    said = dry_run(project, path, "-H", hosts, "-np", "301")
    assert "301 ranks do not fit into the 300 slots of n0:1,n1:1,n2:1,297 more hosts: lower -np" in said


@pytest.mark.parametrize(("host", "kept"), [("a", False), ("a.x", True), ("10.0.0.1", False)])
def test_open_mpi_is_told_to_keep_the_domain_of_names_that_have_one(host, kept, project, path):
    assert ("OMPI_MCA_orte_keep_fqdn_hostnames=1" in dry_run(project, path, "-H", f"{host}:1,b:1")) == kept


# ---- What is shown ----
@pytest.mark.parametrize("script", LAUNCHERS)
def test_the_command_is_shown_in_short_and_whole_on_request(script, project, path):
    words = ["-np", "2", "train", "--config", "my file.yaml"]
    short, whole = (
        run(project / "launch" / script, *options, *words, env={"PATH": path}).stderr for options in ([], ["--verbose"])
    )
    name, folder = script.removesuffix(".sh"), project / ".venv" / "bin"
    command = f"{name} -np 2 -H localhost:2 ... hvd-dqn train --config my\\ file.yaml"
    assert short == f"+ {command}   (from {folder}; --verbose shows all)\n"
    dry = run(project / "launch" / script, "--dry-run", *words, env={"PATH": path}).stdout
    assert whole == f"+ {dry}"
    assert "OMPI_MCA_odls_base_sigkill_timeout=5" in whole


# ---- The environment that has hvd_dqn ----
@pytest.fixture
def places(tmp_path, project, path):
    """Environments that each have a hvd-dqn, by name, and the variables that choose one."""
    found = {"clone": project / ".venv" / "bin"}
    for name in ("named", "virtual", "conda env", "on path"):
        found[name] = write_script(tmp_path / name / "bin" / "hvd-dqn", "").parent
    variables = {
        "named": ("HVD_DQN_BIN", str(found["named"])),
        "virtual": ("VIRTUAL_ENV", str(found["virtual"].parent)),
        "conda env": ("CONDA_PREFIX", str(found["conda env"].parent)),
        "on path": ("PATH", f"{path}:{found['on path']}"),
    }
    return found, variables


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ([], "clone"),
        (["on path"], "on path"),
        (["on path", "conda env"], "conda env"),
        (["on path", "conda env", "virtual"], "virtual"),
        (["on path", "conda env", "virtual", "named"], "named"),
    ],
)
def test_the_environment_is_the_one_that_is_named_else_an_active_one_else_the_clones(
    there, taken, places, project, path
):
    found, variables = places
    env = {"PATH": path, **dict(variables[name] for name in there)}
    line = run(project / "launch" / "mpirun.sh", "--dry-run", "train", "cartpole", env=env).stdout
    assert line.startswith(f"PATH={str(found[taken]).replace(' ', chr(92) + ' ')}:$PATH "), line


def test_an_active_environment_without_hvd_dqn_is_passed_over(project, path, tmp_path):
    (tmp_path / "empty" / "bin").mkdir(parents=True)
    assert f"PATH={project}/.venv/bin:" in dry_run(project, path, VIRTUAL_ENV=f"{tmp_path}/empty", CONDA_PREFIX="/gone")


def test_the_program_may_be_named_itself(places, project, path):
    found, _ = places
    assert f"PATH={found['named']}:" in dry_run(project, path, HVD_DQN_BIN=f"{found['named']}/hvd-dqn")


def test_a_path_on_which_it_is_found_stays_as_it_is(places, project, path):
    """The order in which a user loaded modules and environments decides whose mpirun is taken."""
    found, _ = places
    write_script(found["on path"] / "mpirun", "echo not this one")
    mpirun = write_script(project.parent / "mpi" / "bin" / "mpirun", 'echo "Open MPI"; echo "$PATH"')
    wanted = f"{mpirun.parent}:{found['on path']}:/usr/bin:/bin"
    done = run(project / "launch" / "mpirun.sh", "train", "cartpole", env={"PATH": wanted})
    assert done.stdout.splitlines()[-1] == wanted


BROKEN = [
    ("none", "found no hvd-dqn: activate an environment that has it, or name its folder by HVD_DQN_BIN. Run {0}/launch/set"),
    ("wrong name", "HVD_DQN_BIN names the folder of hvd-dqn, and there is none that can be run in /usr."),
    ("moved", "/hvd-dqn needs {0}/old/bin/python3, which is gone: this folder was moved. Run {0}/launch/setup.sh."),
    ("moved, with blanks", "/hvd-dqn needs {0}/old place/bin/python3, which is gone: this folder was moved."),
    ("copied", "/hvd-dqn belongs to another checkout, that of {0}/other/bin/python: this one was copied. Run"),
    ("closed", "may not run {0}/.venv/bin/python (secret). Run {0}/launch/setup.sh with a PYTHON that you may run."),
    ("broken", "/hvd-dqn cannot start: ImportError: libpython3.so: no such file. Run {0}/launch/setup.sh."),
    ("active and broken", "cannot start: ImportError: libpython3.so: no such file. Make that environment again, or name"),
]  # fmt: skip


def break_program(how, project, env):
    folder = project / ".venv" / "bin"
    program = folder / "hvd-dqn"
    if how == "none":
        program.unlink()
    elif how == "wrong name":
        env["HVD_DQN_BIN"] = "/usr"
    elif how == "moved":
        program.write_text(f"#!{project}/old/bin/python3\n")
    elif how == "moved, with blanks":  # as pip writes it
        program.write_text(f"#!/bin/sh\n'''exec' \"{project}/old place/bin/python3\" \"$0\" \"$@\"\n' '''\n")
    elif how == "copied":
        write_script(project / "other/bin/python", "")
        (project / "other/pyvenv.cfg").touch()
        program.write_text(f"#!{project}/other/bin/python\n")
    elif how == "closed":
        (folder / "secret").touch()
        (folder / "python").symlink_to("secret")
        program.write_text(f"#!{folder}/python\n")
    else:
        if how == "active and broken":
            folder = project / "mine/bin"
            env["VIRTUAL_ENV"] = str(project / "mine")
        write_script(folder / "python", "echo Traceback; echo ImportError: libpython3.so: no such file; exit 1")
        write_script(folder / "hvd-dqn", "").write_text(f"#!{folder}/python\n")


@pytest.mark.parametrize(("how", "line"), BROKEN, ids=[how for how, _ in BROKEN])
def test_an_environment_that_cannot_be_used_is_one_line_with_the_cure(how, line, project, path):
    env = {"PATH": path}
    break_program(how, project, env)
    for script in LAUNCHERS:
        done = run(project / "launch" / script, "-np", "1", "train", "cartpole", env=env)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
        assert line.format(project) in done.stderr
        assert done.stderr.startswith(f"{script}: ")


def test_an_environment_without_horovod_is_named(project, path):
    (project / ".venv/bin/horovodrun").unlink()
    done = run(project / "launch" / "horovodrun.sh", "train", "cartpole", env={"PATH": path})
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"no horovodrun on PATH, and it is not in the environment of {project}/.venv/bin/hvd-dqn" in done.stderr


def test_train_takes_the_venv_that_it_makes_whatever_is_active(project, path, places):
    _, variables = places
    write_script(project / "launch" / "setup.sh", "")
    write_script(project / ".venv" / "bin" / "horovodrun", "type -p hvd-dqn")
    done = run(project / "launch" / "train.sh", "cartpole", env={"PATH": path, **dict(list(variables.values())[1:])})
    assert done.stdout.strip() == f"{project}/.venv/bin/hvd-dqn"


# ---- Names, values and paths ----
ODD = {"BASH_FUNC_module%%": "() {  eval `lmod`\n}", "a.b": "1", "X(y)": "1", "a;b": "2"}
VALUES = {"TF_Q": "a \"b\" 'c' ; d $HOME `id`", "HVD_DQN_NL": "  x\ny=1\n", "OMP_S": "a;b"}
PRINT = f"""#!{shutil.which("python3", path="/usr/bin:/bin")}
import json, os
found = {{name: os.environ.get(name, "") for name in {[*VALUES, "TF_LONG"]}}}
with open(f"{{os.environ['HVD_DQN_OUT']}}/{{os.getpid()}}.json", "w") as out:  # mpirun would mix what they print
    out.write(json.dumps(found | {{"TF_LONG": len(found["TF_LONG"])}}))
"""


def start_real(folder, *words, **env):
    """Two ranks that write down variables, started by the real launchers from a clone in `folder`."""
    project = copy_project(folder)
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/horovodrun").symlink_to(BIN / "horovodrun")
    write_script(project / ".venv/bin/print", "").write_text(PRINT)
    write_script(project / ".venv/bin/hvd-dqn", '[ "$1" != plan ] || exit 0; exec print')  # the check of the size
    settings = {"PATH": "/usr/bin:/bin", "OMPI_MCA_rmaps_base_oversubscribe": "1", "HVD_DQN_OUT": str(folder), **env}
    return run(project / "launch" / words[0], *words[1:], "-np", "2", "train", "cartpole", env=settings)


@pytest.mark.parametrize("launcher", [["mpirun.sh"], ["horovodrun.sh"], ["horovodrun.sh", "--gloo"]], ids=" ".join)
def test_ranks_start_whatever_the_environment_holds_and_wherever_the_clone_lies(launcher, tmp_path):
    """Names that no shell can export; values with quotes and newlines; a megabyte; paths with blanks and other letters."""
    is_gloo = "--gloo" in launcher
    large = {f"MY_{number}": "x" * 100_000 for number in range(10)}
    length = 20_000 if is_gloo else 120_000
    done = start_real(tmp_path / "it's mine ü", *launcher, **ODD, **VALUES, **large, TF_LONG="y" * length)
    assert done.returncode == 0, done.stderr
    got = [json.loads(path.read_text()) for path in (tmp_path / "it's mine ü").glob("*.json")]
    assert got == [VALUES | {"TF_LONG": length}] * 2
    assert ("the ranks do not get MY_" in done.stderr) == is_gloo
    assert len(done.stderr.splitlines()) == 1 + is_gloo, done.stderr


def test_variables_that_no_command_line_of_gloos_holds_are_refused(tmp_path):
    done = start_real(tmp_path, "horovodrun.sh", "--gloo", TF_LONG="y" * 120_000)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "bytes more than Gloo's command line holds: shorten them, or leave --gloo out" in done.stderr


def test_what_a_path_cannot_hold_is_refused(tmp_path):
    project = copy_project(tmp_path / "a:b")
    write_script(project / ".venv/bin/hvd-dqn", "")
    assert "PATH cannot hold" in dry_run(project, "/usr/bin:/bin")


def test_the_ssh_of_mpirun_is_found_on_path_where_the_clone_has_blanks(tmp_path, path):
    project = copy_project(tmp_path / "a b")
    write_script(project / ".venv/bin/hvd-dqn", "")
    assert " OMPI_MCA_plm_rsh_agent=ssh.sh:ssh " in dry_run(project, path, "-H", "a:1,b:1")
    (project / "key").touch()
    assert "private key by a path without blanks" in dry_run(project, path, "-i", project / "key", "-H", "a:1,b:1")


@pytest.mark.parametrize("code", [0, 3, 255])
def test_the_ssh_of_mpirun_ends_as_ssh_does_and_at_once(tmp_path, code):
    write_script(tmp_path / "bin" / "ssh", f'printf "%s\\n" "$@"; exit {code}')
    mpirun = write_script(tmp_path / "bin" / "mpirun", f"{ROOT}/launch/ssh.sh -p 22 a.x \" orted 'a b'\"; exit $?")
    done = run(mpirun, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.splitlines()[-4:] == ["-p", "22", "a.x", " orted 'a b'"]
