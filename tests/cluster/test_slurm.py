"""The Slurm scripts on a real cluster: jobs train, are stopped and requeued, are cancelled, and say what is wrong."""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.cluster.slurm import missing, open_slurm
from tests.ranks import ROOT, processes_of, wait_until

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"needs Slurm: {missing()}")
THREADS = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
# Long enough that it is still running when the signal comes, and that it soon ends after the resume.
LONG = [
    "identity", "--evaluation.target_return", "None", "--evaluation.period", "20000", "--ranks.vote_period", "200",
    "--checkpoint.period", "400", "--total_steps", "20000",
]  # fmt: skip
# In place of Apptainer, which Debian does not have: runs the command where the host's Slurm folder is not seen.
CONTAINER = """#!/bin/bash
echo "apptainer $*" >>"$CALLS"
while [[ $1 != *.sif ]]; do shift; done
shift
exec unshare --mount sh -c 'mount -t tmpfs tmpfs "$0" && exec "$@"' "$SPOOL" "$@"
"""


@pytest.fixture(scope="module")
def slurm():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with open_slurm(Path(folder)) as cluster:
            yield cluster


@pytest.fixture
def project(tmp_path):
    """The scripts and .venv in a folder of their own, in which the runs are left."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    yield tmp_path
    for process in processes_of(tmp_path):
        process.kill()


class Job:
    """One that was submitted from the project's folder."""

    def __init__(self, slurm, project, script, *words, options=(), **environment):
        cwd = environment.pop("cwd", project)
        path = f"launch/slurm/{script}.sbatch" if cwd == project else f"{project}/launch/slurm/{script}.sbatch"
        command = ["sbatch", "--parsable", *options, path, *words]
        done = slurm.run(*command, cwd=cwd, **THREADS, **environment)
        assert done.returncode == 0, done.stderr
        self.slurm, self.id = slurm, done.stdout.strip()
        self.run_dir, self.log_file = cwd / f"runs/hvd_dqn-{self.id}", cwd / f"hvd_dqn-{self.id}.log"

    @property
    def log(self):
        return self.log_file.read_text() if self.log_file.exists() else ""

    @property
    def checkpoints(self):
        return sorted(int(path.parent.name) for path in self.run_dir.glob("checkpoints/*/MANIFEST.json"))

    def wait_for_checkpoint(self):
        wait_until(lambda: self.checkpoints or self.about["JobState"] == "FAILED", f"no checkpoint is made: {self.log}")
        assert self.about["JobState"] == "RUNNING", self.log

    @property
    def about(self):
        return self.slurm.about(self.id)

    def end(self, state, code):
        about = self.slurm.wait_until(self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert (about["JobState"], about["ExitCode"]) == (state, code), self.log
        return about

    @property
    def run(self):
        return json.loads((self.run_dir / "run.json").read_text())


@pytest.mark.parametrize(
    ("script", "nodes", "tasks"),
    [("train", 1, 2), ("train", 2, 1), ("train-mpirun", 2, 1)],
)
def test_a_job_trains_to_its_target_on_one_node_and_on_two(script, nodes, tasks, slurm, project):
    options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}"]
    job = Job(
        slurm, project, script, "identity", "--", "--seed", "3", options=options, HVD_DQN_ARGS="--report.period 125"
    )
    about = job.end("COMPLETED", "0:0")
    assert about["NumNodes"] == str(nodes)
    assert job.run["size"] == 2
    assert job.run["ended"] == "finished"
    assert job.run["result"]["return_mean"] == 10
    assert re.search(r"^seed: 3$", (job.run_dir / "config.yaml").read_text(), re.MULTILINE)
    assert job.checkpoints
    assert "identity: return 10.0" in job.log


def stop(slurm, job, *options):
    """Returns the total steps at which the job stopped; it is then requeued."""
    job.wait_for_checkpoint()
    slurm.ask("scancel", *options, job.id)
    wait_until(lambda: job.about["Restarts"] == "1" or job.about["JobState"] != "RUNNING", f"it goes on: {job.log}")
    assert job.about["Restarts"] == "1", job.log
    return int(re.search(r"stopped on request after ([\d,]+) total steps", job.log)[1].replace(",", ""))


def goes_on_to_the_end(job, stopped):
    job.end("COMPLETED", "0:0")
    assert f"continuing runs/hvd_dqn-{job.id} from {stopped} total steps" in job.log
    run = job.run
    assert (run["ended"], run["result"]["total_steps"]) == ("finished", 20_000)
    assert [resume["total_steps"] for resume in run["resumes"]] == [stopped]
    steps = [int(line.split(",")[0]) for line in (job.run_dir / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == sorted(set(steps))
    assert steps[0] < stopped < steps[-1] == 20_000


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train", ["--signal=USR1"]),
        pytest.param("train", ["--signal=TERM"], marks=pytest.mark.slow),  # what preemption sends to the tasks
        ("train-mpirun", ["--batch", "--signal=USR1"]),
    ],
)
def test_a_job_that_is_asked_to_stop_is_requeued_and_goes_on(script, options, slurm, project):
    job = Job(slurm, project, script, *LONG)
    goes_on_to_the_end(job, stop(slurm, job, *options))


def test_ranks_in_containers_find_each_other_and_are_requeued_too(slurm, project):
    (project / "bin").mkdir()
    (project / "bin/apptainer").write_text(CONTAINER)
    (project / "bin/apptainer").chmod(0o755)
    (project / "hvd-dqn.sif").touch()
    # Where the image has its own hvd-dqn on PATH, here that of .venv is.
    environment = {
        "PATH": f"{project}/bin:{ROOT}/.venv/bin:{os.environ['PATH']}",
        "CALLS": str(project / "calls"),
        "SPOOL": str(next(slurm.folder.glob("spool-*[!d]"))),
    }
    job = Job(slurm, project, "train-apptainer", *LONG, **environment)
    goes_on_to_the_end(job, stop(slurm, job, "--signal=USR1"))
    calls = (project / "calls").read_text().splitlines()
    command = (
        f"apptainer exec --bind {project} --bind {job.run_dir} --pwd {project} {project}/hvd-dqn.sif hvd-dqn train"
    )
    assert len(calls) == 4  # two ranks, twice
    assert all(call.startswith(command) for call in calls)


def test_a_job_array_trains_a_run_for_each_seed_and_each_goes_on_after_a_stop(slurm, project):
    job = Job(slurm, project, "seeds", *LONG, options=["--array=3,5", "--ntasks-per-node=1", "--job-name=my seeds"])
    runs = {seed: project / f"runs/my seeds-{job.id}-seed-{seed}" for seed in (3, 5)}
    logs = {seed: project / f"my seeds-{job.id}_{seed}.log" for seed in runs}

    def said() -> str:
        return "".join(log.read_text() for log in logs.values() if log.exists())

    wait_until(lambda: all(list(run.glob("checkpoints/*/MANIFEST.json")) for run in runs.values()), said())
    slurm.ask("scancel", "--signal=USR1", f"{job.id}_5")
    wait_until(lambda: slurm.about(f"{job.id}_5")["Restarts"] == "1", said())
    for seed, run in runs.items():
        slurm.wait_until(f"{job.id}_{seed}", "COMPLETED", "FAILED")
        about = json.loads((run / "run.json").read_text())
        assert (about["ended"], about["result"]["total_steps"]) == ("finished", 20_000), said()
        assert re.search(rf"^seed: {seed}$", (run / "config.yaml").read_text(), re.MULTILINE)
        assert len(about.get("resumes", [])) == (seed == 5)
        assert f"see runs/my seeds-{job.id}-seed-{seed}" in logs[seed].read_text()
    picture = project / "seeds.png"
    done = slurm.run("hvd-dqn", "plot", *runs.values(), "-o", picture, cwd=project)
    assert (done.returncode, picture.exists()) == (0, True), done.stderr


def test_a_job_runs_where_it_was_submitted_with_the_environment_that_is_named(slurm, project, tmp_path):
    """The clone lies elsewhere, its .venv is gone; the user's modules and runs lie where the job was submitted."""
    mine = tmp_path / "my place ü"
    mine.mkdir()
    (mine / "my_envs.py").write_text(
        "import gymnasium\nfrom hvd_dqn.envs.identity import Identity\ngymnasium.register('Mine-v0', Identity)\n"
    )
    (project / ".venv").unlink()
    words = ["identity", "--env.id", "my_envs:Mine-v0"]
    bin_folder = str(ROOT / ".venv" / "bin")
    job = Job(
        slurm, project, "train", *words, options=["--ntasks-per-node=1"], cwd=mine, HVD_DQN_BIN=bin_folder, **PLAIN
    )
    job.end("COMPLETED", "0:0")
    assert job.run["ended"] == "finished"
    assert f"{bin_folder}/hvd-dqn train identity --env.id my_envs:Mine-v0" in job.log
    assert not (project / "runs").exists()


def test_a_cancelled_job_saves_and_does_not_come_back(slurm, project):
    job = Job(slurm, project, "train", *LONG)
    job.wait_for_checkpoint()
    slurm.ask("scancel", job.id)
    about = slurm.wait_until(job.id, "CANCELLED", "COMPLETED", "FAILED")
    assert about["JobState"] == "CANCELLED"
    wait_until(lambda: "ended from outside" in job.log, job.log)
    assert about["Restarts"] == "0"
    stopped = re.search(r"stopped on request after ([\d,]+) total steps", job.log)
    assert int(stopped[1].replace(",", "")) == job.checkpoints[-1]
    assert job.run["ended"] == "stopped"
    assert f"To continue: HVD_DQN_RUN_DIR=runs/hvd_dqn-{job.id} HVD_DQN_ARGS='{' '.join(LONG)}' sbatch" in job.log
    assert "scontrol requeue" not in job.log


def test_a_killed_rank_ends_the_job_which_is_not_requeued(slurm, project):
    job = Job(slurm, project, "train", *LONG)
    job.wait_for_checkpoint()
    rank_1 = next(p for p in processes_of(project) if rank_of(p) == "1")
    rank_1.send_signal(signal.SIGKILL)
    about = slurm.wait_until(job.id, "COMPLETED", "FAILED", "CANCELLED")
    assert (about["JobState"], about["Restarts"]) == ("FAILED", "0"), job.log
    assert re.search(r"\[rank 0/2 \S+\] rank 1 on \S+ is gone", job.log), job.log
    wait_until(lambda: not processes_of(project), f"left behind: {processes_of(project)}")


def rank_of(process):
    try:
        return process.environ().get("PMIX_RANK")
    except psutil.Error:
        return None


PLAIN = {"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}  # nothing is active


@pytest.mark.parametrize(
    ("script", "words", "environment", "broken", "line"),
    [
        ("train", [], {}, None, "train.sbatch: expected what to train, for example: HVD_DQN_ARGS=cartpole sbatch"),
        ("train", ["cartpoel"], {}, None, "hvd-dqn: There is no preset 'cartpoel'. Did you mean `cartpole`?"),
        ("train-mpirun", ["cartpole", "--sede", "3"], {}, None, "hvd-dqn: There is no option `--sede`. Did you mean `--seed`?"),
        ("train", ["cartpole", "--run-dir", "x"], {}, None, "train.sbatch: --run-dir is set by this script: set HVD"),
        ("train", ["cartpole"], PLAIN, ".venv", "train.sbatch: found no hvd-dqn: activate an environment that has it, or name"),
        ("train-mpirun", ["cartpole"], PLAIN, ".venv", "name its folder by HVD_DQN_BIN. Run {project}/launch/setup.sh."),
        ("train", ["cartpole"], {"HVD_DQN_BIN": "/usr"}, None, "there is none that can be run in /usr."),
        ("seeds", ["cartpole"], {}, None, "seeds.sbatch: expected a job array, whose numbers are the seeds: sbatch"),
        ("train", ["cartpole"], {"HVD_DQN_ROOT": "/usr"}, None, "train.sbatch: /usr is not the folder of hvd_dqn: submit from"),
        ("train-apptainer", ["cartpole"], {}, None, "there is no image {project}/hvd-dqn.sif: make it from docker/apptainer"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_in_the_log_exit_code_2_and_no_second_start(
    script, words, environment, broken, line, slurm, project
):
    if broken:
        (project / broken).unlink()
    if script == "seeds":  # submitted by somebody who switched the array off
        text = (project / "launch/slurm/seeds.sbatch").read_text()
        (project / "launch/slurm/seeds.sbatch").write_text(
            text.replace("#SBATCH --array=1-3\n", "").replace("%A_%a", "%j")
        )
    job = Job(slurm, project, script, *words, **environment)
    about = job.end("FAILED", "2:0")
    assert about["Restarts"] == "0"
    said = [line for line in job.log.splitlines() if ": " in line and not line.startswith(("+ ", "srun: error:"))]
    if script != "train-mpirun" or broken:  # mpirun has its own to say of ranks that fail
        assert len(said) == 1, job.log
    assert line.format(project=project) in job.log
    assert not job.run_dir.exists()


def test_more_tasks_than_a_node_has_cores_are_refused_when_they_are_submitted(slurm, project):
    done = slurm.run("sbatch", "--ntasks-per-node=3", "launch/slurm/train.sbatch", "cartpole", cwd=project)
    assert done.returncode != 0
    assert "Requested node configuration is not available" in done.stderr


def test_tasks_without_mpi_are_told_what_srun_needs(slurm, project):
    command = [ROOT / ".venv/bin/hvd-dqn", "train", "identity", "--run-dir", project / "run"]
    done = slurm.run("srun", "--mpi=none", "--ntasks=2", *command, cwd=project)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("srun started 2 tasks that are not connected to each other: use `srun --mpi=pmix`") == 1
    assert not (project / "run").exists()
    done = slurm.run("srun", "--mpi=none", "--ntasks=2", ROOT / ".venv/bin/hvd-dqn", "doctor", cwd=project)
    assert done.returncode == 0, done.stderr
    assert " ".join(done.stdout.split()).count("The launcher started 2 ranks, but this one is not connected") == 1


# As in an environment without mpi4py: what is None here cannot be imported, and is not found.
NO_MPI4PY = "import sys\nsys.modules['mpi4py'] = None\n"


@pytest.mark.parametrize(("mpi", "with_mpi4py"), [("pmix", False), ("pmi2", False), ("none", False), ("pmix", True)])
def test_a_process_alone_in_an_interactive_step_trains_with_and_without_mpi4py(mpi, with_mpi4py, slurm, tmp_path):
    if not with_mpi4py:
        (tmp_path / "sitecustomize.py").write_text(NO_MPI4PY)
    shell = f"env | grep -c PMI; exec hvd-dqn train identity --seed 3 --run-dir {tmp_path}/run"
    srun = f"srun --mpi={mpi} --ntasks=1 --cpus-per-task=2 --pty bash -c '{shell}'"
    # `script` gives it the terminal that --pty asks for.
    path = f"{tmp_path}:{ROOT}"
    done = slurm.run("script", "-qec", srun, "/dev/null", cwd=tmp_path, PYTHONPATH=path, **THREADS)
    assert done.returncode == 0, done.stdout
    assert "identity: return 10.0" in done.stdout
    variables = int(re.search(r"\d+", done.stdout)[0])
    assert (variables > 0) == (mpi != "none")  # those that mislead are there


def test_memory_that_slurm_gave_the_job_is_what_its_ranks_may_use(slurm, project):
    options = ["--ntasks-per-node=2", "--mem=1500"]
    job = Job(slurm, project, "train", "identity", "--replay.capacity", "60000000", options=options)
    job.end("FAILED", "2:0")
    (line,) = [line for line in job.log.splitlines() if line.startswith("hvd-dqn: ")]
    assert re.search(r"The job needs [\d.]+ GB .* [01]\.\d GB are available \(SLURM_MEM_PER_NODE=1500\)", line)
    assert "2 ranks x" in line
    assert not job.run_dir.exists()


ONE_GPU = """
import sys
from hvd_dqn import cli
from hvd_dqn.ranks import world as distributed
describe = distributed.HorovodWorld.describe
distributed.HorovodWorld.describe = lambda self: describe(self) | {"nccl_built": True}
distributed.pin_gpu = lambda: "the same on both"
sys.argv = ["hvd-dqn", "doctor"]
cli.main()
"""


def test_two_ranks_on_one_gpu_are_refused_in_one_line(slurm):
    done = slurm.run("srun", "--mpi=pmix", "--ntasks=2", sys.executable, "-c", ONE_GPU, **THREADS)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("hvd-dqn: Ranks 0, 1 would share one GPU of ") == 1
    assert "MPI_ABORT" not in done.stderr


PLACE = """
import json, os
from hvd_dqn.ranks.placement import local_rank, local_size, set_thread_defaults
visible = os.environ.get("CUDA_VISIBLE_DEVICES")
print(json.dumps([int(os.environ["SLURM_PROCID"]), local_rank(), local_size(), set_thread_defaults(), visible]))
"""


#  options of the job                                                        rank, local rank, ranks here, threads, GPUs
@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["--ntasks=4", "--nodes=2"], [[rank, rank % 2, 2, 1, None] for rank in range(4)]),
        (["--ntasks=1", "--cpus-per-task=2"], [[0, 0, 1, 2, None]]),
        (["--ntasks=2", "--gpus-per-node=2", "--nodes=1"], [[0, 0, 2, 1, "0,1"], [1, 1, 2, 1, "0,1"]]),
        (["--ntasks=2", "--gpus-per-task=1", "--nodes=1"], [[0, 0, 2, 1, "0"], [1, 1, 2, 1, "1"]]),
    ],
)
def test_slurm_says_what_each_task_has_of_its_node(options, places, slurm):
    done = slurm.run("srun", "--mpi=pmix", *options, sys.executable, "-c", PLACE)
    assert sorted(json.loads(line) for line in done.stdout.splitlines()) == places, done.stderr


# Slurm looks at the time about once a minute: the job runs for two or three before it is asked to stop.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_whose_time_is_nearly_over_saves_and_goes_on(slurm, project):
    words = [word.replace("20000", "1000000000") for word in LONG]
    job = Job(slurm, project, "train", *words, options=["--time=5"])
    job.wait_for_checkpoint()
    wait_until(lambda: job.about["Restarts"] == "1", f"it is not requeued: {job.log}")
    before = job.checkpoints[-1]
    wait_until(lambda: job.checkpoints[-1] > before, f"it does not go on: {job.log}")
    assert job.run["resumes"][0]["total_steps"] == before
    assert "TIMEOUT" not in job.log
    slurm.ask("scancel", job.id)
    slurm.wait_until(job.id, "CANCELLED")
