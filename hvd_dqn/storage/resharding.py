"""Redistributes the replays that N ranks saved to the rings of M ranks: evenly, the oldest first, losing nothing.

In a `survey` the ranks share the reading of the old replays' step types and episode steps, and tell each other which
episodes they found. From these every rank computes the same `deal`. Then it collects its own rings with `gather_state`,
which reads only what belongs to them. In a new ring

  - every transition whose stack was complete in the old ring can be sampled, with the same stack. The others (the oldest
    few of a ring that has wrapped) could not be sampled before, and are now context only;
  - every episode has ended. An unfinished episode is truncated at its newest observation, because the environments
    start new episodes. So its newest n - 1 transitions, whose windows were incomplete, can be sampled at once;
  - an episode that was cut becomes two. The first part is truncated, and the observation at the cut is its last one. The
    second part begins with the frame_stack - 1 observations before the cut, of type NOTHING, for its stacks. The n - 1
    windows across a cut become shorter and bootstrap from the cut with gamma**m, as at any truncation;
  - episode steps are counted from a piece's first slot, so that no stack ever reaches into the piece before it.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hvd_dqn.agent.replay import GOES_ON, NOTHING, TRUNCATED
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import World
from hvd_dqn.storage.arrays import UNREADABLE, Rows
from hvd_dqn.storage.checkpoint import Damaged, Snapshot, small

# An episode longer than a quarter of a ring's share is cut, even if the rings would fill evenly without. Otherwise an endless
# episode would give some rings only old transitions, which are overwritten together, and others only new ones.
PARTS = 4
# An episode that takes a smaller part of a ring than this is never cut: it would even out too little.
SHORT = 1 / 100
# Slots copied at once: 4,096 * 84 * 84 B = 29 MB of Atari frames.
CHUNK = 4096

# A piece is a stretch of one old stream, laid in a new ring as `context` + `steps` + 1 consecutive slots: observations
# for the stacks only, transitions, and the last observation.
PIECE = np.dtype(
    [
        ("shard", np.int64),
        ("env", np.int64),
        ("first", np.int64),  # the first transition's slot, counted as write positions are: without modulo
        ("before", np.int64),  # observations of the same episode that the old ring holds before it
        ("steps", np.int64),
        ("age", np.int64),  # slots between the first transition and the stream's head
        ("cut", np.bool_),  # the episode continues in another piece
        ("context", np.int64),
        ("ring", np.int64),
        ("at", np.int64),  # the slot in the new ring
    ]
)


class Episodes(NamedTuple):
    """The episodes in all old replays, or what these still hold of them."""

    pieces: np.ndarray  # [P] of type PIECE, without ring and place
    ranks: int  # N, whose replays these were


class Survey(NamedTuple):
    """What every rank knows of the old replays: their episodes, and of each replay where on disk its arrays are."""

    episodes: Episodes
    replays: list[dict[str, Rows]]


def survey(snapshot: Snapshot, world: World, frame_stack: int) -> Survey:
    """Reads which episodes a checkpoint holds: each rank its share of the files. A collective.

    Raises InputError, on all ranks, if one of them cannot read a file.
    """
    found: list[tuple[int, np.ndarray, dict[str, Rows]]] = []
    complaint = None
    try:
        for number in range(world.rank, snapshot.ranks, world.size):
            replay = snapshot.part(number)["replay"]
            needed = small({name: replay[name] for name in ("step_types", "episode_steps", "write_positions", "slots")})
            arrays = {name: rows for name, rows in replay.items() if isinstance(rows, Rows)}
            found.append((number, _episodes_of(number, needed, frame_stack), arrays))
    except Damaged as damage:
        complaint = f"The checkpoint {snapshot.path} cannot be taken over: {damage}."
    except UNREADABLE as error:
        complaint = f"The checkpoint {snapshot.path} was not made by this version: {type(error).__name__}: {error}."
    answers = world.gather((found, complaint))
    for _, each in answers:
        if each is not None:
            raise InputError(each)
    parts = sorted((part for theirs, _ in answers for part in theirs), key=lambda part: part[0])
    pieces = np.concatenate([np.empty(0, PIECE), *(pieces for _, pieces, _ in parts)])
    return Survey(Episodes(_with_context(pieces, frame_stack), snapshot.ranks), [arrays for *_, arrays in parts])


class Deal(NamedTuple):
    """The pieces that each new ring receives."""

    slots: int  # per new ring, the head included: the planned number, or more if needed
    transitions: int  # in all old replays together, without those with incomplete stacks
    dropped: int  # the oldest of these, for which `limit` left no room
    cuts: int
    write_positions: np.ndarray  # [R] slots filled in each new ring
    counts: np.ndarray  # [R] transitions in each new ring; all of them can be sampled at once
    pieces: np.ndarray  # [P] of type PIECE, ring by ring, the oldest first
    ranks: int  # N, whose replays these were

    def describe(self, ranks: int) -> str:
        """One sentence for the log; each of the `ranks` has an equal number of the rings."""
        counts = self.counts.reshape(ranks, -1).sum(axis=1)
        # More than eight numbers are summarised.
        shares = ", ".join(f"{n:,}" for n in counts) if ranks <= 8 else f"{counts.min():,} to {counts.max():,} each"
        return (
            f"{self.transitions:,} transitions of {self.ranks} rank{'s' * (self.ranks != 1)} redistributed to {ranks}: "
            f"{shares}; rings of {self.slots:,} slots; episodes cut in {self.cuts:,} place{'s' * (self.cuts != 1)}"
            + (f"; the oldest {self.dropped:,} dropped for lack of room" if self.dropped else "")
        )


def deal(episodes: Episodes, rings: int, slots: int, frame_stack: int, limit: int | None = None) -> Deal:
    """Plans how the streams of all old replays are laid in `rings` new rings, for which `slots` slots are planned.

    If a ring would need more than `limit` slots, each ring drops its oldest transitions.

    The fullest ring gets at most 2 * frame_stack + 1 % more slots than its share. The emptiest lacks at most the
    longest piece, a quarter of a share. A pure function of integers: every rank gets the same result.
    """
    assert limit is None or limit >= slots
    pieces, ranks = episodes
    transitions = int(pieces["steps"].sum())
    share = math.ceil(_sizes(pieces).sum() / rings)
    if limit is not None:
        share = min(share, limit - 1)
    # Parts have 3 * frame_stack transitions or more, so at most a quarter of the laid slots is context.
    pieces = _cut(pieces, max(share // PARTS, 4 * frame_stack), frame_stack)
    pieces = _lay(pieces, rings, frame_stack)
    if limit is not None:
        pieces = _newest(pieces, rings, limit - 1, frame_stack)
    write_positions = _per_ring(pieces, _sizes(pieces), rings)
    counts = _per_ring(pieces, pieces["steps"], rings)
    return Deal(
        slots=max(slots, int(write_positions.max()) + 1),
        transitions=transitions,
        dropped=transitions - int(counts.sum()),
        cuts=int(np.count_nonzero(pieces["cut"])),
        write_positions=write_positions,
        counts=counts,
        pieces=pieces,
        ranks=ranks,
    )


def find_episodes(shards: Iterable[Mapping[str, Any]], frame_stack: int) -> Episodes:
    """The episodes of old replays in memory.

    `shards` are what `Replay.state()` returned on each old rank; only slots, step_types, episode_steps and
    write_positions are needed.
    """
    found = [_episodes_of(number, shard, frame_stack) for number, shard in enumerate(shards)]
    return Episodes(_with_context(np.concatenate([np.empty(0, PIECE), *found]), frame_stack), len(found))


def _episodes_of(number: int, shard: Mapping[str, Any], frame_stack: int) -> np.ndarray:
    """[P] the episodes of one old replay, without their context."""
    found: list[np.ndarray] = [np.empty(0, PIECE)]
    slots = int(shard["slots"])
    arrays = (shard["write_positions"], shard["step_types"], shard["episode_steps"])
    for env, row in enumerate(zip(*arrays, strict=True)):
        head = int(row[0])
        oldest = head - min(head, slots - 1)
        place = np.arange(oldest, head + 1) % slots  # oldest to newest, the head included
        step_types, episode_steps = row[1][place], row[2][place]
        # The head holds the newest observation, or none yet if an episode is about to begin: a piece without steps.
        bounds = np.append(np.flatnonzero((episode_steps == 0) | (place == place[0])), len(place))
        begin, last = bounds[:-1], bounds[1:] - 1  # first and last observations
        transitions = np.append(np.flatnonzero(step_types != NOTHING), len(place))
        first = transitions[np.searchsorted(transitions, begin)]
        # The ring has lost the beginning of its oldest episode, so the next k - 1 stacks are incomplete.
        first = np.maximum(first, np.where(episode_steps[begin] > 0, begin + frame_stack - 1, 0))
        pieces = np.zeros(len(begin), PIECE)
        pieces["shard"], pieces["env"] = number, env
        pieces["first"], pieces["age"] = oldest + first, head - oldest - first
        pieces["before"], pieces["steps"] = first - begin, last - first
        found.append(pieces[pieces["steps"] > 0])
    return np.concatenate(found)


def _with_context(pieces: np.ndarray, frame_stack: int) -> np.ndarray:
    pieces["context"] = np.minimum(pieces["before"], frame_stack - 1)
    return pieces


def _sizes(pieces: np.ndarray) -> np.ndarray:
    """[P] slots that each piece takes."""
    return pieces["context"] + pieces["steps"] + 1


def _per_ring(pieces: np.ndarray, amounts: np.ndarray, rings: int) -> np.ndarray:
    sums = np.zeros(rings, np.int64)
    np.add.at(sums, pieces["ring"], amounts)
    return sums


def _parts(pieces: np.ndarray, skip: np.ndarray, steps: np.ndarray, frame_stack: int) -> np.ndarray:
    """[P] parts of the pieces: the `steps` transitions after the first `skip`."""
    parts = pieces.copy()
    parts["cut"] |= skip + steps < pieces["steps"]
    parts["first"] += skip
    parts["before"] += skip
    parts["age"] -= skip
    parts["steps"] = steps
    return _with_context(parts, frame_stack)


def _cut(pieces: np.ndarray, longest: int, frame_stack: int) -> np.ndarray:
    """[P2] the same transitions in pieces of at most `longest` slots. Longer pieces are cut into equal parts."""
    # A part takes up to frame_stack slots besides its transitions.
    number = np.where(_sizes(pieces) > longest, -(-pieces["steps"] // (longest - frame_stack)), 1)
    part = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    pieces, number = np.repeat(pieces, number), np.repeat(number, number)
    start, stop = pieces["steps"] * part // number, pieces["steps"] * (part + 1) // number
    return _parts(pieces, start, stop - start, frame_stack)


def _lay(pieces: np.ndarray, rings: int, frame_stack: int) -> np.ndarray:
    """[P2] the pieces with their rings. In order, oldest first, each piece goes to the ring that is the emptiest then.

    A piece that would fill the ring beyond `full` is cut there, unless it is short, and the rest goes to the next ring.
    A cut costs up to k = frame_stack slots and closes its ring, so there are at most R cuts. Each ring has 2 * k spare
    slots. So while pieces remain, some ring has more than k slots left, and a cut always leaves room for a transition.
    """
    # Streams advance in lockstep, so the distance from the head tells the age. Sort by middles, because pieces overlap.
    pieces = pieces[np.argsort(-(2 * pieces["age"] - pieces["steps"]), kind="stable")]
    share = math.ceil(_sizes(pieces).sum() / rings)
    full, short = share + 2 * frame_stack, int(share * SHORT)
    emptiest = [(0, ring) for ring in range(rings)]  # a heap
    laid: list[tuple[int, int, int, int]] = []  # piece, transitions skipped, transitions laid, ring
    for piece, (before, steps) in enumerate(zip(pieces["before"].tolist(), pieces["steps"].tolist(), strict=True)):
        skip = 0
        while skip < steps:
            filled, ring = emptiest[0]
            besides, take = min(before + skip, frame_stack - 1) + 1, steps - skip
            if besides + take > short:
                take = min(take, full - filled - besides)
            assert take > 0
            laid.append((piece, skip, take, ring))
            heapq.heapreplace(emptiest, (filled + besides + take, ring))
            skip += take
    index, skip_, take_, ring_ = np.array(laid, np.int64).reshape(-1, 4).T
    pieces = _parts(pieces[index], skip_, take_, frame_stack)
    pieces["ring"] = ring_
    return _placed(pieces[np.argsort(ring_, kind="stable")], rings)


def _placed(pieces: np.ndarray, rings: int) -> np.ndarray:
    sizes = _sizes(pieces)
    filled = _per_ring(pieces, sizes, rings)
    pieces["at"] = np.cumsum(sizes) - sizes - (np.cumsum(filled) - filled)[pieces["ring"]]
    return pieces


def _newest(pieces: np.ndarray, rings: int, room: int, frame_stack: int) -> np.ndarray:
    """[P2] the rest of the pieces if each ring has only `room` slots besides its head."""
    sizes = _sizes(pieces)
    newer = _per_ring(pieces, sizes, rings)[pieces["ring"]] - pieces["at"] - sizes  # slots laid after the piece
    left = room - newer
    # A piece that loses its beginning needs context instead.
    kept = np.where(sizes <= left, pieces["steps"], np.maximum(left - frame_stack, 0))
    parts = _parts(pieces, pieces["steps"] - kept, kept, frame_stack)
    return _placed(parts[kept > 0], rings)


def gather_state(
    deal: Deal,
    rings: range,
    shards: Sequence[Mapping[str, Any]],
    rng: Mapping[str, Any],
    into: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """This rank's `rings`, as `Replay.load_state` takes them in a replay of `deal.slots` slots.

    `shards` are the old ranks' states. Of their arrays (frames, actions, rewards, step_types, and masks and priorities if
    there are any) only the slots that this rank needs are looked at, up to CHUNK at a time, so an array may be `Rows`.
    `rng` is the state of this rank's generator. Raises LookupError if masks are missing, and ValueError if arrays have
    other shapes than those in `into`.

    `into` holds arrays [E, used or more, ...] by their names in the state, for example a replay's own. They are filled
    in place. The state then consists of views of them, and in `load_state` NumPy need not copy an array to itself.
    """
    mine = deal.pieces[(deal.pieces["ring"] >= rings.start) & (deal.pieces["ring"] < rings.stop)]
    mine = mine[np.lexsort((mine["env"], mine["shard"]))]
    write_positions = deal.write_positions[rings.start : rings.stop].copy()
    used = int(write_positions.max()) + 1
    arrays = {name: array[:, :used] for name, array in (into or {}).items()}

    # For each slot its source and destination. Slots from the same old stream are contiguous.
    sizes = _sizes(mine)
    ends = np.append(0, np.cumsum(sizes))
    step = np.arange(ends[-1]) - np.repeat(ends[:-1], sizes)
    source = np.repeat(mine["first"] - mine["context"], sizes) + step
    ring, at = np.repeat(mine["ring"] - rings.start, sizes), np.repeat(mine["at"], sizes) + step
    stream = (mine["shard"] << 32) + mine["env"]

    names = ["frames", "actions", "rewards", "step_types"]
    names += ["masks"] * ("masks" in arrays or "masks" in shards[0]) + ["priorities"] * ("priorities" in shards[0])
    if into is not None and "priorities" not in into:
        names = [name for name in names if name != "priorities"]
    for name in names:
        if name not in arrays:
            like = shards[0][name]
            arrays[name] = np.zeros((len(rings), used, *like.shape[2:]), like.dtype)
        new = arrays[name]
        for this in np.unique(stream).tolist():
            old, env = shards[this >> 32][name], this & 0xFFFFFFFF
            if new.shape[2:] != old.shape[2:]:
                raise ValueError(f"expected {name} of shape {new.shape[2:]}, received {old.shape[2:]}")
            begin, end = ends[np.searchsorted(stream, [this, this + 1])]
            for i in range(begin, end, CHUNK):
                some = slice(i, min(i + CHUNK, end))
                # If a stream has wrapped, its row is as long as its ring.
                new[ring[some], at[some]] = old[env, source[some] % old.shape[1]]

    filled = np.arange(used) < write_positions[:, None]
    step_types = arrays["step_types"]
    episode_steps = arrays.setdefault("episode_steps", np.zeros((len(rings), used), np.int32))
    step_types[~filled], episode_steps[~filled] = NOTHING, 0
    step_types[ring, at] = np.where(step < np.repeat(mine["context"], sizes), NOTHING, step_types[ring, at])
    episode_steps[ring, at] = step
    last = mine["ring"] - rings.start, mine["at"] + sizes - 1
    leaving = last[0], last[1] - 1
    step_types[last] = NOTHING
    step_types[leaving] = np.where(step_types[leaving] == GOES_ON, TRUNCATED, step_types[leaving])
    return arrays | {"write_positions": write_positions, "slots": deal.slots, "rng": rng}
