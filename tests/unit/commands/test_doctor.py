"""What the doctor finds, alone and in made-up reports of several ranks."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from hvd_dqn.commands import doctor
from hvd_dqn.commands import host as doctor_host
from hvd_dqn.ranks.world import Solo

VERSIONS = {"python": "3.11.7", "tensorflow": "2.15.1", "horovod": "0.28.1", "mpi4py": "4.1.2"}


def rank(number=0, size=2, **differs):
    """A healthy rank on a host of two cores, except for what `differs`."""
    return {
        "rank": number,
        "size": size,
        "local_rank": number,
        "local_size": size,
        "host": "one",
        "launched": size,
        "cores": [0, 1],
        "threads": 1,
        "gpus": [],
        "versions": VERSIONS,
        "horovod": {"mpi_built": True, "nccl_built": False},
        "settings": {},
        "averaged": ((size + 1) / 2, -1e-3),
        "mpi": "Open MPI v4.1.4",
        "mpirun": "mpirun (Open MPI) 4.1.4 (/usr/bin/mpirun)" if number == 0 else None,
        "limits": {"cores": [2, "affinity"], "memory": [8e9, "the host"], "quota": None},
        "replaced": [],
        "shared_memory": 64 << 20,
        "open_files": 1 << 20,
        "address": "10.0.0.1",
        "read_error": None,
        **differs,
    }


def quota(cores):
    return {"cores": [cores, "CPU quota of /sys/fs/cgroup"], "memory": [8e9, "the host"], "quota": cores}


def without(package):
    return {name: version for name, version in VERSIONS.items() if name != package}


def shown(report, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(doctor.render(report))
    return capture.get()


def test_healthy_ranks_have_no_problem():
    nccl = {"nccl_built": True}
    for ranks in [
        [rank(0, 1)],
        [rank(0), rank(1)],
        [rank(0, cores=[0]), rank(1, cores=[1])],  # bound
        [rank(0, 1, threads=2, versions=VERSIONS)],
        [rank(0, gpus=["0"], horovod=nccl), rank(1, gpus=["1"], horovod=nccl)],
        [rank(0, gpus=["0"], horovod=nccl), rank(1, gpus=["0"], horovod=nccl, host="two")],
        [rank(0, threads=2), rank(1, threads=2, host="two")],
        [rank(0, limits=quota(2)), rank(1, limits=quota(2))],
        [rank(0, 1, threads=1, limits=quota(1))],
        [rank(0, 1, address="127.0.1.1")],  # a note only: one host works
        [rank(0, address="127.0.1.1"), rank(1, address="127.0.1.1")],
        [rank(0, mpirun=None), rank(1)],
        [
            rank(0, mpi="Intel(R) MPI Library 2021.9", mpirun="Intel(R) MPI Library for Linux* OS, Version 2021.9"),
            rank(1),
        ],
        [rank(0, mpirun="OpenRTE 4.1.2 (/opt/mpirun)"), rank(1)],
        [rank(0, open_files=-1), rank(1)],  # no limit
        [rank(i, read_error="Operation not permitted", settings={doctor_host.SINGLE_COPY: "none"}) for i in range(2)],
    ]:
        assert doctor.problems(ranks) == []


@pytest.mark.parametrize(
    ("ranks", "complaint", "cure"),
    [
        ([rank(0, 1, launched=2)], "2 ranks, but this one is not connected to the others", "one mpirun on PATH"),
        ([rank(0, 1, versions=without("horovod"))], "several ranks need horovod", "launch/setup.sh"),
        ([rank(0, 1, versions=without("mpi4py"))], "several ranks need mpi4py", "launch/setup.sh"),
        ([rank(0, 1, horovod={"horovod_error": "undefined symbol"})], "undefined symbol", "launch/setup.sh"),
        ([rank(0, averaged=(1, -1e-3)), rank(1, averaged=(2, -1e-3))], "does not average gradients", "launch/setup.sh"),
        ([rank(0), rank(1, averaged=(1.5, 1e-3))], "does not average gradients", "launch/setup.sh"),
        ([rank(0, threads=2), rank(1, threads=2)], "2 ranks on one run 4 threads on 2 cores", "INTRAOP_THREADS to 1"),
        ([rank(0, cores=[1]), rank(1, cores=[1])], "run 2 threads on 1 core ", "start fewer ranks"),
        ([rank(0, threads=2), rank(1, threads=1)], "run 3 threads on 2 cores", "mpirun --bind-to none"),
        (
            [rank(0, threads=2), rank(1, threads=2, host="two"), rank(2)],  # dealt out host by host
            "2 ranks on one run 3 threads on 2 cores",
            "INTRAOP_THREADS to 1",
        ),
        (
            [rank(i, gpus=["3"], horovod={"nccl_built": True}) for i in range(2)],
            "Ranks 0, 1 share GPU 3 on one",
            "one rank per GPU",
        ),
        ([rank(0, gpus=["0"]), rank(1, gpus=["1"])], "without NCCL", "launch/setup.sh --gpu"),
        (
            [rank(0), rank(1), rank(2, host="two", versions=VERSIONS | {"tensorflow": "2.15.0"})],
            "different versions of tensorflow: 2.15.0 on two and 2.15.1 elsewhere",
            "one .venv",
        ),
        (
            [rank(0, limits=quota(1)), rank(1, limits=quota(1))],
            "2 ranks on one run 2 threads on a CPU quota of 1 ",
            "fewer ranks",
        ),
        (
            [rank(0, 1, threads=2, limits=quota(1.5))],
            "1 rank on one run 2 threads on a CPU quota of 1.5 ",
            "INTRAOP_THREADS to 1",
        ),
        (
            [rank(0, replaced=[["numpy", "1.26.4", "2.2.6"], ["keras", "2.15.0", "3.12.4"]]), rank(1)],
            ".venv on one has numpy 1.26.4 instead of 2.2.6, keras 2.15.0 instead of 3.12.4",
            "-m pip install --force-reinstall --no-deps numpy==2.2.6 keras==3.12.4",
        ),
        (
            [rank(0, 1, mpirun="HYDRA build details: Version 4.0 (/opt/mpich/bin/mpirun)")],
            "is another MPI's: HYDRA",
            "launch/setup.sh",
        ),
        (
            [rank(0, 1, mpirun="mpirun (Open MPI) 5.0.3 (/opt/bin/mpirun)")],
            "uses Open MPI v4.1.4, but the mpirun",
            "on PATH",
        ),
        (
            [rank(0, 1, mpi="none: RuntimeError: cannot load MPI library")],
            "finds no MPI (RuntimeError: cannot load",
            "the module",
        ),
        (
            [rank(i, read_error="Operation not permitted") for i in range(2)],
            "may not read each other's memory (Operation not permitted)",
            "set OMPI_MCA_btl_vader_single_copy_mechanism=none",
        ),
        (
            [rank(i, 32, cores=[i]) for i in range(32)],
            "/dev/shm on one has 67 MB, and the 32 ranks need 134",
            "--shm-size 1g",
        ),
        (
            [rank(0, 900, open_files=1024, shared_memory=1 << 40)],
            "needs 1,156 open files on one",
            "--ranks.silence-seconds None",
        ),
        (
            [rank(0, address="127.0.1.1"), rank(1, host="two")],
            "one knows itself as 127.0.1.1",
            "Remove the line `127.0.1.1 one` from its /etc/hosts",
        ),
    ],
)
def test_each_problem_is_told_once_with_its_cure(ranks, complaint, cure):
    found = doctor.problems(ranks)
    assert len(found) == 1
    assert complaint in found[0]
    assert cure in found[0]
    report = {"hvd_dqn": "0", "ranks": ranks, "allreduce": [], "notes": [], "problems": found}
    assert complaint.split()[0] in shown(report)
    assert "No problem" not in shown(report)


def test_a_process_alone_is_examined_without_talking_to_anyone():
    report = json.loads(json.dumps(doctor.examine(Solo())))
    (only,) = report["ranks"]
    assert (only["rank"], only["size"], only["launched"]) == (0, 1, 1)
    assert len(only["cores"]) >= 1
    assert only["versions"]["tensorflow"].startswith("2.")
    assert report["allreduce"] == []
    text = shown(report)
    assert re.search(r"^0/1 .* CPU +none +none +none", text, re.MULTILINE)
    assert f"tensorflow {only['versions']['tensorflow']}" in " ".join(text.split())


def test_the_report_tells_what_may_be_used_and_what_limits_it():
    small = {"cores": [1.5, "CPU quota of /sys/fs/cgroup/a"], "memory": [3e9, "SLURM_MEM_PER_NODE=2861"], "quota": 1.5}
    text = " ".join(shown({"hvd_dqn": "0", "ranks": [rank(0), rank(1, host="two", limits=small)], "allreduce": [],
                           "notes": doctor.notes([rank(0, 1, address="127.0.1.1")]), "problems": []}).split())  # fmt: skip
    assert "limits 2 cores (affinity), 8.0 GB of memory (the host)" in text
    assert "on two: 1.5 cores (CPU quota of /sys/fs/cgroup/a), 3.0 GB of memory (SLURM_MEM_PER_NODE=2861)" in text
    assert "- For jobs of several hosts: one knows itself as 127.0.1.1" in text
    assert "No problem found" in text


def test_a_process_finds_out_whether_it_may_read_anothers_memory():
    mine = doctor_host.Readable()
    assert doctor_host.read_error(*mine.place) is None
    assert doctor_host.read_error(2**22 + 1, mine.place[1]) == "No such process"
    code = """
import ctypes, os
from hvd_dqn.commands.host import Readable
memory = Readable()
print(*memory.place, flush=True)
input()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        process, address = map(int, child.stdout.readline().split())
        assert doctor_host.read_error(process, address) is None
        assert doctor_host.read_error(process, 16) == "Bad address"
        child.stdin.close()


def test_without_horovod_a_process_alone_is_told_what_several_would_need(monkeypatch):
    class Bare(Solo):
        def describe(self):
            return {}

    monkeypatch.setattr(doctor, "versions", lambda: {"python": "3.11.7", "tensorflow": "2.15.1"})
    report = doctor.examine(Bare())
    needed = "A single process works, but several ranks need horovod and mpi4py: run launch/setup.sh."
    assert report["problems"] == [needed]
    assert "not installed" in shown(report)


def test_the_slowest_rank_counts_in_each_allreduce(monkeypatch):
    class Pair(Solo):
        size = 2

        def gather(self, value):
            return [value, {**value, "rank": 1} if isinstance(value, dict) else value]

        def wrap(self, optimizer, compression):
            return optimizer

        def max(self, values):
            return np.full(values.shape, 3e-4)

    monkeypatch.setattr(doctor, "FLOATS", (10, 1500))
    rows = doctor.examine(Pair())["allreduce"]
    assert [row["bytes"] for row in rows] == [40, 6000]
    assert all(row["low"] == row["median"] == row["high"] == pytest.approx(300) for row in rows)
    assert rows[1]["megabytes_per_second"] == pytest.approx(20)  # 6,000 B in 300 µs


MPI = {"mpi_built": True, "nccl_built": False, "mpi_enabled": True, "gloo_enabled": False}
MPI |= {"mpi_library": "Open MPI v4.1.4", "mpi_thread_level": "MULTIPLE"}
GLOO = {"mpi_built": True, "nccl_built": False, "mpi_enabled": False, "gloo_enabled": True}
SMALL = {"bytes": 18_440, "median": 129.4, "low": 124.0, "high": 155.0, "megabytes_per_second": 142.5}
LARGE = {"bytes": 6_748_824, "median": 18_423.0, "low": 18_384.0, "high": 18_462.0, "megabytes_per_second": 366.3}


def test_people_see_a_row_per_rank_and_every_allreduce():
    report = {
        "hvd_dqn": "0",
        "ranks": [rank(i, 3, cores=[0, 1, 2, 5], horovod=MPI, gpus=["7"][i:]) for i in range(3)],
        "allreduce": [SMALL, LARGE],
        "notes": [],
        "problems": [],
    }
    text = shown(report, width=100)
    for i, device in enumerate(["GPU 7", "CPU", "CPU"]):
        row = f"{i}/3 +one +{i}/3 +0-2, 5 +1 +{device} +Open MPI v4.1.4 +MULTIPLE +MPI *$"
        assert re.search(row, text, re.MULTILINE), text
    assert "18 kB in 129 µs (quartiles 124 and 155): 142 MB/s" in text
    assert "6,749 kB in 18,423 µs (quartiles 18,384 and 18,462): 366 MB/s" in text
    assert "mpi built yes, nccl built no" in text
    assert "No problem found." in text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_nothing_is_cut_off_in_a_narrow_terminal(width):
    long = {
        "host": "W" * 34,
        "gpus": ["Z" * 12],
        "horovod": {**MPI, "mpi_library": "Y" * 25},
        "cores": [*range(0, 64, 2)],
        "settings": {"OMPI_MCA_mca_base_component_path": "Q" * 200},
    }
    report = {
        "hvd_dqn": "0",
        "ranks": [rank(7, 1024, **long)],
        "allreduce": [LARGE],
        "notes": [],
        "problems": ["X" * 300],
    }
    text = shown(report, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert [text.count(letter) for letter in "WZYXQ"] == [34, 12, 25, 300, 200]
    assert {"7/1024", "62", "MULTIPLE", "MPI", "controller"} <= set(text.split())


def test_under_gloo_there_is_no_mpi_to_name():
    text = shown(
        {"hvd_dqn": "0", "ranks": [rank(0, horovod=GLOO)], "allreduce": [], "notes": [], "problems": []}, width=100
    )
    assert re.search(r"^0/2 .* CPU +none +none +Gloo *$", text, re.MULTILINE), text


def test_a_gpu_is_known_by_its_number_on_the_host():
    device = "/physical_device:GPU:{}".format
    for names, visible, expected in [
        ([], None, []),
        ([device(1)], None, ["1"]),
        ([device(0)], "3", ["3"]),
        ([device(1)], "4,6", ["6"]),
        ([device(0)], "GPU-8f2e, GPU-11aa", ["GPU-8f2e"]),
    ]:
        environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        assert doctor.gpus(names, environ) == expected


def test_settings_in_force_leave_out_what_launchers_tell_their_own():
    set_by_people = {"HOROVOD_CYCLE_TIME": "0.05", "OMPI_MCA_pml": "ob1", "OMP_NUM_THREADS": "1", "TF_CPP_X": "2"}
    internal = {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
        "HOROVOD_SECRET_KEY": "s",
        "OMPI_MCA_orte_hnp_uri": "u",
        "OMPI_COMM_WORLD_SIZE": "2",
        "PATH": "/bin",
    }
    assert doctor.steering_variables(set_by_people | internal) == set_by_people
