"""What a rank takes of its host: threads and a GPU, under every launcher's variables."""

import os
import shutil
import subprocess
import sys

import pytest

from hvd_dqn.errors import InputError
from hvd_dqn.ranks import connect as connect_module
from hvd_dqn.ranks import limits, placement
from hvd_dqn.ranks.connect import connect

LAUNCHERS = ("OMPI_", "PMI", "HOROVOD_", "SLURM_", "MPI_LOCAL")


@pytest.fixture
def environ(monkeypatch):
    """The environment without any launcher's variables."""
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize(
    ("variables", "rank", "size"),
    [
        ({}, 0, 1),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 3, 4),
        ({"HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}, 1, 2),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}, 1, 2),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 0, 4),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 2, 3),
        # mpirun's ranks in a Slurm job, on the last of the hosts where srun started one daemon each
        (
            {
                "OMPI_COMM_WORLD_LOCAL_RANK": "5",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
                "SLURM_LOCALID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
                "SLURM_NODEID": "2",
            },
            5,
            8,
        ),
    ],
)
def test_each_launcher_says_which_of_the_hosts_ranks_this_is(variables, rank, size, environ):
    environ(**variables)
    assert (placement.local_rank(), placement.local_size()) == (rank, size)


@pytest.mark.parametrize(
    ("variables", "usable", "on_host", "is_bound", "threads"),
    [
        ({}, 8, 8, False, 8),  # a process alone
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 8, 8, False, 2),  # mpirun --bind-to none
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4, 64, False, 1),  # the same under taskset
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 1, 8, True, 1),  # --bind-to core
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, 16, 32, True, 4),  # --bind-to socket: two sockets, four ranks on each
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, 2, 2, False, 1),  # more ranks than cores
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "2"}, 64, 64, False, 1),  # two cores of a big host
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "4"}, 64, 64, False, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "4"}, 4, 64, True, 4),
        # --exclusive gives the job more cores than its tasks asked for
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "64", "SLURM_CPUS_PER_TASK": "4"}, 64, 64, False, 4),
        # mpirun starts four ranks where Slurm was asked for one task of eight cores
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}, 8, 8, False, 2),
    ],
)
def test_ranks_of_a_host_share_its_cores(variables, usable, on_host, is_bound, threads, environ):
    environ(**variables)
    assert placement.threads(usable, on_host, is_bound) == threads


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_what_the_environment_says_wins_over_defaults(monkeypatch):
    expected = {
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMPI_MCA_btl_vader_eager_limit": "32768",
        "HOROVOD_CYCLE_TIME": "0",
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_ENABLE_ONEDNN_OPTS": "1",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    for said in ({}, dict.fromkeys(expected, "said")):
        monkeypatch.setattr(os, "environ", dict(said))
        placement.set_communication_defaults()
        share = str(placement.set_thread_defaults())
        assert os.environ == {"TF_NUM_INTRAOP_THREADS": share, **expected, **said}


GLOO = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "quota", "ranks", "pause"),
    [
        ({}, None, 2, "0"),
        (GLOO, None, 2, "0.05"),  # its waits do not yield
        # Two threads of each rank are busy.
        ({}, 4, 2, "0"),
        ({}, 3.9, 2, "0.2"),
        (GLOO, 1, 2, "0.2"),
        ({}, 1, 1, "0.2"),
        ({"HOROVOD_CYCLE_TIME": "7"}, 1, 2, "7"),
    ],
)
def test_horovods_thread_pauses_where_its_spinning_would_take_what_the_rank_needs(
    variables, quota, ranks, pause, monkeypatch
):
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_LOCAL_SIZE": str(ranks), **variables})
    monkeypatch.setattr(limits, "cpu_quota", lambda: quota and limits.Limit(quota, "a container"))
    placement.set_communication_defaults()
    assert os.environ["HOROVOD_CYCLE_TIME"] == pause


@pytest.mark.parametrize(
    ("quota", "ranks", "threads"), [(1, 2, 1), (0.5, 1, 1), (3.5, 1, 3), (3.9, 2, 1), (4, 2, 2), (100, 2, 4)]
)
def test_ranks_of_a_host_share_a_quota_of_cpu_time(quota, ranks, threads, environ):
    environ(OMPI_COMM_WORLD_LOCAL_SIZE=str(ranks))
    assert placement.threads(8, 8, False, quota) == threads


@pytest.mark.parametrize(
    ("elastic", "said", "cycle"),
    [
        ("1", {}, "0.05"),
        ("1", {"HOROVOD_FUSION_THRESHOLD": "0"}, None),
        ("0", {"HOROVOD_FUSION_THRESHOLD": "0"}, "0.05"),
    ],
)
def test_an_elastic_job_does_not_fix_both_of_what_horovod_tunes(monkeypatch, elastic, said, cycle):
    gloo = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_ELASTIC": elastic}
    monkeypatch.setattr(os, "environ", gloo | said)
    placement.set_communication_defaults()
    assert os.environ.get("HOROVOD_CYCLE_TIME") == cycle


def test_horovod_is_not_started_again_with_both_of_what_it_tunes_fixed(monkeypatch):
    monkeypatch.setattr(os, "environ", {"HOROVOD_CYCLE_TIME": "0"})
    placement.check_restart()
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
    with pytest.raises(InputError, match="unset the second"):
        placement.check_restart()


def test_a_process_is_bound_where_its_launcher_may_use_more_cores_or_says_so():
    code = "from hvd_dqn.ranks import placement; print(placement._is_bound())"
    core = str(min(os.sched_getaffinity(0)))
    for command, variables, bound in [
        ([], {}, "False"),
        (["taskset", "-c", core], {}, "True"),
        ([], {"OMPI_MCA_orte_bound_at_launch": "1"}, "True"),
    ]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)} | variables
        done = subprocess.run(
            [*command, sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == bound, (command, variables, done.stderr)


class Devices:
    """TensorFlow's configuration on a host where this many GPUs are visible."""

    def __init__(self, monkeypatch, visible):
        import tensorflow as tf

        self.taken = None
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(range(visible)))
        monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpu, kind: setattr(self, "taken", gpu))
        monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, on: None)


@pytest.mark.parametrize(
    ("variables", "visible", "taken"),
    [
        ({"SLURM_LOCALID": "3"}, 0, None),
        ({"SLURM_LOCALID": "3"}, 4, 3),  # every task sees all GPUs: srun in a job with --gpus-per-node=4
        ({"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "7"}, 1, 0),  # its own: --gpus-per-task=1
        ({"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "6,7"}, 2, 1),  # its pair: tasks 2 and 3 of --gpu-bind=closest
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 4, 1),
        ({}, 4, 0),
    ],
)
def test_a_rank_takes_the_gpu_of_its_turn_among_those_it_sees(variables, visible, taken, environ, monkeypatch):
    environ(**variables)
    devices = Devices(monkeypatch, visible)
    gpu = placement.pin_gpu()
    assert devices.taken == taken
    # There is no CUDA here: a GPU that TensorFlow sees has an id that cannot be asked for.
    assert gpu == (None if taken is None else placement.UNKNOWN_GPU)


CUDA = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return number > 1 ? 101 : 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { for (int i = 0; i < 16; i++) uuid[i] = 16 * device + i; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")
def test_a_gpu_is_known_by_the_id_that_cuda_gives_it(tmp_path):
    (tmp_path / "cuda.c").write_text(CUDA)
    library = tmp_path / "libcuda.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "cuda.c"], check=True, timeout=60)
    assert placement.gpu_id(0, str(library)) == "000102030405060708090a0b0c0d0e0f"
    assert placement.gpu_id(1, str(library)) == "101112131415161718191a1b1c1d1e1f"
    assert placement.gpu_id(2, str(library)) == placement.UNKNOWN_GPU  # CUDA's error 101: no such device
    assert placement.gpu_id(0, str(tmp_path / "none.so")) == placement.UNKNOWN_GPU


#  (host, GPU id) of each rank                                      what is wrong
@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ([("a", None), ("a", None)], None),  # on CPUs
        ([("a", "x"), ("a", "y"), ("b", "z")], None),  # one each
        ([("a", "x"), ("b", "x")], None),  # an id made up by two virtual machines alike
        ([("a", "unknown"), ("a", "unknown")], None),  # nothing can be said of them
        ([("a", "x"), ("a", "x")], "Ranks 0, 1 would share one GPU of a"),
        ([("a", "x"), ("b", "y"), ("b", "y"), ("b", "y")], "Ranks 1, 2, 3 would share one GPU of b"),
        ([("a", "x"), ("b", None)], "Rank 1 on b sees no GPU, but others do (1 of 2 ranks)"),
        ([("a", None), ("a", "unknown"), ("a", "x")], "Rank 0 on a sees no GPU, but others do (2 of 3 ranks)"),
    ],
)
def test_ranks_that_nccl_cannot_join_are_named_with_their_host(places, complaint):
    found = placement.gpu_conflict(places)
    assert found == complaint if complaint is None else found.startswith(complaint) and "CUDA_VISIBLE_DEVICES=" in found


#  what a launcher set                                                      what is read first
@pytest.mark.parametrize(
    "variables",
    [
        {"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash where MpiDefault=pmix
        {"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"},  # the same with pmi2
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},  # mpirun -np 1
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"},  # mpirun in a job
    ],
)
def test_the_only_process_of_a_launcher_needs_no_mpi(variables, environ, monkeypatch):
    def no_mpi():
        raise AssertionError("MPI is started")

    monkeypatch.setattr(connect_module, "mpi_size", no_mpi)
    environ(**variables)
    assert connect().size == 1


@pytest.mark.parametrize(
    ("variables", "rank", "told"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, {"SLURM_PROCID": "1"}, "srun started 2 tasks .* use `srun --mpi=pmix`"),
        (
            {"PMI_SIZE": "2", "PMI_RANK": "0", "SLURM_STEP_NUM_TASKS": "2"},  # pmi2, which this MPI does not know
            {"PMI_RANK": "1"},
            "srun started 2 tasks .* use `srun --mpi=pmix`",
        ),
        (
            {"PMI_SIZE": "2", "PMI_RANK": "0"},  # mpiexec of another MPI
            {"PMI_RANK": "1"},
            r"started 2 ranks .* mpi4py uses another MPI \(An MPI 1.0\) than this launcher's",
        ),
    ],
)
def test_processes_that_each_believe_to_be_alone_are_refused_by_the_first_alone(
    variables, rank, told, environ, monkeypatch
):
    monkeypatch.setattr(connect_module, "mpi_size", lambda: 1)
    monkeypatch.setattr(connect_module, "mpi_library", lambda: "An MPI 1.0")
    environ(**variables)
    with pytest.raises(InputError, match=told):
        connect()
    assert connect(examines=True).size == 1  # the doctor tells why
    environ(**rank)
    for examines, code in [(False, 2), (True, 0)]:
        with pytest.raises(SystemExit) as stop:
            connect(examines)
        assert stop.value.code == code
    environ(HOROVOD_RANK="0", HOROVOD_ELASTIC="1")  # in a job of Slurm, started by another launcher
    assert connect().size == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_are_settled_before_numpy_is_loaded():
    code = """
import sys, psutil
from hvd_dqn.cli import main
sys.argv = ["hvd-dqn", "presets"]
main()
print("numpy" in sys.modules, psutil.Process().num_threads())
"""
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "True 1", done.stdout + done.stderr
