"""The batch scripts by themselves: what they run, when they start the job again, and what they refuse, without a cluster.

What the batch systems do is imitated after their manuals; test_slurm.py has the real Slurm.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.ranks import ROOT, wait_until

SCRIPTS = [path for system in ("slurm", "pbs", "lsf") for path in sorted((ROOT / "launch" / system).iterdir())]
# Each program leaves the words it was started with in `calls`; the one that trains makes a checkpoint and ends as told.
FAKE = """#!/bin/bash
[ "$(basename "$0") $1" != "hvd-dqn plan" ] || exit 0 # the check of the job's size
echo "$(basename "$0") $*" >>"$CALLS"
case $(basename "$0") in
    srun) [ "$*" != --mpi=list ] || { echo "MPI plugin types are... ${PLUGINS:-none pmix pmi2}"; exit; } ;;
    scontrol) [ "$1" != show ] || printf '%s\\n' ${HOSTS:-alone}; exit ;;
    qstat) printf 'Job Id: %s\\n    Resource_List.select = %s\\n    Resource_List.walltime = %s\\n' "$3" \\
        $'2:ncpus=8:mpi\\n\\tprocs=2' "${WALLTIME:-02:00:00}"
        printf '    Account_Name = grant\\n    project = %s\\n' "${PROJECT:-_pbs_project_default}"; exit ;;
    qsub) echo "env $HVD_DQN_RUN_DIR $HVD_DQN_ARGS" >>"$CALLS"; exit ;;
    mpirun) [ "$*" != --version ] || { echo "mpirun (Open MPI) 4.1.4"; exit; } ;;
esac
trap 'signalled=1' USR1
trap '' TERM
touch "$CALLS.running"
pwd >>"$CALLS.cwd"
while [ -n "$WAIT" ] && [ -z "$signalled" ]; do sleep 0.05; done
if [ -n "$STEPS" ]; then
    mkdir -p "$RUN_DIR/checkpoints/$STEPS"
    echo '{"resumable": true}' >"$RUN_DIR/checkpoints/$STEPS/MANIFEST.json"
    touch "$RUN_DIR/run.json"
fi
exit "$CODE"
"""
SYSTEMS = {
    "slurm": {
        "SLURM_JOB_NAME": "my/job",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "a,b,c",
        "SLURM_TASKS_PER_NODE": "4(x2),3",
        "HOSTS": "a b c",
    },
    "pbs": {
        "PBS_JOBNAME": "my/job",
        "PBS_JOBID": "7",
        "PBS_QUEUE": "small",
        "PBS_O_QUEUE": "batch",
        "PBS_NODEFILE": "{folder}/nodes",
    },
    "lsf": {"LSB_JOBNAME": "my/job", "LSB_JOBID": "7", "LSB_MCPU_HOSTS": "a 4 b 2 "},
}


SEEDS = "slurm/seeds.sbatch"


# What the batch system is asked for, without which no job saves before its time is over or starts again.
DIRECTIVES = {
    "train.sbatch": ["--signal=USR1@120", "--requeue", "--open-mode=append"],
    "train-mpirun.sbatch": ["--signal=B:USR1@120", "--requeue", "--open-mode=append"],
    "train-apptainer.sbatch": ["--signal=USR1@120", "--requeue", "--open-mode=append"],
    "seeds.sbatch": ["--signal=USR1@120", "--requeue", "--open-mode=append", "--array=1-3", "--output=%x-%A_%a.log"],
    "train.pbs": ["-r y", "-j oe"],
    "train.lsf": ["-wa USR1", "-wt 2", "-r", '-Q "75"'],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_batch_system_is_asked_to_warn_and_to_start_again(script):
    asked = re.findall(r"(?m)^#(?:SBATCH|PBS|BSUB) (.*)$", script.read_text())
    assert set(DIRECTIVES[script.name]) <= set(asked)


class Project:
    """The launch scripts in a folder of their own, and a PATH of imitated programs."""

    def __init__(self, folder):
        self.folder, self.run_dir = folder, folder / "runs/my-job-7"
        shutil.copytree(ROOT / "launch", folder / "launch")
        (folder / "nodes").write_text("a\na\nb\nb\n")
        for path in (
            "bin/srun",
            "bin/scontrol",
            "bin/qstat",
            "bin/qsub",
            "bin/mpirun",
            "bin/apptainer",
            ".venv/bin/hvd-dqn",
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(FAKE)
            (folder / path).chmod(0o755)

    def start(self, script, *words, **environment):
        system = script.split("/")[0]
        launchers = ("SLURM_", "PBS_", "LSB_", "HVD_DQN_", "VIRTUAL_ENV", "CONDA_")
        variables = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
        variables |= {k: v.format(folder=self.folder) for k, v in SYSTEMS[system].items()}
        if script == SEEDS:
            variables |= {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
            self.run_dir = self.folder / "runs/my-job-5-seed-3"
        variables |= {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "CALLS": str(self.folder / "calls")}
        variables |= {"RUN_DIR": str(self.run_dir), "CODE": "0", "STEPS": "", "WAIT": "", **environment}
        # A copy of the script somewhere else, as batch systems run it, in the folder where the job was submitted.
        copy = shutil.copy(self.folder / "launch" / script, self.folder / "copy")
        return subprocess.Popen(
            ["bash", copy, *words], cwd=environment.get("CWD", self.folder), env=variables, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, script, *words, **environment):
        process = self.start(script, *words, **environment)
        said = process.communicate(timeout=120)[0]
        return process.returncode, said

    @property
    def calls(self):
        return (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_says_what_it_does(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# Trains ")
    assert "set -euo pipefail" in lines
    assert max(map(len, lines)) <= 120


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    found = subprocess.run(["shellcheck", "-x", *SCRIPTS], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout


SRUN = "srun --mpi=pmix --export=ALL --kill-on-bad-exit=0 --wait=120"


#  script                         environment                        what is started; {0} is the project's folder
@pytest.mark.parametrize(
    ("script", "environment", "command"),
    [
        ("slurm/train.sbatch", {}, SRUN + " {0}/.venv/bin/hvd-dqn"),
        (SEEDS, {}, SRUN + " {0}/.venv/bin/hvd-dqn"),
        ("slurm/train.sbatch", {"SLURM_CPUS_PER_TASK": "4"}, SRUN + " --cpus-per-task=4 {0}/.venv/bin/hvd-dqn"),
        (
            "slurm/train-apptainer.sbatch",
            {"SLURM_GPUS_ON_NODE": "4"},
            SRUN + " apptainer exec --bind {0} --bind {0}/runs/my-job-7 --pwd {0} --nv {0}/hvd-dqn.sif hvd-dqn",
        ),
        ("slurm/train-mpirun.sbatch", {}, "mpirun -np 11 -H a:4,b:4,c:3 "),
        ("pbs/train.pbs", {}, "mpirun -np 4 -H a:2,b:2 "),
        ("lsf/train.lsf", {}, "mpirun -np 6 -H a:4,b:2 "),
    ],
)
def test_the_ranks_are_started_on_all_that_the_job_was_given(script, environment, command, project):
    (project.folder / "hvd-dqn.sif").touch()
    code, said = project.run(script, HVD_DQN_ARGS="cartpole" if script == SEEDS else "cartpole --seed 3", **environment)
    assert code == 0, said
    started = next(call for call in project.calls if call.startswith(command.split()[0]) and "train" in call)
    assert started.startswith(command.format(project.folder)), started
    ending = " --run-dir runs/my-job-5-seed-3 --seed 3" if script == SEEDS else " --seed 3 --run-dir runs/my-job-7"
    assert started.endswith(f" train cartpole{ending}")


def test_settings_come_as_words_and_from_the_environment(project):
    code, said = project.run(
        "slurm/train.sbatch", "cartpole", "--", "--env.id", "a b", HVD_DQN_ARGS="--seed 3 \n --seed 4"
    )
    assert code == 0, said
    assert project.calls[-1].endswith(" train cartpole --env.id a b --seed 3 --seed 4 --run-dir runs/my-job-7")


STARTS_AGAIN = {
    "slurm/train.sbatch": "scontrol requeue 7",
    "slurm/train-mpirun.sbatch": "scontrol requeue 7",
    "slurm/train-apptainer.sbatch": "scontrol requeue 7",
    SEEDS: "scontrol requeue 5_3",
    "pbs/train.pbs": "qsub -V -N my/job -q batch -A grant -l select=2:ncpus=8:mpiprocs=2 -l walltime=02:00:00 -v "
    "HVD_DQN_ROOT,HVD_DQN_RUN_DIR,HVD_DQN_ARGS {0}/launch/pbs/train.pbs",
}


@pytest.mark.parametrize("script", [*STARTS_AGAIN, "lsf/train.lsf"])
@pytest.mark.parametrize(
    ("ends_with", "steps", "signals", "code", "again"),
    [
        (0, "400", [], 0, False),
        (1, "400", [], 1, False),
        (2, "", [], 2, False),
        (75, "400", ["SIGUSR1"], 75, True),
        (75, "", ["SIGUSR1"], 75, False),  # no checkpoint that was not there before: its time is too short
        (75, "400", ["SIGTERM"], 75, False),  # cancelled
        (75, "400", ["SIGUSR1", "SIGTERM"], 75, False),
    ],
)
def test_only_a_job_that_saved_and_got_on_is_started_again(script, ends_with, steps, signals, code, again, project):
    (project.folder / "hvd-dqn.sif").touch()
    wait = "1" if signals else ""
    process = project.start(script, HVD_DQN_ARGS="identity", CODE=str(ends_with), STEPS=steps, WAIT=wait)
    if signals:
        wait_until((project.folder / "calls.running").exists, "nothing is started")
    for name in signals:
        process.send_signal(signal.Signals[name])
    said = process.communicate(timeout=120)[0]
    is_lsf = script == "lsf/train.lsf"  # which starts a job again that ends with 75
    assert process.returncode == (1 if is_lsf and code == 75 and not again else code), said
    assert (STARTS_AGAIN.get(script, "").format(project.folder) in project.calls) == (again and not is_lsf)
    if script == "pbs/train.pbs" and again:
        assert project.calls[-1] == "env runs/my-job-7 identity"
    if code == 75 and not again:
        way_out = r"ended from outside\. To continue: HVD_DQN_RUN_DIR=runs/my-job-[57] HVD_DQN_ARGS='identity' [sqb]"
        assert re.search(way_out + "|stopped before it made progress", said), said


def test_a_job_whose_time_was_too_short_to_start_is_told_so(project):
    code, said = project.run("slurm/train.sbatch", "identity", CODE="138")
    assert code == 138
    assert "while it was still starting: give the job more time" in said
    assert not [call for call in project.calls if call.startswith("scontrol requeue")]


def test_pbs_asks_the_job_to_save_two_minutes_before_its_time_is_over(project):
    # 124 s: four are left until then.
    code, said = project.run(
        "pbs/train.pbs", HVD_DQN_ARGS="identity", CODE="75", STEPS="400", WAIT="1", WALLTIME="00:02:04", PROJECT="cars"
    )
    assert code == 75, said
    assert any(call.startswith("qsub ") and " -A grant -P cars -l " in call for call in project.calls)


def test_a_job_goes_on_with_the_newest_checkpoint_that_can_be_gone_on_from(project):
    for steps, is_resumable in [("800", "true"), ("1000", "true"), ("9000", "false")]:
        manifest = project.run_dir / "checkpoints" / steps / "MANIFEST.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(f'{{"resumable": {is_resumable}}}')
    (project.run_dir / "checkpoints/9500").mkdir()  # half-written
    code, said = project.run("slurm/train.sbatch", "identity")
    assert code == 0
    assert "continuing runs/my-job-7 from 1000 total steps" in said
    assert project.calls[-1].endswith(" train identity --resume --run-dir runs/my-job-7")


def test_a_run_that_ended_before_its_first_checkpoint_is_put_aside(project):
    project.run_dir.mkdir(parents=True)
    (project.run_dir / "run.json").touch()
    code, said = project.run("slurm/train.sbatch", "identity")
    assert code == 0, said
    assert project.calls[-1].endswith(" train identity --run-dir runs/my-job-7")
    (aside,) = project.run_dir.parent.iterdir()
    assert aside.name.startswith("my-job-7-without-checkpoint-")
    assert (aside / "run.json").exists()


def test_so_is_a_run_that_was_named_when_it_is_this_jobs_own(project):
    named = project.folder / "runs/mine"
    named.mkdir(parents=True)
    (named / "run.json").touch()
    code, said = project.run("slurm/train.sbatch", "identity", HVD_DQN_RUN_DIR="runs/mine", SLURM_RESTART_COUNT="1")
    assert code == 0, said
    assert len(list(named.parent.glob("mine-without-checkpoint-*/run.json"))) == 1


def test_a_run_that_was_named_is_never_put_aside_for_another_job_may_be_writing_it(project):
    project.run_dir.mkdir(parents=True)
    (project.run_dir / "run.json").touch()
    project.run("slurm/train.sbatch", "identity", HVD_DQN_RUN_DIR="runs/my-job-7")  # hvd-dqn refuses it
    assert (project.run_dir / "run.json").exists()


# ---- Seeds ----
def test_a_seed_goes_on_in_its_own_run(project):
    manifest = project.folder / "runs/mine-seed-3/checkpoints/800/MANIFEST.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"resumable": true}')
    code, said = project.run(SEEDS, "identity", HVD_DQN_RUN_DIR="runs/mine")
    assert code == 0, said
    assert project.calls[-1].endswith(" train identity --resume --run-dir runs/mine-seed-3 --seed 3")


@pytest.mark.parametrize(
    ("words", "environment", "line"),
    [
        (["identity", "--seed", "4"], {}, "the seeds are those of --array: leave --seed out."),
        (["identity", "--seed=4"], {}, "the seeds are those of --array: leave --seed out."),
        (
            ["identity"],
            {"SLURM_ARRAY_TASK_ID": ""},
            "expected a job array, whose numbers are the seeds: sbatch --array=1-3",
        ),
    ],
)
def test_the_seeds_are_those_of_the_array(words, environment, line, project):
    code, said = project.run(SEEDS, *words, **environment)
    assert (code, len(said.splitlines())) == (2, 1)
    assert line in said


# ---- Whose environment, and where ----
@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("slurm/train.sbatch", "{0}/hvd-dqn train"),
        (SEEDS, "{0}/hvd-dqn train"),
        ("pbs/train.pbs", "/launch/mpirun.sh -H"),
    ],
)
@pytest.mark.parametrize("variable", ["HVD_DQN_BIN", "VIRTUAL_ENV", "CONDA_PREFIX", "PATH"])
def test_the_users_own_environment_is_taken(variable, script, command, project):
    mine = project.folder / "mine/bin"
    shutil.copytree(project.folder / ".venv/bin", mine)
    shutil.rmtree(project.folder / ".venv")
    value = {"HVD_DQN_BIN": mine, "PATH": f"{project.folder}/bin:{mine}:/usr/bin:/bin"}.get(variable, mine.parent)
    code, said = project.run(script, HVD_DQN_ARGS="identity", **{variable: str(value)})
    assert code == 0, said
    assert f"{command.format(mine)}" in said


SUBMITTED = {"slurm": "SLURM_SUBMIT_DIR", "pbs": "PBS_O_WORKDIR", "lsf": "LS_SUBCWD"}


@pytest.mark.parametrize("script", [str(path.relative_to(ROOT / "launch")) for path in SCRIPTS])
def test_a_job_runs_where_it_was_submitted(script, project, tmp_path):
    mine = tmp_path / "my place"
    mine.mkdir()
    (project.folder / "hvd-dqn.sif").touch()
    system = script.split("/")[0]
    there = {SUBMITTED[system]: str(mine), "HVD_DQN_ROOT": str(project.folder), "HVD_DQN_ARGS": "identity"}
    # Slurm and LSF start a job where it was submitted, PBS at home.
    code, said = project.run(script, CODE="3", CWD=str(tmp_path if system == "pbs" else mine), **there)
    assert code == 3, said
    assert (project.folder / "calls.cwd").read_text().splitlines()[-1] == str(mine)


@pytest.mark.parametrize("script", ["slurm/train.sbatch", "pbs/train.pbs", "lsf/train.lsf"])
def test_a_folder_that_the_node_does_not_have_is_named(script, project):
    system = script.split("/")[0]
    there = {SUBMITTED[system]: "/nowhere/mine", "HVD_DQN_ROOT": str(project.folder), "HVD_DQN_ARGS": "identity"}
    code, said = project.run(script, CWD="/tmp", **there)
    assert (code, len(said.splitlines())) == (2, 1), said
    assert "has no folder /nowhere/mine, from which this job was submitted" in said


def test_how_to_go_on_names_the_script_where_it_is(project, tmp_path):
    (tmp_path / "mine").mkdir()
    _, said = project.run("slurm/train.sbatch", CWD=str(tmp_path / "mine"), HVD_DQN_ROOT=str(project.folder))
    assert said.endswith(f"HVD_DQN_ARGS=cartpole sbatch {project.folder}/launch/slurm/train.sbatch\n")


def test_a_run_can_be_named(project):
    code, said = project.run("slurm/train.sbatch", "identity", HVD_DQN_RUN_DIR="elsewhere/mine")
    assert code == 0, said
    assert project.calls[-1].endswith(" train identity --run-dir elsewhere/mine")


@pytest.mark.parametrize("script", [str(path.relative_to(ROOT / "launch")) for path in SCRIPTS])
@pytest.mark.parametrize(
    ("words", "environment", "breaks", "line"),
    [
        ([], {}, None, "expected what to train, for example: "),
        (["identity", "--resume"], {}, None, "--resume is set by this script: set HVD_DQN_RUN_DIR"),
        (["identity", "--run_dir=x"], {}, None, "--run_dir=x is set by this script: set HVD_DQN_RUN_DIR"),
        (
            ["identity"],
            {"HVD_DQN_ROOT": "/nowhere"},
            None,
            "/nowhere is not the folder of hvd_dqn: submit from there, or",
        ),
        (["identity"], {}, ".venv", "launch/setup.sh"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, words, environment, breaks, line, project):
    if breaks and "apptainer" not in script:
        shutil.rmtree(project.folder / breaks)
    code, said = project.run(script, *words, **environment)
    assert code == 2, said
    assert len(said.splitlines()) == 1, said
    assert said.startswith(f"{Path(script).name}: ")
    assert (line in said) or ("apptainer" in script and "there is no image" in said), said
    assert not [call for call in project.calls if "train" in call]


@pytest.mark.parametrize("script", ["slurm/train.sbatch", "slurm/train-apptainer.sbatch"])
def test_a_site_without_pmix_is_told_so(script, project):
    (project.folder / "hvd-dqn.sif").touch()
    code, said = project.run(script, "identity", PLUGINS="none pmi2")
    assert code == 2
    assert re.fullmatch(r"\S+: srun has no pmix here .*\n", said), said
