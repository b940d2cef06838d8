"""The watchdog over real TCP connections, its ranks being threads of this process: who is blamed for what, and who never."""

import contextlib
import errno
import json
import queue
import re
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvd_dqn.ranks import watchdog
from hvd_dqn.ranks.watchdog import NullWatchdog, Watchdog, open_watchdog
from hvd_dqn.ranks.world import Solo

NEVER = 1000.0  # seconds
PATIENCE = 60.0  # only against hangs: the machine may be busy


def wait(arrivals: queue.SimpleQueue) -> str:
    return arrivals.get(timeout=PATIENCE)


class ThreadWorld(Solo):
    """One of several ranks that are threads of this process. Its `abort` only keeps the reason."""

    def __init__(self, rank: int, size: int, values: list, barrier: threading.Barrier) -> None:
        self.rank, self.size, self.hostname = rank, size, f"host-{rank}"
        self.reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._values, self._barrier = values, barrier

    def gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait(PATIENCE)
        everyone = list(self._values)
        self._barrier.wait(PATIENCE)
        return everyone

    def abort(self, reason):
        self.reasons.put(reason)


def worlds(size: int) -> list[ThreadWorld]:
    values, barrier = [None] * size, threading.Barrier(size)
    return [ThreadWorld(rank, size, values, barrier) for rank in range(size)]


class Hand:
    """A rank, or a chief, that says over its connection what the test wants, and otherwise nothing."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        self.connection, self._lines = connection, connection.makefile("rb")

    def say(self, **message) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def report(self, age: float, where: str = "cycle 5", waits: bool = False) -> None:
        self.say(age=age, status=[where, "job.py:5 in step", waits])

    def hear(self) -> dict | None:
        line = self._lines.readline()
        return json.loads(line) if line else None

    def part(self) -> None:
        with contextlib.suppress(OSError):
            self.say(goodbye=True)

    def hang_up(self) -> None:
        self._lines.close()
        self.connection.close()


def listening(address: str = "127.0.0.1", port: int = 0) -> socket.socket:
    listener = socket.create_server((address, port))
    listener.settimeout(PATIENCE)
    return listener


def join(world: ThreadWorld) -> Hand:
    """Does by hand what a watchdog does to open on a rank other than the chief."""
    _, port, token = world.gather((world.hostname, None))[0][1]
    hand = Hand(socket.create_connection(("127.0.0.1", port)))
    hand.say(token=token, rank=world.rank)
    assert hand.hear() == {"welcome": True}
    hand.report(0.0)
    assert hand.hear() == {"heard": True}
    world.gather(True)
    return hand


def lead(world: ThreadWorld) -> Hand:
    """Does by hand what a watchdog does to open on the chief of two ranks."""
    with listening() as listener:
        world.gather((world.hostname, (["127.0.0.1"], listener.getsockname()[1], "token")))
        hand = Hand(listener.accept()[0])
    assert hand.hear() == {"token": "token", "rank": 1}
    hand.say(welcome=True)
    world.gather(True)
    return hand


@pytest.fixture(autouse=True)
def exits(monkeypatch):
    """Counts what would end this process, tests included."""
    calls = []
    monkeypatch.setattr(watchdog, "_exit_later", lambda: calls.append("exit"))
    return calls


@pytest.fixture
def ends():
    with contextlib.ExitStack() as stack:
        yield stack


def chief_of(hands: int, ends, silence: float, stall: float):
    """A watchdog on the chief, and a hand for each other rank."""
    chief, *others = worlds(1 + hands)
    with ThreadPoolExecutor() as pool:
        joining = [pool.submit(join, world) for world in others]
        dog = ends.enter_context(contextlib.closing(Watchdog(chief, silence, stall)))
        joined = [future.result() for future in joining]
    for hand in joined:
        ends.callback(hand.hang_up)
        ends.callback(hand.part)
    return chief, dog, joined


def rank_of_a_chief(ends, silence: float, stall: float = NEVER):
    """A watchdog on rank 1 of 2, and a hand for the chief."""
    chief, world = worlds(2)
    with ThreadPoolExecutor() as pool:
        leading = pool.submit(lead, chief)
        dog = ends.enter_context(contextlib.closing(Watchdog(world, silence, stall)))
        hand = leading.result()
    ends.callback(hand.hang_up)
    return world, dog, hand


def both(chiefs_part, ranks_part, silence: float = 20.0, stall: float = NEVER) -> list[ThreadWorld]:
    """Two watchdogs, each with a main thread that does its part and then closes."""

    def run(world, part):
        with contextlib.closing(Watchdog(world, silence, stall)) as dog:
            part(dog)

    pair = worlds(2)
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(run, *args) for args in zip(pair, (chiefs_part, ranks_part), strict=True)]:
            done.result()
    return pair


def test_a_rank_that_hangs_up_without_a_goodbye_is_gone(ends):
    world, _, (_, second) = chief_of(2, ends, NEVER, NEVER)
    second.connection.shutdown(socket.SHUT_RDWR)
    assert wait(world.reasons).startswith("rank 2 on host-2 is gone: its connection closed without a goodbye.")


def test_a_chief_that_hangs_up_without_a_goodbye_is_gone(ends):
    world, _, chief = rank_of_a_chief(ends, NEVER)
    chief.hang_up()
    assert wait(world.reasons).startswith("rank 0 on host-0 is gone: its connection closed without a goodbye.")


@contextlib.contextmanager
def reporting(hand: Hand):
    ended = threading.Event()

    def report():
        while not ended.wait(0.1):
            hand.report(0.0)

    with ThreadPoolExecutor() as pool:
        pool.submit(report)
        try:
            yield
        finally:
            ended.set()


def test_a_rank_from_which_nothing_is_heard_is_silent(ends):
    world, _, hands = chief_of(2, ends, 2.0, NEVER)  # 20 reports of the other: a busy machine may delay some
    with reporting(hands[0]):
        assert wait(world.reasons).startswith("rank 2 on host-2 has been silent for ")


def test_a_chief_that_answers_nothing_is_silent(ends):
    world, _, chief = rank_of_a_chief(ends, 0.5)
    assert wait(world.reasons).startswith("rank 0 on host-0 has been silent for ")
    assert "age" in chief.hear()


def test_whoever_ends_the_job_tells_the_others_to_end_without_a_word(ends, exits):
    _, _, (hand, other) = chief_of(2, ends, NEVER, NEVER)
    other.connection.shutdown(socket.SHUT_RDWR)
    assert hand.hear() == {"abort": True}
    world, dog, chief = rank_of_a_chief(ends, NEVER)
    exits.clear()
    chief.say(abort=True)
    chief.hang_up()
    dog.close()
    assert exits == ["exit"]
    assert world.reasons.empty()


# As where Horovod waits: TensorFlow generates the innermost function, in a module that has a hash for a name.
generated: dict = {"__name__": "0f6de"}
exec("def horovod_allreduce(arrivals): return arrivals.get(timeout=60)", generated)
wait_in_horovod = types.FunctionType(
    (lambda arrivals: horovod_allreduce(arrivals)).__code__,  # noqa: F821  # found in the globals below
    {"__name__": "horovod.tensorflow.mpi_ops", "horovod_allreduce": generated["horovod_allreduce"]},
)


def wait_for_phase(arrivals):
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(arrivals.get, timeout=60).result()


# As where learning overlaps acting: the main thread waits for its own that learns, and that one for other ranks.
wait_for_the_learner = types.FunctionType(
    wait_for_phase.__code__.replace(co_name="finish_phase"),
    {"__name__": "hvd_dqn.training.worker", "ThreadPoolExecutor": ThreadPoolExecutor},
)


@pytest.mark.parametrize(
    #    rank 1: seconds since its beat, and whether it waits; rank 2; whether the chief waits; who is blamed
    ("first", "second", "chief_waits", "blamed"),
    [
        (
            (50.0, False),
            (40.0, False),
            False,
            r"rank 1 on host-1 has made no progress for 5\d s; it last began: cycle 5\. It is at job\.py:5",
        ),
        (
            (40.0, False),
            (50.0, False),
            False,
            r"rank 2 on host-2 has made no progress for 5\d s; it last began: cycle 5\. It is at job\.py:5",
        ),
        (
            (40.0, False),
            (50.0, True),
            True,
            r"rank 1 on host-1 has made no progress for 4\d s; it last began: cycle 5\. It is at job\.py:5",
        ),
        (
            (40.0, True),
            (50.0, True),
            False,
            r"rank 0 on host-0 has made no progress for \d+ s; it last began: cycle 7\. It is at test_wat",
        ),
        (
            (40.0, True),
            (50.0, True),
            True,
            r"rank 2 on host-2 has made no progress for 5\d s; it last began: cycle 5\. It is at job\.py:5",
        ),
    ],
)
def test_a_stall_is_blamed_on_the_oldest_beat_of_those_in_no_collective(first, second, chief_waits, blamed, ends):
    world, dog, hands = chief_of(2, ends, NEVER, 1.5)
    dog.beat("cycle 7")
    for hand, (age, waits) in zip(hands, (first, second), strict=True):
        hand.report(age, waits=waits)
        hand.hear()
    dog.beat("cycle 7")
    reason = (wait_in_horovod if chief_waits else wait)(world.reasons)
    assert re.match(blamed, reason), reason


@pytest.mark.parametrize("wait_for_others", [wait_in_horovod, wait_for_the_learner])
@pytest.mark.parametrize("at_fault", [0, 1])
def test_of_two_main_threads_the_one_in_a_collective_is_not_blamed(at_fault, wait_for_others):
    ended, reasons = queue.SimpleQueue(), []
    waits = [wait_for_others, wait_for_others]
    waits[at_fault] = wait

    def chief(dog):
        dog.beat("cycle 8")
        reasons.append(waits[0](dog._world.reasons))
        ended.put("")

    def rank(dog):
        dog.beat("cycle 8")
        waits[1](ended)

    both(chief, rank, stall=1.0)
    told = rf"rank {at_fault} on host-{at_fault} has made no progress for \d+ s; it last began: cycle 8\. "
    assert re.match(told, reasons[0])
    assert "test_watchdog.py" in reasons[0]
    assert " in wait" in reasons[0]


@pytest.mark.parametrize("busy", [0, 1])
def test_nobody_is_blamed_for_waiting_as_long_as_one_rank_gets_on(busy, ends):
    world, dog, (hand,) = chief_of(1, ends, NEVER, 2.0)
    for _ in range(30):
        if busy == 0:
            dog.beat("evaluation")
        hand.report(0.0 if busy == 1 else 100.0)
        time.sleep(0.1)
    assert world.reasons.empty()


def test_a_rank_that_left_while_the_others_still_wait_is_to_blame(ends):
    world, dog, (hand, other) = chief_of(2, ends, NEVER, 1.5)
    hand.say(goodbye=True)
    assert hand.hear() == {"goodbye": True}
    time.sleep(0.1)
    dog.beat("cycle 9")
    other.report(0.0)
    assert re.match(r"rank 1 on host-1 has made no progress for \d+ s; it last began: its goodbye", wait(world.reasons))


@pytest.mark.parametrize(("chief_first", "rank_first"), [(0.0, 0.0), (1.5, 0.0), (0.0, 1.5)])
def test_ranks_that_say_goodbye_may_leave_one_after_the_other(chief_first, rank_first):
    pair = both(lambda dog: time.sleep(rank_first), lambda dog: time.sleep(chief_first))
    assert all(world.reasons.empty() for world in pair)


def test_a_goodbye_is_answered_so_that_nobody_leaves_while_the_other_may_still_need_it(ends):
    _, dog, (hand,) = chief_of(1, ends, NEVER, NEVER)
    hand.say(goodbye=True)
    assert hand.hear() == {"goodbye": True}
    assert hand.hear() is None
    dog.close()
    dog.close()  # once more does no harm
    assert not dog._thread.is_alive()


def test_the_connection_stays_open_until_the_goodbye_is_answered(ends):
    """A reset might overtake the goodbye, and the other would then take this rank for dead."""
    _, dog, (hand,) = chief_of(1, ends, NEVER, NEVER)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(dog.close)
        assert hand.hear() == {"goodbye": True}
        hand.connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            hand.connection.recv(1)
        hand.part()
        closing.result()
    hand.connection.settimeout(PATIENCE)
    assert hand.connection.recv(1) == b""


def test_no_rank_waits_for_a_silent_one_to_leave_nor_is_that_blamed_later(ends, monkeypatch):
    monkeypatch.setattr(watchdog, "GOODBYE_SECONDS", 0.1)
    world, dog, chief = rank_of_a_chief(ends, NEVER)
    dog.close()
    chief.hang_up()
    dog._thread.join(PATIENCE)
    assert not dog._thread.is_alive()
    assert world.reasons.empty()


def test_strangers_are_shown_the_door(ends, monkeypatch):
    monkeypatch.setattr(watchdog, "_addresses", lambda: ["127.0.0.1"])
    world, _, (hand,) = chief_of(1, ends, NEVER, NEVER)
    port = hand.connection.getpeername()[1]
    said = [
        b'{"token": "", "rank": 1}\n',
        b'{"rank": 1}\n',
        b'{"goodbye": true}\n',
        b"7\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * 100_000,
        b"\xff\n",
    ]
    for words in said:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as stranger:
            stranger.sendall(words)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b"", words
    with socket.create_connection(("127.0.0.1", port)):
        pass
    hand.report(0.0)
    assert hand.hear() == {"heard": True}
    assert world.reasons.empty()


def test_an_idle_stranger_is_dropped_and_not_blamed(ends):
    world, _, (hand,) = chief_of(1, ends, 2.0, NEVER)
    port = hand.connection.getpeername()[1]
    with reporting(hand), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as stranger:
        assert stranger.recv(100) == b""
    assert world.reasons.empty()


def test_a_rank_that_gives_up_an_attempt_and_makes_another_is_not_gone(ends):
    world, dog, (hand,) = chief_of(1, ends, NEVER, NEVER)
    with socket.create_connection(hand.connection.getpeername()) as connection:
        attempt = Hand(connection)
        attempt.say(token=dog._token, rank=1)
        assert attempt.hear() == {"welcome": True}
        attempt.hang_up()
    for _ in range(2):
        hand.report(0.0)
        hand.hear()
    assert world.reasons.empty()


def test_after_a_suspension_of_the_whole_job_all_clocks_start_again(ends, monkeypatch):
    skipped = [0.0]
    monkeypatch.setattr(watchdog, "monotonic", lambda: time.monotonic() + skipped[0])
    world, _, (hand,) = chief_of(1, ends, 2.0, NEVER)
    skipped[0] += 500.0
    assert re.match(r"rank 1 on host-1 has been silent for \d s: ", wait(world.reasons))

    world, dog, (hand,) = chief_of(1, ends, 2000.0, 2.0)
    dog.beat("cycle 5")
    hand.report(0.0)
    hand.hear()
    skipped[0] += 500.0
    assert re.match(r"rank \d on host-\d has made no progress for \d s; it last began: cycle 5", wait(world.reasons))


def test_a_rank_that_cannot_reach_the_chief_is_named_once_and_nobody_is_blamed_for_it(monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "_reach", lambda addresses, port, hello: None)
    pair = both(lambda dog: time.sleep(1.5), lambda dog: time.sleep(1.5), silence=1.0, stall=0.4)
    assert all(world.reasons.empty() for world in pair)
    said = capsys.readouterr().err
    assert re.match(r"hvd-dqn: Not watched: rank 1 on host-1\. TCP port \d+ of the chief cannot be reached", said)
    assert said.count("\n") == 1


def test_the_loopback_comes_first_on_the_chiefs_own_host_only(monkeypatch):
    tried = []
    monkeypatch.setattr(watchdog, "_addresses", lambda: ["10.0.0.7", "127.0.0.1", "10.0.0.8"])
    monkeypatch.setattr(watchdog, "_reach", lambda addresses, port, hello: tried.append(addresses))
    for hosts in (("here", "here"), ("here", "there")):
        pair = worlds(2)
        for world, host in zip(pair, hosts, strict=True):
            world.hostname = host
        with ThreadPoolExecutor() as pool:
            for opening in [pool.submit(Watchdog, world, NEVER, NEVER) for world in pair]:
                opening.result().close()
    assert tried == [["127.0.0.1", "10.0.0.7", "10.0.0.8"], ["10.0.0.7", "10.0.0.8", "127.0.0.1"]]


def test_a_rank_goes_on_to_the_next_address_when_another_server_has_the_chiefs_port(monkeypatch):
    monkeypatch.setattr(watchdog, "CONNECT_SECONDS", 0.0)  # every address once
    with (
        listening() as listener,
        listening("127.0.0.2", listener.getsockname()[1]) as other,
        ThreadPoolExecutor() as pool,
    ):
        port = listener.getsockname()[1]
        reached = pool.submit(watchdog._reach, ["127.0.0.2", "127.0.0.1"], port, {"rank": 1})
        other.accept()[0].close()
        hand = Hand(listener.accept()[0])
        assert hand.hear() == {"rank": 1}
        hand.say(welcome=True)
        with reached.result() as connection:
            assert connection.getpeername() == ("127.0.0.1", port)
        hand.hang_up()
    assert watchdog._reach(["127.0.0.1"], port, {"rank": 1}) is None


def test_a_job_ends_even_where_the_abort_blocks(ends, monkeypatch, exits):
    world, _, (hand,) = chief_of(1, ends, NEVER, NEVER)
    asked_before = []
    monkeypatch.setattr(world, "abort", lambda reason: (asked_before.extend(exits), world.reasons.put(reason)))
    hand.connection.shutdown(socket.SHUT_RDWR)
    wait(world.reasons)
    assert asked_before == ["exit"]


def test_the_last_resort_ends_the_process_by_itself(monkeypatch):
    monkeypatch.undo()
    codes = queue.SimpleQueue()
    monkeypatch.setattr(watchdog, "ABORT_SECONDS", 0.05)
    monkeypatch.setattr("os._exit", codes.put)
    watchdog._exit_later()
    assert codes.get(timeout=PATIENCE) == 1


def test_a_process_alone_and_a_silence_of_none_watch_nobody():
    for watcher in (open_watchdog(Solo(), 1.0, 1.0), open_watchdog(worlds(2)[1], None, 1.0)):
        assert isinstance(watcher, NullWatchdog)
        watcher.beat("cycle 1")
        watcher.close()


def test_asking_where_the_main_thread_is_never_hangs_the_process():
    """In Python 3.11 it does where garbage is collected meanwhile, whose finalizers let threads run that start or end."""
    program = """
import gc, threading, time
from hvd_dqn.ranks.watchdog import frame_of

class Slow:
    def __init__(self): self.itself = self
    def __del__(self): time.sleep(0.001)  # lets other threads run

def start_threads():
    for _ in range(300):
        threading.Thread(target=time.sleep, args=(0,)).start()

gc.set_threshold(1)
starter = threading.Thread(target=start_threads)
starter.start()
while starter.is_alive():
    Slow()
    frame_of(threading.main_thread().ident)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr


def test_a_chief_without_open_files_rests_and_says_so_and_accepts_when_it_may(capsys, monkeypatch):
    """EMFILE leaves the connection in the listener's queue, so the selector would return at once, for ever."""
    chief, other = worlds(2)
    monkeypatch.setattr(watchdog, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(watchdog, "ATTEMPT_SECONDS", 0.3)
    accept, calls, full = socket.socket.accept, [], threading.Event()
    full.set()

    def refuse(listener):
        calls.append(time.monotonic())
        if full.is_set():
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", refuse)
    with ThreadPoolExecutor(2) as threads:
        opened = [threads.submit(open_watchdog, each, 4.0, NEVER) for each in (chief, other)]
        watching, late = [each.result(PATIENCE) for each in opened]
    assert "Not watched: rank 1 on host-1. The chief has no more open files" in capsys.readouterr().err
    assert len(calls) < 20  # one a second or so, not a hundred thousand
    full.clear()
    ends = [key.fileobj for key in list(watching._selector.get_map().values())]
    address = watching._resting or next(end for end in ends if is_listening(end))
    with socket.create_connection(("127.0.0.1", address.getsockname()[1]), timeout=PATIENCE) as connection:
        connection.sendall(json.dumps({"token": watching._token, "rank": 1}).encode() + b"\n")
        connection.settimeout(PATIENCE)
        assert b"welcome" in connection.recv(100)
    for each in (watching, late):
        each.close()


def is_listening(end):
    return bool(end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
