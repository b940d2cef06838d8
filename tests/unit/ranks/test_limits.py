"""Which limits of cores and memory count: on this machine in real cgroups, and in file trees of other machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_dqn.ranks import limits
from tests import cgroups
from tests.ranks import run

MB, GB = 1 << 20, 1 << 30
NO_LIMIT = 9223372036854771712  # as version 1 writes it
needs_cgroups = pytest.mark.skipif(cgroups.missing() is not None, reason=f"no cgroup can be made: {cgroups.missing()}")


def machine(root: Path, groups: str, mounts: dict[str, str], files: dict[str, str], available: int = 64 * GB) -> Path:
    """A file tree with /proc as the kernel shows it. `mounts` are mount points with their root, kind and options."""
    lines = [
        f"{i} 20 0:{i} {what.split()[0]} {point} rw,relatime shared:{i} - {what.split(maxsplit=1)[1]}"
        for i, (point, what) in enumerate(mounts.items(), 30)
    ]
    files = {
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": "\n".join(["22 1 8:1 / / rw - ext4 /dev/sda rw", *lines]) + "\n",
        "proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable:   {available // 1024} kB\n",
        "proc/self/status": "Name:\tpython\nVmRSS:\t  524288 kB\n",  # half a GB
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"/sys/fs/cgroup": "/ cgroup2 cgroup2 rw"}
V1 = {
    "/sys/fs/cgroup/cpu,cpuacct": "/ cgroup cgroup rw,cpu,cpuacct",
    "/sys/fs/cgroup/memory": "/ cgroup cgroup rw,memory",
    "/sys/fs/cgroup/unified": "/ cgroup2 cgroup2 rw",  # as systemd mounts both
}
JOB = "system.slice/slurmstepd.scope/job_7"
V1_GROUPS = "4:memory:/slurm/job_7\n2:cpu,cpuacct:/slurm/job_7\n1:name=systemd:/\n0::/\n"


def v2_memory(folder: str, limit: str, used: int, cached: int = 0, high: str = "max") -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\ninactive_file {cached}\nactive_file 0\n",
    }


def v1_memory(folder: str, limit: int, used: int, cached: int = 0, hierarchical: int = NO_LIMIT) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"cache 5\ntotal_inactive_file {cached}\nhierarchical_memory_limit {hierarchical}\n",
    }


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "gigabytes", "source"),
    [
        ("0::/\n", V2, {}, 64, "the host"),
        ("", {}, {}, 64, "the host"),  # no cgroups at all
        # The process's own group has no limit, one above it has, and what is cached can be given back.
        (
            f"0::/{JOB}/step_0/user/task_0\n",
            V2,
            v2_memory(f"sys/fs/cgroup/{JOB}/step_0/user/task_0", "max", GB)
            | v2_memory(f"sys/fs/cgroup/{JOB}", str(4 * GB), 3 * GB, cached=2 * GB)
            | v2_memory("sys/fs/cgroup/system.slice", str(9 * GB), GB),
            3,
            JOB,
        ),
        ("0::/a\n", V2, v2_memory("sys/fs/cgroup/a", str(8 * GB), GB, high=str(3 * GB)), 2, "/a"),
        # A container with a name space of its own, and one that sees its group mounted as the root.
        ("0::/\n", V2, v2_memory("sys/fs/cgroup", str(3 * GB), GB), 2, "/sys/fs/cgroup"),
        (
            "0::/docker/f00\n",
            {"/sys/fs/cgroup": "/docker/f00 cgroup2 cgroup2 rw"},
            v2_memory("sys/fs/cgroup", str(3 * GB), GB),
            2,
            "/sys/fs/cgroup",
        ),
        (
            "0::/docker/f00\n",
            {"/sys/fs/cgroup": "/../.. cgroup2 cgroup2 rw"},
            v2_memory("sys/fs/cgroup", str(3 * GB), GB),
            2,
            "/sys/fs/cgroup",
        ),
        (
            "0::/my\\040job\n".replace("\\040", " "),
            {"/mnt/c\\040groups": "/ cgroup2 cgroup2 rw"},
            v2_memory("mnt/c groups/my job", str(3 * GB), GB),
            2,
            "my job",
        ),
        (
            V1_GROUPS,
            V1,
            v1_memory("sys/fs/cgroup/memory/slurm/job_7", NO_LIMIT, GB)
            | v1_memory("sys/fs/cgroup/memory/slurm", 4 * GB, 3 * GB, cached=GB),
            2,
            "/slurm",
        ),
        # A limit above what a container sees
        (
            "4:memory:/docker/f00\n",
            {"/sys/fs/cgroup/memory": "/docker/f00 cgroup cgroup rw,memory"},
            v1_memory("sys/fs/cgroup/memory", NO_LIMIT, GB, hierarchical=6 * GB),
            5,
            "/sys/fs/cgroup/memory",
        ),
        ("0::/a\n", V2, v2_memory("sys/fs/cgroup/a", str(GB), 2 * GB), 0, "/a"),  # over its limit already
    ],
)
def test_the_least_of_all_memory_limits_above_a_process_counts(groups, mounts, files, gigabytes, source, tmp_path):
    found = limits.available_memory(1, {}, machine(tmp_path, groups, mounts, files))
    assert found.value == pytest.approx(gigabytes * GB)
    assert found.source.endswith(source)


@pytest.mark.parametrize(
    ("variables", "sharers", "gigabytes", "source"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 1, 3.5, "SLURM_MEM_PER_NODE=4096"),  # this process has half a GB already
        ({"SLURM_MEM_PER_NODE": "4096"}, 4, 2, "SLURM_MEM_PER_NODE=4096"),
        ({"SLURM_MEM_PER_NODE": "0"}, 4, 64, "the host"),  # --mem=0: all of the node's
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "8"}, 4, 6, "SLURM_MEM_PER_CPU=1024"),
        ({"SLURM_MEM_PER_CPU": "1024"}, 1, 64, "the host"),  # in the shell of salloc on the login node
        ({"SLURM_MEM_PER_NODE": "200000"}, 1, 64, "the host"),
        ({"SLURM_MEM_PER_NODE": ""}, 1, 64, "the host"),
    ],
)
def test_slurms_memory_is_the_nodes_and_shared_by_all_ranks_there(variables, sharers, gigabytes, source, tmp_path):
    found = limits.available_memory(sharers, variables, machine(tmp_path, "0::/\n", V2, {}))
    assert (found.value / GB, found.source) == (pytest.approx(gigabytes), source)


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "cores"),
    [
        ("0::/a/b\n", V2, {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        (
            "0::/a/b\n",
            V2,
            {"sys/fs/cgroup/a/b/cpu.max": "400000 100000\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"},
            1.5,
        ),
        ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),  # a container
        (
            V1_GROUPS,
            V1,
            {
                "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_quota_us": "20000\n",
                "sys/fs/cgroup/cpu,cpuacct/slurm/cpu.cfs_period_us": "10000\n",
            },
            2,
        ),
    ],
)
def test_the_least_quota_of_cpu_time_counts(groups, mounts, files, cores, tmp_path):
    found = limits.cpu_quota(machine(tmp_path, groups, mounts, files))
    assert (found and found.value) == cores


EIGHT_BY_TWO = {"SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "2"}


@pytest.mark.parametrize(
    ("affinity", "quota", "variables", "cores", "source"),
    [
        (8, None, {}, 8, "affinity"),
        (8, "250000 100000", {}, 2.5, "CPU quota of"),
        (2, "250000 100000", {}, 2, "affinity"),
        (64, None, {"SLURM_CPUS_ON_NODE": "8"}, 8, "SLURM_CPUS_ON_NODE=8"),  # no cpuset holds its tasks there
        # A task of srun has its own. A batch script has the whole job's, and so have all ranks of mpirun together.
        (64, None, {**EIGHT_BY_TWO, "SLURM_STEP_NUM_TASKS": "4"}, 2, "SLURM_CPUS_PER_TASK=2"),
        (64, None, EIGHT_BY_TWO, 8, "SLURM_CPUS_ON_NODE=8"),
        (64, None, {**EIGHT_BY_TWO, "SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_RANK": "0"}, 8, "SLURM_CPUS_ON_NODE=8"),
    ],
)  # fmt: skip
def test_the_least_of_affinity_quota_and_slurms_cores_counts(
    affinity, quota, variables, cores, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)))
    files = {} if quota is None else {"sys/fs/cgroup/a/cpu.max": quota}
    found = limits.cores(variables, machine(tmp_path, "0::/a\n", V2, files))
    assert found.value == cores
    assert found.source.startswith(source)


TOLD = """
import json
from hvd_dqn.ranks import limits, placement
print(json.dumps([limits.cores(), limits.available_memory(), placement.set_thread_defaults(), placement.cores()]))
"""


@needs_cgroups
def test_a_real_group_of_one_cpu_and_three_gigabytes_is_seen():
    with cgroups.limited(cores=1, memory=3 * GB) as groups:
        done = run([*groups.enter, sys.executable, "-c", TOLD], timeout=60)
        cpu, memory = groups.folders
    cores, available, threads, whole = json.loads(done.stdout)
    assert (cores, threads, whole) == ([1, f"CPU quota of {cpu}"], 1, 1)
    assert available[1] == f"memory limit of {memory}"
    assert 2.8 * GB < available[0] <= 3 * GB


@needs_cgroups
def test_in_a_group_of_three_gigabytes_a_larger_replay_is_refused_in_one_line(tmp_path):
    with cgroups.limited(cores=1, memory=3 * GB) as groups:
        done = run(
            [
                *groups.enter,
                "hvd-dqn",
                "train",
                "identity",
                "--replay.capacity",
                "200000000",
                "--run-dir",
                tmp_path / "run",
            ]
        )
        memory = groups.folders[1]
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("hvd-dqn: The job needs ")
    assert f"GB are available (memory limit of {memory})" in line
    assert "Lower --replay.capacity" in line
    assert not (tmp_path / "run").exists()


def test_all_processes_of_a_job_together_may_have_its_least_limit(tmp_path):
    files = v2_memory("sys/fs/cgroup/a", str(4 * GB), 3 * GB)
    root = machine(tmp_path, "0::/a\n", V2, files)
    assert limits.total_memory({}, root) == (4 * GB, f"memory limit of {root}/sys/fs/cgroup/a")
    assert limits.total_memory({"SLURM_MEM_PER_NODE": "2048"}, root) == (2 * GB, "SLURM_MEM_PER_NODE=2048")


@needs_cgroups
def test_a_group_too_small_for_tensorflow_itself_is_told_in_one_line(tmp_path):
    with cgroups.limited(memory=400 * MB) as groups:
        for ranks, code in [("2", 2), ("1", 0)]:
            command = [*groups.enter, "hvd-dqn", "train", "--help"]
            done = run(command, timeout=60, OMPI_COMM_WORLD_LOCAL_SIZE=ranks)
            assert done.returncode == code, done.stderr
            assert (
                "TensorFlow alone takes about 300 MB in each rank, and this job may have 419 MB" in done.stderr
            ) == (code == 2)
            assert len(done.stderr.splitlines()) == (code == 2)


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be():
    code = """
import resource
from hvd_dqn.ranks.limits import allow_open_files
for needed, expected in [(100, 200), (300, 300), (250, 300), (900, 400)]:
    allow_open_files(needed)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (expected, 400), needed
"""
    subprocess.run(
        ["bash", "-c", 'ulimit -n 400; ulimit -Sn 200; exec "$@"', "-", sys.executable, "-c", code],
        check=True,
        timeout=60,
    )
