"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, all they leave in one directory."""

import os
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import ranks

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# The first node has the machine's own name, so that mpirun starts ranks there itself; the second's need a daemon.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits for as long as a credential holds: two minutes unless said.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
# Open MPI names its shared memory by the job's number: another test's cluster on this machine shall have others.
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
TmpFS={folder}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000
ReturnToService=2
KillWait=60
GresTypes=gpu
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:2 Weight=1
NodeName=second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Weight=2
PartitionName=all Nodes=ALL Default=YES
"""
# Any two device files stand for GPUs: what Slurm tells its tasks of them is the same.
GRES = "NodeName={host} Name=gpu File=/dev/null,/dev/zero\n"


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str | Path, **options) -> subprocess.CompletedProcess:
        return ranks.run(command, **(self.environment | options))

    def ask(self, *command: str | Path) -> str:
        done = self.run(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def about(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, ExitCode, Restarts, Reason and so on."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", job)))

    def wait_until(self, job: str, *states: str) -> dict[str, str]:
        ranks.wait_until(lambda: self.about(job)["JobState"] in states, f"job {job} does not become {states}")
        return self.about(job)


def missing() -> str | None:
    """Why there can be no cluster here."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else None


@contextmanager
def open_slurm(folder: Path) -> Iterator[Slurm]:
    """The cluster, in a directory that every user may enter, as munge wants it."""
    slurm, host = Slurm(folder), socket.gethostname().split(".")[0]
    for name in ("state", f"tmp-{host}", "tmp-second"):
        (folder / name).mkdir()
    with ExitStack() as sockets:  # three free ports: each is taken until all are known
        found = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [end.getsockname()[1] for end in found]
    first_job = random.randrange(1, 60_000_000)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, ports=ports, first_job=first_job))
    (folder / "gres.conf").write_text(GRES.format(host=host))
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file")]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as daemons:
        try:
            for command in (
                ["munged", "--foreground", *munge],
                ["slurmctld", "-D"],
                ["slurmd", "-D", "-N", host],
                ["slurmd", "-D", "-N", "second"],
            ):
                daemons.enter_context(_daemon(slurm, command))
                if command[0] == "munged":
                    ranks.wait_until((folder / "munge.socket").exists, "munged does not start")
            ranks.wait_until(lambda: _idle(slurm) == 2, "the nodes do not come up")
            yield slurm
            slurm.run("scancel", "--full", "--signal=KILL", "--user=root")
            ranks.wait_until(lambda: slurm.ask("squeue", "-h") == "", "jobs do not end")
        except BaseException:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}", *log.read_text().splitlines()[-15:], sep="\n")
            raise


def _idle(slurm: Slurm) -> int:
    done = slurm.run("sinfo", "-h", "-N", "-o", "%t")
    return done.stdout.split().count("idle")


@contextmanager
def _daemon(slurm: Slurm, command: list[str]) -> Iterator[None]:
    environment = os.environ | slurm.environment | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with (slurm.folder / "daemons.log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
