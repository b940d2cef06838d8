"""What a job of many ranks would reach, computed from what few of them were measured to take.

The time of one phase of K updates of N ranks is

    work(B) + waiting(N, K) + messages(K) * allreduce(N, bytes)

`work` is a rank's own time, linear in its batch B, `waiting` is for the slowest of N ranks before each message, and efficiency
is `work` over the whole: the steps per second of the job over those of N ranks that never talk.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Line(NamedTuple):
    """`fixed + slope * x`, both at least 0."""

    fixed: float
    slope: float

    def __call__(self, x: float) -> float:
        return self.fixed + self.slope * x


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """The line with the least squared relative errors over (x, y), y above 0; through the origin for a single x."""
    x, y = np.array(points, np.float64).T
    if len(np.unique(x)) == 1:
        return Line(0.0, float(np.mean(y) / x[0]))
    fixed, slope = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones(len(y)), rcond=None)[0].tolist()
    # Nothing takes less than no time: where noise says so, the other term alone is fitted.
    if fixed < 0:
        return Line(0.0, float(np.sum(x / y) / np.sum((x / y) ** 2)))
    if slope < 0:
        return Line(float(np.sum(1 / y) / np.sum(1 / y**2)), 0.0)
    return Line(fixed, slope)


class Network(NamedTuple):
    """What a message between ranks costs: `latency` s per hop, `seconds_per_byte`, and `overhead` s that Horovod adds."""

    latency: float
    seconds_per_byte: float
    overhead: float

    def allreduce(self, ranks: int, size: float) -> float:
        """Seconds for `size` bytes: the ring or, for short messages, recursive doubling, as MPI libraries choose.

        The ring takes 2 (N - 1) hops of 1/N of the message each (Patarasuk & Yuan 2009), doubling log2 N of all of it
        (Thakur et al. 2005). Horovod agrees on what is ready by a tree, so that its part grows as log2 N too.
        """
        if ranks == 1:
            return 0.0
        rounds = math.ceil(math.log2(ranks))
        hops = 2 * (ranks - 1)
        ring = hops * (self.latency + size / ranks * self.seconds_per_byte)
        doubling = rounds * (self.latency + size * self.seconds_per_byte)
        return rounds * self.overhead + min(ring, doubling)


def fit_network(ranks: int, horovod: Mapping[float, float], raw: Mapping[float, float]) -> Network:
    """From the seconds of all-reduces by their bytes, among `ranks` ranks: Horovod's, and MPI's own where it was asked.

    Without MPI's, half of what a small message takes counts as the network's, as two equal waits.
    """
    whole = fit_line(list(horovod.items()))
    # Of the fixed cost, what MPI's own fastest message takes is the network's, and the rest Horovod's. Not its smallest: beside
    # Horovod's busy thread any of them may have been slow.
    fixed = min(whole.fixed, *raw.values()) if raw else whole.fixed / 2
    rounds, hops = math.ceil(math.log2(ranks)), 2 * (ranks - 1)
    # At two ranks and any size, doubling is one hop of the whole message; above, large messages go round the ring.
    bytes_sent = 1.0 if ranks == 2 else hops / ranks
    return Network(fixed / rounds, whole.slope / bytes_sent, (whole.fixed - fixed) / rounds)


def expected_waits(seconds: Sequence[float] | np.ndarray, ranks: Sequence[int]) -> dict[int, float]:
    """How much longer than the mean the longest of N independent draws from `seconds` is expected to be, for each N.

    Exact for the distribution that was measured; it knows nothing longer than the longest phase seen.
    """
    ordered = np.sort(np.asarray(seconds, np.float64))
    below = np.arange(len(ordered) + 1) / len(ordered)
    return {n: float(ordered @ np.diff(below**n) - ordered.mean()) for n in ranks}


class Phase(NamedTuple):
    """What one rank alone was measured to do from the end of one phase to the end of the next, its steps included."""

    batch: int  # transitions per update on this rank
    updates: int  # K
    seconds: float  # mean
    waits: Mapping[int, float]  # by the number of ranks, as of `expected_waits`
    message: int  # bytes of the parameters


def cost(phase: Phase, network: Network, ranks: int, sync: str) -> dict[str, float]:
    """Seconds of a phase of `ranks` ranks, in parts: work, waiting, talking.

    With gradients each of the K updates waits for the slowest rank; their times are taken to vary independently, each by
    1/sqrt(K) of the phase's deviation. With parameters the phase waits once, and Adam's two moments are sent too.
    """
    if ranks == 1:
        return {"work": phase.seconds, "waiting": 0.0, "talking": 0.0}
    wait = phase.waits[nearest_above(phase.waits, ranks)]
    if sync == "parameters":
        return {"work": phase.seconds, "waiting": wait, "talking": network.allreduce(ranks, 3 * phase.message)}
    talking = phase.updates * network.allreduce(ranks, phase.message)
    return {"work": phase.seconds, "waiting": math.sqrt(phase.updates) * wait, "talking": talking}


def efficiency(parts: Mapping[str, float]) -> float:
    return parts["work"] / sum(parts.values())


def nearest_above(known: Mapping[int, float], ranks: int) -> int:
    """The smallest known number of ranks that is not below `ranks`, else the largest: waiting only grows with it."""
    return min((n for n in known if n >= ranks), default=max(known))


def at_batch(phase: Phase, per_update: Line, batch: float) -> Phase:
    """The same phase with another batch: its time by the line, its waits in proportion to it."""
    seconds = phase.updates * per_update(batch)
    waits = {n: wait * seconds / phase.seconds for n, wait in phase.waits.items()}
    return phase._replace(batch=math.ceil(batch), seconds=seconds, waits=waits)


def batch_for(
    target: float, phase: Phase, per_update: Line, network: Network, ranks: int, sync: str, limit: int = 1 << 20
) -> int | None:
    """The smallest batch per rank, up to `limit`, with at least this efficiency; None where waiting alone forbids it."""

    def reached(batch: int) -> bool:
        return efficiency(cost(at_batch(phase, per_update, batch), network, ranks, sync)) >= target

    if not reached(limit):
        return None
    low, high = 0, limit  # efficiency grows with the batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
