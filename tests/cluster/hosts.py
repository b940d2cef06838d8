"""Two hosts on one machine: each with a name, an address, processes and an sshd of its own, joined by a switch.

All of it hangs on three processes, `unshare`, with whose end the kernel clears everything away: no host's network, mounts
or processes are seen outside, and nothing outside is changed. The file system is shared, as on a cluster.
"""

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from tests import ranks

PORT = 2222  # of every sshd
SSH_CONFIG = """
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
LogLevel ERROR
"""
SSHD_CONFIG = """
Port {port}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""
# On every host: ssh's settings and the hosts' names as the test wrote them, in place of the machine's own, seen only here.
START = """
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount --bind {folder}/hosts /etc/hosts
hostname {name}
ip link set lo up
touch {folder}/{name}.is-there
exec /usr/sbin/sshd -D -E {folder}/{name}.log -f {folder}/sshd_config
"""


class Host:
    def __init__(self, name: str, address: str, pid: int) -> None:
        self.name, self.address, self.pid = name, address, pid

    def enter(self, command: Sequence[str | Path]) -> list[str]:
        """`command` as it is run on this host."""
        inside = ["nsenter", "-t", str(self.pid), "--net", "--uts", "--mount", "--pid"]
        return [*inside, f"--wd={ranks.ROOT}", "--", *map(str, command)]

    def run(self, command: Sequence[str | Path], **options) -> subprocess.CompletedProcess:
        # A job that hangs must be ended as a whole: what it leaves would hold its pipes, and nobody would hear of it.
        alarm = threading.Timer(ranks.TIMEOUT, lambda: [process.kill() for process in self._inside()])
        alarm.start()
        try:
            done = ranks.run(self.enter(command), timeout=2 * ranks.TIMEOUT, **options)
            assert alarm.is_alive(), f"hung for {ranks.TIMEOUT} s: {command}\n{done.stdout}\n{done.stderr}"
            return done
        finally:
            alarm.cancel()

    def processes(self) -> list[str]:
        """The command lines of all that runs here but sshd itself, which lets the dead lie."""
        lines = []
        for process in self._inside():
            with suppress(psutil.NoSuchProcess):
                lines.append("" if process.name() == "sshd" else " ".join(process.cmdline()))
        return [line for line in lines if line]

    def _inside(self) -> list[psutil.Process]:
        here, found = os.stat(f"/proc/{self.pid}/ns/pid").st_ino, []
        for process in psutil.process_iter():
            with suppress(OSError):  # it has ended
                if process.pid != self.pid and os.stat(f"/proc/{process.pid}/ns/pid").st_ino == here:
                    found.append(process)
        return found


class Hosts:
    """The first is where jobs are started."""

    def __init__(self, switch: int, hosts: list[Host]) -> None:
        self._switch, self.hosts = switch, hosts

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def cut(self) -> None:
        """From now on the switch swallows what the second host sends and should get; no end notices that."""
        _ip(self._switch, "link set port1 nomaster")

    def join(self) -> None:
        _ip(self._switch, "link set port1 master switch")


def missing() -> str:
    """Why there cannot be two hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "namespaces of one's own need root"
    absent = [tool for tool in ("ip", "unshare", "nsenter", "ssh-keygen", "/usr/sbin/sshd") if not shutil.which(tool)]
    if absent:
        return f"not installed: {', '.join(absent)} (packages iproute2, openssh-server)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "name", "switch",
         "type", "bridge"], capture_output=True, text=True,
    )  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """alpha (10.9.8.1) and beta (10.9.8.2), each on its own `e0`, with keys made for this time only in `folder`."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    addresses = {"alpha": "10.9.8.1", "beta": "10.9.8.2"}
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder, port=PORT))
    names = "".join(f"{address} {name}\n" for name, address in addresses.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    with ExitStack() as ends:
        is_there = folder / "switch.is-there"
        switch = ends.enter_context(_namespaces(["--net"], f"touch {is_there}; exec sleep infinity", is_there))
        _ip(switch, "link add name switch type bridge")
        _ip(switch, "link set switch up")
        hosts = []
        for number, (name, address) in enumerate(addresses.items()):
            own = ["--net", "--uts", "--mount", "--pid", "--mount-proc"]
            start = START.format(folder=folder, name=name)
            pid = ends.enter_context(_namespaces(own, start, folder / f"{name}.is-there"))
            _ip(switch, f"link add name port{number} type veth peer name e0 netns {pid}")
            _ip(switch, f"link set port{number} master switch up")
            _ip(pid, f"address add {address}/24 dev e0")
            _ip(pid, "link set e0 up")
            hosts.append(Host(name, address, pid))
        yield Hosts(switch, hosts)
    for name in addresses:  # of an mpirun or a daemon that the kernel ended
        shutil.rmtree(f"{tempfile.gettempdir()}/ompi.{name}.{os.getuid()}", ignore_errors=True)


@contextmanager
def _namespaces(kinds: Sequence[str], script: str, is_there: Path) -> Iterator[int]:
    """The process id of a shell with `script` in namespaces of its own; whatever runs in them ends with it."""
    with subprocess.Popen(["unshare", *kinds, "--fork", "--kill-child", "sh", "-euc", script]) as holder:
        try:
            ranks.wait_until(lambda: holder.poll() is not None or is_there.exists(), "the host does not start")
            assert holder.poll() is None, f"the host's start failed: {script}"
            yield psutil.Process(holder.pid).children()[0].pid
        finally:
            holder.kill()


def _ip(pid: int, words: str) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "--net", "ip", *words.split()], check=True)
