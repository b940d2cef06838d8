"""Ends the whole job when one of its ranks is dead, frozen or stalled, from a thread on every rank.

A collective has no timeout, and Horovod's stall inspector sees neither a frozen process nor mpi4py. So each rank has
one TCP connection to the chief, independent of MPI, Horovod and Gloo. Over it the rank reports that it is alive, and
how long ago its main thread last beat. The chief watches the ranks, and each rank watches the chief. Messages are lines
of JSON.
"""

import contextlib
import errno
import gc
import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any, NamedTuple

import psutil

from hvd_dqn.errors import RunError
from hvd_dqn.ranks.limits import OTHER_FILES, allow_open_files
from hvd_dqn.ranks.world import World

CONNECT_SECONDS = 30.0  # for reaching the chief at one of its addresses
ATTEMPT_SECONDS = 3.0  # for one of them
GOODBYE_SECONDS = 2.0  # for the answer to a goodbye
ABORT_SECONDS = 5.0  # for world.abort: MPI_Abort may block while the main thread sits inside MPI
TURN_SECONDS = 0.5  # all ranks see the chief's end, one after another: the first that reports it ends the others
LONGEST_LINE = 4096  # bytes
UNKNOWN_RANK = -1  # of a peer that has not sent the token yet
# A main thread that waits for other ranks, or for its own learning thread, has its innermost frame in one of these.
WAITS_IN = ("horovod.", "mpi4py.", "tensorflow.", "hvd_dqn.ranks.world.", "hvd_dqn.training.worker.finish_phase.")
WAITS_BY = ("threading", "concurrent.futures._base")  # inner frames, which do not tell what waits


class Status(NamedTuple):
    """Where the main thread of a rank is."""

    beaten: float  # time of its last beat, by the reader's own clock
    where: str  # what it was about to do at that time
    line: str  # of the program: where it is now
    waits: bool  # whether it is in a collective, as far as its innermost frame tells


class Peer:
    """The other end of a connection."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.rank = rank
        self.is_watched = rank != UNKNOWN_RANK  # else after its first report
        self.heard = monotonic()
        self._partial = b""  # the line that is not complete yet

    def send(self, **message: Any) -> None:
        # Ignore a full buffer or a closed connection: such a peer will be found silent or gone.
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any] | None:
        """The messages that have arrived; None if the connection has ended or sent something else."""
        try:
            data = self.connection.recv(65536)
            *lines, self._partial = (self._partial + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except BlockingIOError:
            return []
        except (OSError, ValueError):
            return None
        return messages if data and len(self._partial) <= LONGEST_LINE else None


class Watchdog:
    """Ends the job with `world.abort`, from its own thread, with a message that names the rank at fault and its host.

    A rank is *gone* when its connection closes without a goodbye. It is *silent* when nothing was heard from it for
    `silence_seconds`, which must exceed the longest time for which anything holds the interpreter's lock. The job has
    *stalled* when no rank has beaten for `stall_seconds`, which must exceed the longest time between two beats. While
    one rank beats, others may have to wait for it. The rank at fault is in no collective and has the oldest beat.

    A rank that cannot reach the chief is not watched, and the chief reports that. Then stalls are not detected either,
    because that rank may be beating unheard. Opening a watchdog is a collective.
    """

    def __init__(self, world: World, silence_seconds: float, stall_seconds: float) -> None:
        self._world, self._silence, self._stall = world, silence_seconds, stall_seconds
        self._interval = min(1.0, silence_seconds / 4, stall_seconds / 4)  # between reports
        self._main_thread = threading.get_ident()
        self._selector, self._ends = selectors.DefaultSelector(), contextlib.ExitStack()
        self._peers: list[Peer] = []
        self._statuses: dict[int, Status] = {}  # on the chief: of the others
        self._leaves = False
        self._resting: socket.socket | None = None  # a listener that could not accept, until the next report
        self._is_full = False  # whether that has happened: this process may open no more files
        self._bell, bell = socket.socketpair()  # wakes the thread when this rank closes
        self._ends.enter_context(self._bell)
        self._on_arrival(bell, lambda: self._leave(bell))
        self.beat("the start")
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._open()

    def beat(self, where: str) -> None:
        """The main thread reports that it is alive, and what it is about to do."""
        self._beat = (monotonic(), where)

    def close(self) -> None:
        """Says goodbye: from now on this rank neither watches nor is watched. All ranks close at the same point."""
        with contextlib.suppress(OSError):  # closed before
            self._bell.send(b"!")
        self._thread.join(GOODBYE_SECONDS)

    def _open(self) -> None:
        world, chief = self._world, self._world.rank == 0
        offer: Any = None
        if chief:
            self._token = secrets.token_hex(16)  # against mistaken connections, not attacks: it travels unencrypted
            # One connection for each rank. Ranks that cannot be accepted are told below.
            allow_open_files(world.size + OTHER_FILES)
            listener = socket.create_server(("", 0), backlog=1024)
            listener.setblocking(False)
            self._ends.enter_context(listener)
            self._listen(listener)
            offer = (_addresses(), listener.getsockname()[1], self._token)
        everyone = world.gather((world.hostname, offer))
        addresses, port, token = everyone[0][1]
        self._names = [f"rank {rank} on {host}" for rank, (host, _) in enumerate(everyone)]
        if not chief:
            # On the chief's own host its loopback always works; elsewhere that address is another machine's.
            is_neighbor = world.hostname == everyone[0][0]
            likely_first = sorted(addresses, key=lambda address: address.startswith("127.") != is_neighbor)
            connection = _reach(likely_first, port, {"token": token, "rank": world.rank})
            if connection is not None:
                self._add(Peer(connection, rank=0))
        self._thread.start()
        reached = world.gather(chief or bool(self._peers))
        if chief and not all(reached):
            names = ", ".join(name for name, is_reached in zip(self._names, reached, strict=True) if not is_reached)
            why = f"TCP port {port} of the chief cannot be reached from there at {', '.join(addresses)}"
            cure = "Let the hosts reach each other"
            if self._is_full:
                why, cure = "The chief has no more open files for them", "Raise `ulimit -n` where rank 0 runs"
            warning = f"hvd-dqn: Not watched: {names}. {why}. Only the launcher may notice if they die. {cure}."
            print(warning, file=sys.stderr, flush=True)

    def _on_arrival(self, end: socket.socket, action: Callable[[], None]) -> None:
        self._selector.register(self._ends.enter_context(end), selectors.EVENT_READ, action)

    def _add(self, peer: Peer) -> None:
        self._peers.append(peer)
        self._on_arrival(peer.connection, lambda: self._hear(peer))

    def _drop(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _run(self) -> None:
        due = monotonic()
        try:
            while not self._leaves or any(peer.is_watched for peer in self._peers):
                for key, _ in self._selector.select(max(0.0, due - monotonic())):
                    key.data()
                now = monotonic()
                if now >= due:
                    if self._resting is not None:
                        self._listen(self._resting)
                        self._resting = None
                    if now - due > min(self._silence, self._stall) / 2:
                        self._restart_clocks(now)
                    if not self._leaves:
                        self._judge(now)
                        self._report(now)
                    due = now + self._interval
        except RunError as fault:
            sleep(TURN_SECONDS * min(max(self._world.rank - 1, 0), 10))
            for peer in self._peers:
                peer.send(abort=True)
            _exit_later()
            self._world.abort(f"{fault} This ends the job; continue from its last checkpoint with --resume.")
        self._ends.close()

    def _restart_clocks(self, now: float) -> None:
        """Call it after this process was suspended. Perhaps the whole job was, so do not count that time."""
        self._beat = (now, self._beat[1])
        for peer in self._peers:
            peer.heard = now
        self._statuses = {rank: status._replace(beaten=now) for rank, status in self._statuses.items()}

    def _judge(self, now: float) -> None:
        for peer in [peer for peer in self._peers if now - peer.heard > self._silence]:
            if peer.is_watched:
                raise RunError(
                    f"{self._names[peer.rank]} has been silent for {now - peer.heard:.0f} s: it is frozen, or its host "
                    "or the link to it is down."
                )
            self._drop(peer)
        ranks = {0: self._own_status(), **self._statuses}
        is_complete = self._world.rank == 0 and len(ranks) == self._world.size
        if is_complete and all(now - status.beaten > self._stall for status in ranks.values()):
            at_fault, seen = min(ranks.items(), key=lambda item: (item[1].waits, item[1].beaten))
            raise RunError(
                f"{self._names[at_fault]} has made no progress for {now - seen.beaten:.0f} s; it last began: "
                f"{seen.where}. It is at {seen.line}; the others wait. Raise --ranks.stall-seconds if this is normal."
            )

    def _report(self, now: float) -> None:
        if self._world.rank != 0:  # the chief only answers
            beaten, *rest = self._own_status()
            for chief in self._peers:
                chief.send(age=now - beaten, status=rest)

    def _own_status(self) -> Status:
        beaten, where = self._beat
        frame = frame_of(self._main_thread)
        # Skip generated code: TensorFlow's wrappers of operations.
        while frame and (frame.f_code.co_filename.startswith("<") or frame.f_globals.get("__name__") in WAITS_BY):
            frame = frame.f_back
        if not frame:
            return Status(beaten, where[:200], "its end", waits=False)
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        waits = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}.".startswith(WAITS_IN)
        return Status(beaten, where[:200], line[:200], waits)

    def _hear(self, peer: Peer) -> None:
        messages = peer.receive()
        peer.heard = monotonic()
        if messages is None:
            if self._leaves or not peer.is_watched:
                return self._drop(peer)
            name = self._names[peer.rank]
            raise RunError(
                f"{name} is gone: its connection closed without a goodbye. If it printed no reason, it was killed."
            )
        for message in messages:
            if peer.rank == UNKNOWN_RANK:
                if not isinstance(message, dict) or message.get("token") != self._token:
                    return self._drop(peer)
                peer.rank = int(message["rank"])
                peer.send(welcome=True)
            elif "abort" in message:  # its sender prints the reason
                _exit_later()
                return self._drop(peer)
            elif "goodbye" in message:
                if self._world.rank == 0:
                    self._statuses[peer.rank] = Status(peer.heard, "its goodbye", "its end", waits=False)
                if not self._leaves:
                    peer.send(goodbye=True)
                return self._drop(peer)
            elif self._world.rank == 0:
                peer.is_watched = True
                self._statuses[peer.rank] = Status(peer.heard - message["age"], *message["status"])
                peer.send(heard=True)

    def _listen(self, listener: socket.socket) -> None:
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            self._add(Peer(listener.accept()[0], rank=UNKNOWN_RANK))
        except OSError as error:  # else the peer has closed the connection again
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The connection stays in the queue, and the selector would return at once, again and again.
                self._selector.unregister(listener)
                self._resting, self._is_full = listener, True

    def _leave(self, bell: socket.socket) -> None:
        bell.recv(64)
        self._leaves = True
        for peer in self._peers:
            peer.send(goodbye=True)


class NullWatchdog:
    """The watchdog of a single process, or one that is turned off: does nothing."""

    def beat(self, where: str) -> None:
        pass

    def close(self) -> None:
        pass


def open_watchdog(world: World, silence_seconds: float | None, stall_seconds: float) -> Watchdog | NullWatchdog:
    """The watchdog of this rank; `silence_seconds` None turns it off. A collective."""
    if world.size == 1 or silence_seconds is None:
        return NullWatchdog()
    return Watchdog(world, silence_seconds, stall_seconds)


def frame_of(thread: int) -> FrameType | None:
    """The innermost frame of the thread with this identity; None after its end."""
    # Python 3.11 holds an internal lock while it collects the frames. If the garbage collector runs then, a finalizer
    # may switch to another thread that waits for this lock, and the process hangs (cpython issue 106883).
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames().get(thread)
    finally:
        if collects:
            gc.enable()


def _exit_later() -> None:
    """Ends this process if neither MPI_Abort nor the launcher does."""
    last_resort = threading.Timer(ABORT_SECONDS, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()


def _addresses() -> list[str]:
    """The IPv4 addresses of this host."""
    ends = [end for interface in psutil.net_if_addrs().values() for end in interface]
    return [end.address for end in ends if end.family == socket.AF_INET]


def _reach(addresses: list[str], port: int, hello: dict[str, Any]) -> socket.socket | None:
    """A connection to the chief, at the first address that answers; None if none does."""
    deadline = monotonic() + CONNECT_SECONDS
    while True:
        for address in addresses:
            with contextlib.suppress(OSError), contextlib.ExitStack() as ends:
                connection = ends.enter_context(socket.create_connection((address, port), timeout=ATTEMPT_SECONDS))
                connection.sendall(json.dumps(hello).encode() + b"\n")
                answer = ends.enter_context(connection.makefile("rb", buffering=0)).readline()
                if b"welcome" in answer:
                    ends.pop_all()
                    return connection
        if monotonic() > deadline:
            return None
        sleep(1)
