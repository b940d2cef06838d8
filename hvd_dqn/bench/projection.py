"""A cost model of many ranks, fitted to measurements of few.

The time of one phase of K updates of N ranks is

    work(B) + waiting(N, K) + messages(K) * allreduce(N, bytes)

`work` is a rank's own time, linear in its batch B. `waiting` is the time until the slowest of N ranks is ready for each
message. Efficiency is `work` over the sum: the steps per second of the job over those of N independent processes. The
model leaves out votes and reports: their periods are settings, and a vote is at most one small message per phase.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hvd_dqn.ranks.placement import FUSED_FLOATS

NEGOTIATIONS = 2  # small all-reduces before each message: Horovod finds out what is ready on all ranks
MOST_BATCH = 1 << 20  # transitions
DRAWS = 200_000  # of lateness: hundreds of them exceed the usual lateness of the slowest of 512 ranks


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
    # Neither term can be negative. If noise makes one negative, only the other one is fitted.
    if fixed < 0:
        return Line(0.0, float(np.sum(x / y) / np.sum((x / y) ** 2)))
    if slope < 0:
        return Line(float(np.sum(1 / y) / np.sum(1 / y**2)), 0.0)
    return Line(fixed, slope)


class Interconnect(NamedTuple):
    """What a message between ranks costs: `latency` s per hop, `seconds_per_byte`, and `overhead` s of Horovod's threads."""

    latency: float
    seconds_per_byte: float
    overhead: float

    def allreduce(self, ranks: int, size: float) -> float:
        """Seconds for `size` bytes: by a ring or, for short messages, by recursive doubling, as MPI libraries choose.

        The ring takes 2 (N - 1) hops, each of 1/N of the message (Patarasuk & Yuan 2009); doubling takes log2 N hops of all
        of it (Thakur et al. 2005). Horovod adds a fixed cost of its threads, and negotiations that grow with log2 N.
        """
        if ranks == 1:
            return 0.0
        rounds = math.ceil(math.log2(ranks))
        hops = 2 * (ranks - 1)
        ring = hops * (self.latency + size / ranks * self.seconds_per_byte)
        doubling = rounds * (self.latency + size * self.seconds_per_byte)
        return self.overhead + NEGOTIATIONS * rounds * self.latency + min(ring, doubling)


def fit_interconnect(ranks: int, horovod: Mapping[float, float], mpi: Mapping[float, float]) -> Interconnect:
    """Fits to the seconds of all-reduces by their bytes: Horovod's and, if they were measured, MPI's own.

    Without MPI's times of small messages, half of a small message's time counts as the interconnect's.
    """
    whole = fit_line(list(horovod.items()))
    # The fixed cost has two parts: the interconnect's (MPI's time of a small message, for each negotiation and for the
    # message itself), and that of Horovod's threads (the rest).
    small = [seconds - size * whole.slope for size, seconds in mpi.items() if size * whole.slope < whole.fixed / 10]
    waits = 1 + NEGOTIATIONS
    fixed = min(whole.fixed, waits * max(0.0, min(small))) if small else whole.fixed / 2
    rounds, hops = math.ceil(math.log2(ranks)), 2 * (ranks - 1)
    # At two ranks and any size, doubling is one hop of the whole message; above, large messages go round the ring.
    bytes_sent = 1.0 if ranks == 2 else hops / ranks
    return Interconnect(fixed / waits / rounds, whole.slope / bytes_sent, whole.fixed - fixed)


def expected_wait(lateness: np.ndarray, ranks: int) -> float:
    """The expected maximum of N independent draws from the sample, minus the mean."""
    ordered = np.sort(lateness)
    below = np.arange(len(ordered) + 1) / len(ordered)
    return float(ordered @ np.diff(below**ranks) - ordered.mean())


class PhaseTime(NamedTuple):
    """Measured on one rank alone, from the end of one phase to the end of the next, environment steps included."""

    batch: float  # transitions per update on this rank
    updates: int  # K
    seconds: float  # mean
    least: float
    deviation: float  # standard
    message: int  # bytes of the parameters


def waiting(phase: PhaseTime, ranks: int, waits: int) -> float:
    """Seconds per phase in which a rank waits for the slowest one, if all wait for each other `waits` times.

    The time of a phase above its minimum is modelled by a gamma distribution with the same mean and deviation. A gamma
    distribution is divisible: a K-th of the phase has a K-th of the shape and the same scale.
    """
    late, variance = phase.seconds - phase.least, phase.deviation**2
    if late <= 0 or variance <= 0:
        return 0.0
    shape, scale = late**2 / variance / waits, variance / late
    return waits * scale * _gamma_wait(float(f"{shape:.6g}"), ranks)


@functools.lru_cache  # another batch only changes the scale
def _gamma_wait(shape: float, ranks: int) -> float:
    return expected_wait(np.random.default_rng(0).standard_gamma(shape, size=DRAWS), ranks)


def cost(phase: PhaseTime, interconnect: Interconnect, ranks: int, sync: str) -> dict[str, float]:
    """Seconds of a phase of `ranks` ranks, in parts: work, waiting, talking.

    If gradients are averaged, each of the K updates waits and sends. If parameters are averaged, the phase waits once
    and also sends Adam's two moments, in three messages if they are large.
    """
    if ranks == 1:
        return {"work": phase.seconds, "waiting": 0.0, "talking": 0.0}
    if sync == "gradients":
        times, talking = phase.updates, phase.updates * interconnect.allreduce(ranks, phase.message)
    else:
        messages = 3 if phase.message > 4 * FUSED_FLOATS else 1
        times, talking = 1, messages * interconnect.allreduce(ranks, 3 * phase.message / messages)
    return {"work": phase.seconds, "waiting": waiting(phase, ranks, times), "talking": talking}


def efficiency(parts: Mapping[str, float]) -> float:
    return parts["work"] / sum(parts.values())


def at_batch(phase: PhaseTime, per_update: Line, batch: float) -> PhaseTime:
    """The phase with another batch: its time from the line, its lateness as that of several of the old phases."""
    seconds = phase.updates * per_update(batch)
    factor = seconds / phase.seconds
    deviation = math.sqrt(factor) * phase.deviation
    return phase._replace(batch=batch, seconds=seconds, least=factor * phase.least, deviation=deviation)


def batch_for(
    target: float, phase: PhaseTime, per_update: Line, interconnect: Interconnect, ranks: int, sync: str
) -> int | None:
    """The smallest batch per rank, up to MOST_BATCH, with at least this efficiency; None if there is none."""

    def reached(batch: int) -> bool:
        return efficiency(cost(at_batch(phase, per_update, batch), interconnect, ranks, sync)) >= target

    if not reached(MOST_BATCH):
        return None
    low, high = 0, MOST_BATCH  # efficiency grows with the batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
