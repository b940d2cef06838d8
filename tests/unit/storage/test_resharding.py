"""Resharding: what N ranks stored, M ranks must be able to sample, and nothing else."""

import copy
import json
import pickle
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hvd_dqn.agent.replay import NOTHING, Replay
from hvd_dqn.agent.transition import Transition
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo
from hvd_dqn.storage import resharding
from hvd_dqn.storage.arrays import write_arrays
from hvd_dqn.storage.checkpoint import Snapshot, divide, rank_file, replay_file
from hvd_dqn.storage.resharding import Deal, Survey, find_episodes, gather_state, survey

GAMMA = 0.5  # powers of it are exact, so that rows can be compared without tolerance
Row = tuple[list, float, float, list]  # observation, reward, discount, next observation


def deal(shards: Iterable[dict], rings: int, slots: int, stack: int, limit: int | None = None) -> Deal:
    return resharding.deal(find_episodes(shards, stack), rings, slots, stack, limit)


class Episode:
    def __init__(self, frame: np.ndarray) -> None:
        self.frames, self.rewards, self.terminated, self.ended = [frame], [], False, False


class Ranks:
    """N ranks with their replays, played in lockstep, and the history of all they ever saw.

    Every frame has its own number, and every action: it names the transition.
    """

    def __init__(self, ranks: int, envs: int, slots: int, n_step=1, stack=1, frame_shape=(1,), seed=0) -> None:
        self.frame_shape, self.n_step, self.stack = frame_shape, n_step, stack
        self.random = np.random.default_rng(seed)
        self.frames = 0
        self.origins: dict[int, tuple[Episode, int]] = {}  # action -> episode, step in it
        self.times: dict[int, int] = {}  # action -> cycle
        self.cycle = 0
        self.restart(ranks, envs, slots)

    def restart(self, ranks: int, envs: int, slots: int) -> None:
        """New replays; all environments begin anew."""
        self.replays = [
            Replay(
                slots,
                envs,
                self.frame_shape,
                np.float32,
                np.random.default_rng(rank),
                frame_stack=self.stack,
                n_step=self.n_step,
                gamma=GAMMA,
            )
            for rank in range(ranks)
        ]
        self.episodes = [[Episode(self.frame()) for _ in range(envs)] for _ in range(ranks)]

    def frame(self) -> np.ndarray:
        self.frames += 1
        return np.full(self.frame_shape, self.frames, np.float32)

    def play(self, ends: str | list[str] = "", *, cycles: int = 0, end_rate: float = 0.0, valid_rate: float = 1.0):
        """One cycle per letter (T terminates, X truncates, B both); `ends` is for all streams, or has one string for
        each; or `cycles` at random."""
        streams = len(self.replays) * len(self.episodes[0])
        letters = [ends] * streams if isinstance(ends, str) else ends
        for c in range(cycles or len(letters[0])):
            random = self.random.choice(list(".TXB"), streams, p=[1 - end_rate, *[end_rate / 3] * 3])
            now = random if cycles else [letter[c] for letter in letters]
            valid = self.random.random(streams) < valid_rate
            for rank, (replay, episodes) in enumerate(zip(self.replays, self.episodes, strict=True)):
                first = rank * len(episodes)
                self._cycle(replay, episodes, now[first : first + len(episodes)], valid[first : first + len(episodes)])
            self.cycle += 1

    def _cycle(self, replay: Replay, episodes: list[Episode], letters: list[str], valid: np.ndarray) -> None:
        before = np.stack([episode.frames[-1] for episode in episodes])
        actions = len(self.origins) + np.arange(len(episodes))
        rewards = self.random.integers(-8, 8, len(episodes)).astype(np.float32)  # exact in any order of summation
        terminated = np.array([letter in "TB" for letter in letters])
        truncated = np.array([letter in "XB" for letter in letters])
        after = np.stack([self.frame() for _ in episodes])
        replay.add(Transition(before, actions, rewards, terminated, truncated, after, valid))
        for e, episode in enumerate(list(episodes)):
            self.origins[int(actions[e])] = episode, len(episode.rewards)
            self.times[int(actions[e])] = self.cycle
            if valid[e]:
                episode.frames.append(after[e])
                episode.rewards.append(float(rewards[e]))
                episode.terminated = bool(terminated[e])
                episode.ended = bool(terminated[e] or truncated[e])
            elif truncated[e] and episode.rewards:
                episode.ended = True  # it was cut off between two steps
            if episode.ended:
                episodes[e] = Episode(self.frame())

    def shards(self) -> list[dict]:
        return [copy.deepcopy(replay.state()) for replay in self.replays]

    def redeal(self, ranks: int, envs: int, slots: int, limit: int | None = None) -> Deal:
        shards = self.shards()
        dealt = deal(shards, ranks * envs, slots, self.stack, limit)
        self.restart(ranks, envs, dealt.slots)
        for rank, replay in enumerate(self.replays):
            rings = range(rank * envs, (rank + 1) * envs)
            replay.load_state(gather_state(dealt, rings, shards, replay.state()["rng"]))
        return dealt

    def rows(self) -> dict[int, Row]:
        """Every start of every rank, once, by its action."""
        rows: dict[int, Row] = {}
        for replay in self.replays:
            rows |= rows_of(replay, rows)
        return rows

    def stored(self) -> set[int]:
        """The transitions whose stacks are complete, also those whose windows are not yet: the starts if n were 1."""
        actions: list[int] = []
        for replay in self.replays:
            replay._n_step = 1
            actions += replay._actions.reshape(-1)[replay._starts()].tolist()
            replay._n_step = self.n_step
        assert len(actions) == len(set(actions))
        return set(actions)

    def stacked(self, episode: Episode, t: int) -> list:
        frames = [episode.frames[max(t - i, 0)] for i in reversed(range(self.stack))]
        return np.concatenate(frames, axis=-1).tolist()

    def check(self, rows: dict[int, Row]) -> set[tuple[int, int]]:
        """Asserts that all rows tell the truth, and returns where windows end that are shorter than they could be."""
        early = set()
        for action, (observation, reward, discount, next_observation) in rows.items():
            episode, t = self.origins[action]
            number = np.ravel(next_observation)[-1]  # of the newest frame in the stack
            until = next(i for i, frame in enumerate(episode.frames) if frame.flat[0] == number)
            steps = until - t
            assert 1 <= steps <= self.n_step
            assert observation == self.stacked(episode, t)
            assert next_observation == self.stacked(episode, until)
            assert reward == sum(GAMMA**i * r for i, r in enumerate(episode.rewards[t:until]))
            terminal = until == len(episode.rewards) and episode.terminated
            assert discount == (0 if terminal else GAMMA**steps)
            if steps < self.n_step and until < len(episode.rewards):
                early.add((id(episode), until))
        return early


def rows_of(replay: Replay, others: dict[int, Row] | None = None) -> dict[int, Row]:
    starts = replay._starts()
    if len(starts) == 0:
        return {}
    replay._draw = lambda size: (starts, starts)  # type: ignore[method-assign]
    batch = replay.gather(replay.draw(1, len(starts)))
    del replay._draw  # type: ignore[method-assign]
    actions = batch.action[0].tolist()
    assert len(set(actions)) == len(actions)
    assert not set(actions) & set(others or ())
    fields = (batch.observation[0], batch.reward[0], batch.discount[0], batch.next_observation[0])
    return dict(zip(actions, zip(*(field.tolist() for field in fields), strict=True), strict=True))


def laid(ranks: Ranks) -> list[list[list[int]]]:
    """Of every ring, by its pieces: the numbers of the frames in the slots, those of context and last ones negative."""
    rings = []
    for replay in ranks.replays:
        for e, head in enumerate(replay._write_positions.tolist()):
            pieces: list[list[int]] = []
            for slot in range(head):
                if replay._episode_steps[e, slot] == 0:
                    pieces.append([])
                number = int(replay._frames[e, slot].flat[0])
                pieces[-1].append(number if replay._step_types[e, slot] != NOTHING else -number)
            rings.append(pieces)
    return rings


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_episodes_stay_whole_and_go_to_the_emptiest_ring():
    ranks = Ranks(ranks=1, envs=1, slots=80)
    ranks.play("....T..T.TT" * 4)
    episodes = laid(ranks)[0]
    assert [len(episode) for episode in episodes] == [6, 4, 3, 2] * 4  # an observation more than steps
    dealt = ranks.redeal(ranks=2, envs=1, slots=10)
    #                 filled: 6                 8  12  15            21      23      27  30
    first = [episodes[i] for i in (0, 3, 5, 6, 8, 11, 13, 14)]
    #                 filled:  4  7  13     15     19  22  28          30
    second = [episodes[i] for i in (1, 2, 4, 7, 9, 10, 12, 15)]
    assert laid(ranks) == [first, second]
    assert dealt.write_positions.tolist() == [30, 30]
    assert dealt.slots == 31
    assert dealt.cuts == 0


def test_a_ring_holds_its_pieces_in_the_order_of_the_age_of_their_middles():
    # Sorted by their beginnings, the first half of the long episode would come, and be overwritten, before the second and
    # third of the short ones, which are older than most of it.
    ranks = Ranks(ranks=2, envs=1, slots=40)
    ranks.play(["." * 30, "....XXX" + "." * 23])
    ranks.redeal(ranks=1, envs=1, slots=80)
    (pieces,) = laid(ranks)
    assert [len(piece) for piece in pieces] == [6, 2, 2, 16, 12, 16, 13]
    clock = [np.mean(np.abs(piece)) for piece in pieces]  # frames are numbered in the order of time
    assert clock == sorted(clock)


def test_a_stream_keeps_its_order_when_nothing_is_to_be_done():
    # One ring to one ring is the identity, but for the end of the episode under way.
    ranks = Ranks(ranks=1, envs=1, slots=12, n_step=2, stack=2)
    ranks.play("..T.X...")
    before, whole = ranks.rows(), laid(ranks)
    ranks.redeal(ranks=1, envs=1, slots=12)
    assert laid(ranks)[0][:2] == whole[0][:2]
    after = ranks.rows()
    assert {action: after[action] for action in before} == before
    assert set(after) - set(before) == {7}  # the newest, whose window of two was incomplete


def test_the_episode_under_way_ends_as_truncated_at_its_newest_observation():
    # The environments begin anew: without the end, newest -> first would be learned as a step of the game.
    ranks = Ranks(ranks=1, envs=1, slots=12, n_step=3)
    ranks.play("...")
    assert set(ranks.rows()) == {0}
    ranks.redeal(ranks=1, envs=1, slots=12)
    ranks.play("...")
    rows = ranks.rows()
    assert set(rows) == {0, 1, 2, 3}
    #                    discount  next: frame 4 was the newest
    assert rows[0][2:] == (0.125, [4.0])
    assert rows[1][2:] == (0.250, [4.0])
    assert rows[2][2:] == (0.500, [4.0])


def test_a_long_episode_is_cut_with_its_last_observation_twice_and_context_for_the_stacks():
    ranks = Ranks(ranks=1, envs=1, slots=100, n_step=2, stack=3)
    ranks.play("." * 29 + "T")
    before = ranks.rows()
    dealt = ranks.redeal(ranks=1, envs=2, slots=10)
    # 31 slots for two rings; parts of at most 12 slots (4 stacks), of which 3 may be context and last observation.
    assert dealt.cuts == 3
    assert laid(ranks) == [
        [[1, 2, 3, 4, 5, 6, 7, -8], [-14, -15, *range(16, 23), -23]],
        [[-6, -7, *range(8, 16), -16], [-21, -22, *range(23, 31), -31]],
    ]
    assert ranks.replays[0]._episode_steps[0, :18].tolist() == [*range(8), *range(10)]
    after = ranks.rows()
    assert set(after) == set(before)
    shorter = {action for action in before if after[action] != before[action]}
    assert shorter == {6, 14, 21}  # the last before each cut; all others kept their windows of two
    for action in shorter:
        assert after[action][0] == before[action][0]
        assert after[action][2] == GAMMA  # not terminal: a cut bootstraps


def test_a_transition_that_lost_frames_of_its_stack_becomes_context():
    # The first ring's 6 slots hold an episode's observations 3 to 8, of which 3 and 4 miss frames of their stacks. Laid
    # behind another piece they would be shown with that one's frames.
    ranks = Ranks(ranks=2, envs=1, slots=6, stack=3)
    ranks.play(["........", "XXXXXXXX"])
    before = ranks.rows()
    assert len(before) == 3 + 2
    dealt = ranks.redeal(ranks=1, envs=1, slots=20)
    signs = [[number > 0 for number in piece] for piece in laid(ranks)[0]]
    assert signs == [[True, False], [False, False, True, True, True, False], [True, False]]
    assert ranks.rows() == before
    assert dealt.transitions == 5


def test_stacks_stay_in_their_piece_also_when_the_next_run_wants_more_frames():
    # A cut leaves as many frames of context as the stack had. If episode steps continued across it, a deeper stack
    # would read further back, into the last frames of the piece before.
    ranks = Ranks(ranks=1, envs=1, slots=100, stack=2)
    ranks.play("." * 60)
    dealt = ranks.redeal(ranks=1, envs=3, slots=20)
    assert dealt.cuts > 3
    deeper = Replay(dealt.slots, 3, (1,), np.float32, np.random.default_rng(0), frame_stack=4)
    deeper.load_state(ranks.replays[0].state())
    for observation, *_ in rows_of(deeper).values():
        assert set(np.diff(observation)) <= {0.0, 1.0}  # frames are numbered as they were seen


def test_each_ring_gets_old_transitions_and_new_ones():
    # Endless episodes on 4 streams, dealt to 6 rings. Whole, they would leave two rings with only the last third of
    # the time, which would then be overwritten while other rings still hold the first.
    ranks = Ranks(ranks=2, envs=2, slots=601)
    ranks.play(cycles=600)
    ranks.redeal(ranks=3, envs=2, slots=401)
    for replay in ranks.replays:
        for actions, step_types in zip(replay._actions, replay._step_types, strict=True):
            times = [ranks.times[action] for action in actions[step_types != NOTHING].tolist()]
            assert min(times) < 100
            assert max(times) >= 500
            assert 250 < np.mean(times) < 350


def test_rings_fill_evenly_with_few_cuts():
    # Episodes of 200 steps in rings of 2,000: whole ones would leave differences of 10 %.
    ranks = Ranks(ranks=2, envs=4, slots=2000)
    ranks.play(("." * 199 + "T") * 10)
    dealt = ranks.redeal(ranks=3, envs=4, slots=1340)
    share = dealt.write_positions.mean()
    assert dealt.write_positions.max() <= share + 2
    assert dealt.write_positions.min() >= share - 2 * 12
    assert 1 <= dealt.cuts <= 12  # at most one per ring
    assert dealt.counts.sum() == dealt.transitions == len(ranks.rows())


def test_an_episode_shorter_than_a_hundredth_of_a_ring_is_not_cut_to_even_out_so_little():
    ranks = Ranks(ranks=1, envs=1, slots=2000)
    ranks.play("......T" * 201)
    dealt = ranks.redeal(ranks=2, envs=1, slots=900)
    assert dealt.write_positions.tolist() == [101 * 8, 100 * 8]
    assert dealt.cuts == 0


def test_what_has_no_room_is_the_oldest():
    ranks = Ranks(ranks=2, envs=2, slots=301, n_step=2, stack=2)
    ranks.play(cycles=300)
    stored = ranks.stored()
    dealt = ranks.redeal(ranks=3, envs=1, slots=101, limit=101)
    kept = ranks.stored()
    assert dealt.slots == 101
    assert kept < stored
    assert dealt.dropped == len(stored) - len(kept)
    assert dealt.counts.sum() == len(kept) >= 250  # 300 slots, of which the cuts take some
    assert min(len(rows_of(replay)) for replay in ranks.replays) >= 80
    # Room for 300 of 1,200 leaves the newest quarter, give or take a quarter of a ring.
    assert {action for action in stored if ranks.times[action] >= 250} <= kept
    assert min(ranks.times[action] for action in kept) >= 200
    ranks.check(ranks.rows())


def test_a_limit_that_suffices_changes_nothing():
    ranks = Ranks(ranks=2, envs=1, slots=101)
    ranks.play(cycles=90, end_rate=0.1)
    shards = ranks.shards()
    free, limited = (deal(shards, 3, 80, 1, limit) for limit in (None, 80))
    assert free.dropped == 0
    assert all(np.array_equal(a, b) for a, b in zip(free, limited, strict=True))


def test_nothing_stored_is_dealt_out_as_nothing():
    ranks = Ranks(ranks=2, envs=1, slots=20)
    dealt = ranks.redeal(ranks=3, envs=2, slots=10)
    assert (dealt.slots, dealt.transitions, dealt.cuts) == (10, 0, 0)
    ranks.play("...")
    assert len(ranks.check(ranks.rows()) | ranks.rows().keys()) == 18


def test_the_log_tells_how_many_went_where():
    ranks = Ranks(ranks=2, envs=1, slots=501)
    ranks.play(cycles=500)
    shards = ranks.shards()
    assert deal(shards, 3, 340, 1).describe(3) == (
        "1,000 transitions of 2 ranks redistributed to 3: 335, 330, 335; rings of 341 slots; episodes cut in 14 places"
    )
    assert "redistributed to 9: 106 to 113 each;" in deal(shards, 9, 120, 1).describe(9)
    assert deal(shards[:1], 2, 260, 1).describe(2).startswith("500 transitions of 1 rank redistributed to 2: 252, 248;")
    assert deal(shards, 3, 200, 1, limit=200).describe(1).endswith("; the oldest 419 dropped for lack of room")


# --- collecting ------------------------------------------------------------------------------------------------------


class Watched:
    """An array of which only some rows and columns may be looked at, and which remembers which."""

    def __init__(self, array: np.ndarray, log: list[tuple[str, int, int]], name: str) -> None:
        self.array, self.log, self.name = array, log, name
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, place: tuple[int, np.ndarray]) -> np.ndarray:
        row, columns = place
        self.log.append((self.name, row, len(columns)))
        return self.array[row, columns]


def watched(shards: list[dict], log: list[tuple[str, int, int]]) -> list[dict]:
    return [
        {
            name: Watched(value, log, f"{number} {name}") if isinstance(value, np.ndarray) else value
            for name, value in shard.items()
        }
        for number, shard in enumerate(shards)
    ]


def test_of_the_old_replays_only_the_slots_of_the_new_rings_are_read_a_few_at_a_time(monkeypatch):
    ranks = Ranks(ranks=3, envs=2, slots=50, stack=2, frame_shape=(2, 2, 1))
    ranks.play(cycles=120, end_rate=0.05)
    shards, log = ranks.shards(), []
    dealt = deal(shards, 4, 40, 2)
    whole = gather_state(dealt, range(2, 4), shards, {"state": 1})
    monkeypatch.setattr(resharding, "CHUNK", 7)  # big frames are copied a few at a time
    state = gather_state(dealt, range(2, 4), watched(shards, log), {"state": 1})
    for name, value in whole.items():
        assert np.array_equal(state[name], value), name
    mine = dealt.pieces[dealt.pieces["ring"] >= 2]
    slots = int((mine["context"] + mine["steps"] + 1).sum())
    read = Counter()
    for name, _, number in log:
        assert number <= 7
        read[name.split()[1]] += number
    assert read == dict.fromkeys(("frames", "actions", "rewards", "step_types"), slots)
    streams = {(int(name.split()[0]), row) for name, row, _ in log}
    assert streams == {(int(piece["shard"]), int(piece["env"])) for piece in mine}


def test_a_replay_can_be_filled_in_place():
    # A rank's share of a big replay must not be in memory twice.
    ranks = Ranks(ranks=2, envs=2, slots=50, stack=2, n_step=3)
    ranks.play(cycles=120, end_rate=0.05)
    shards = ranks.shards()
    dealt = deal(shards, 3, 80, 2)
    new = Replay(dealt.slots, 3, (1,), np.float32, np.random.default_rng(0), frame_stack=2, n_step=3)
    for name in ("frames", "actions", "rewards", "step_types", "episode_steps"):
        new.arrays()[name][:] = 3  # all of this must be gone
    rng = new.state()["rng"]
    state = gather_state(dealt, range(3), shards, rng, into=new.arrays())
    assert all(np.shares_memory(state[name], array) for name, array in new.arrays().items())
    new.load_state(state)
    fresh = Replay(dealt.slots, 3, (1,), np.float32, np.random.default_rng(0), frame_stack=2, n_step=3)
    fresh.load_state(gather_state(dealt, range(3), shards, rng))
    assert rows_of(new) == rows_of(fresh)
    assert len(new) == len(fresh) == dealt.transitions


def test_collecting_takes_little_more_memory_than_the_share_itself():
    # 8 rows of 2 MB, of which this rank gets a quarter.
    ranks = Ranks(ranks=2, envs=4, slots=2001, frame_shape=(16, 16, 1))
    ranks.play(cycles=2000, end_rate=0.01)
    shards = ranks.shards()
    dealt = deal(shards, 8, 2001, 1)
    tracemalloc.start()
    state = gather_state(dealt, range(2), watched(shards, []), {})
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert state["frames"].nbytes > 4e6
    assert peak < size + 2 * 2.1e6  # a row, and what is copied of it


# --- from disk -------------------------------------------------------------------------------------------------------


class Told(Exception):
    """What a rank gathers."""


class Rank(Solo):
    """One of several ranks, which have told what they gather, or do so now."""

    def __init__(self, rank: int, size: int, told: list | None = None) -> None:
        super().__init__(rank)
        self.size, self.told = size, told

    def gather(self, value):
        if self.told is None:
            raise Told(value)
        return self.told


def saved(path: Path, states: list[dict], compress: bool = False) -> Snapshot:
    """The checkpoint of ranks with these replays."""
    for rank, state in enumerate(states):
        rest, arrays = divide({"replay": state})
        (path / rank_file(rank)).write_text(json.dumps(rest))
        write_arrays(path / replay_file(rank, len(states)), arrays, compress)
    return Snapshot(path, 100, len(states), True, {}, {}, {})


def surveyed(snapshot: Snapshot, size: int, stack: int) -> tuple[Survey, list[int]]:
    """The survey of so many ranks, and the bytes that each read for it."""
    told, read = [], []
    for rank in range(size):
        began = bytes_read()
        with pytest.raises(Told) as asked:
            survey(snapshot, Rank(rank, size), stack)
        read.append(bytes_read() - began)
        told.append(pickle.loads(pickle.dumps(asked.value.args[0])))  # as it is sent
    return survey(snapshot, Rank(0, size, told), stack), read


def bytes_read() -> int:
    """Of all files, by this process."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("size", [8, 4, 16])
def test_a_rank_reads_from_disk_its_share_of_the_survey_and_its_own_rings(size, compress, tmp_path):
    ranks = Ranks(ranks=8, envs=2, slots=65, stack=2, n_step=2, frame_shape=(64, 64, 1))  # 16 KB a frame
    ranks.play(cycles=100, end_rate=0.04)
    states = ranks.shards()
    snapshot = saved(tmp_path, states, compress)
    whole = sum(path.stat().st_size for path in tmp_path.iterdir())
    found, read = surveyed(snapshot, size, 2)
    in_memory = find_episodes(states, 2)
    assert np.array_equal(found.episodes.pieces, in_memory.pieces)
    assert found.episodes.ranks == 8
    # 8 replays in turns: the 9th rank and those after it read none.
    assert [bytes_taken > 2_000 for bytes_taken in read] == [rank < 8 for rank in range(size)]
    dealt = resharding.deal(found.episodes, 16, 60, 2)
    read_for_rings = []
    for rank in range(size):
        rings = range(rank * 16 // size, (rank + 1) * 16 // size)
        expected = gather_state(dealt, rings, states, {})
        began = bytes_read()
        state = gather_state(dealt, rings, found.replays, {})
        read_for_rings.append(bytes_read() - began)
        for name, value in expected.items():
            assert np.array_equal(state[name], value), name
    if not compress:  # to read from a place in a compressed row, all before it is decompressed
        assert max(read) < 0.02 * whole
        assert sum(read_for_rings) < 1.3 * whole
        assert max(read_for_rings) < 1.6 * whole / size


def test_a_file_that_one_rank_cannot_read_is_told_on_all_ranks(tmp_path):
    ranks = Ranks(ranks=3, envs=1, slots=20)
    ranks.play(cycles=10)
    snapshot = saved(tmp_path, ranks.shards())
    (tmp_path / rank_file(1)).write_text("{")
    told = []
    for rank in range(2):
        with pytest.raises(Told) as asked:
            survey(snapshot, Rank(rank, 2), 1)
        told.append(asked.value.args[0])
    assert [complaint is None for _, complaint in told] == [True, False]
    for rank in range(2):
        with pytest.raises(InputError, match=r"cannot be taken over: the part of rank 1 cannot be read"):
            survey(snapshot, Rank(rank, 2, told), 1)


# --- all of it, at random --------------------------------------------------------------------------------------------

shapes = st.sampled_from([(1,), (2,), (2, 1, 1), (1, 2, 2)])


@settings(max_examples=100)
@given(
    n_step=st.integers(1, 5),
    stack=st.integers(1, 4),
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=4),
    spare_slots=st.integers(0, 30),
    cycles=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    end_rate=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    valid_rate=st.sampled_from([1.0, 0.9]),
    frame_shape=shapes,
    seed=st.integers(0, 2**32 - 1),
)
def test_everything_that_could_be_sampled_still_can_and_tells_the_truth(
    n_step, stack, sizes, spare_slots, cycles, end_rate, valid_rate, frame_shape, seed
):
    """From ranks to ranks to ranks, playing on in between."""
    slots = n_step + stack + 1 + spare_slots  # tiny rings, so that most cases wrap around
    ranks = Ranks(*sizes[0], slots, n_step, stack, frame_shape, seed)
    early: set[tuple[int, int]] = set()  # where windows end since they were cut
    for (n, envs), steps in zip(sizes[1:], cycles, strict=False):
        if steps:
            ranks.play(cycles=steps, end_rate=end_rate, valid_rate=valid_rate)
        before, stored = ranks.rows(), ranks.stored()
        assert ranks.check(before) <= early
        dealt = ranks.redeal(n, envs, slots)
        after = ranks.rows()

        # Nothing lost, nothing new: gained are only the windows that were incomplete.
        assert set(before) <= stored == set(after)
        assert dealt.transitions == dealt.counts.sum() == len(stored) == sum(len(replay) for replay in ranks.replays)
        assert dealt.dropped == 0
        if n_step == 1:
            assert after == before
        now_early = ranks.check(after)
        assert len(now_early - early) <= dealt.cuts
        for action in before:
            if after[action] != before[action]:
                assert after[action][0] == before[action][0]
                episode, _ = ranks.origins[action]
                newest = np.ravel(after[action][3])[-1]
                cut_at = next(i for i, frame in enumerate(episode.frames) if frame.flat[0] == newest)
                assert (id(episode), cut_at) in now_early
        early |= now_early

        # Even: by the announced bounds.
        sizes_ = dealt.pieces["context"] + dealt.pieces["steps"] + 1
        share = -(-int(dealt.write_positions.sum()) // (n * envs))
        assert dealt.write_positions.sum() == sizes_.sum()
        assert dealt.write_positions.max() <= share + 2 * stack + share // 100
        assert dealt.write_positions.max() - dealt.write_positions.min() <= max(sizes_, default=0)
        assert sizes_.max(initial=0) <= max(share // 4, 4 * stack)
        assert dealt.slots == max(slots, dealt.write_positions.max() + 1)
        # Each ring's pieces are in the order of their age, give or take what a cut at a full ring moves a middle.
        middle = dealt.pieces["age"] - dealt.pieces["steps"] / 2
        for ring in range(n * envs):
            assert np.all(np.diff(middle[dealt.pieces["ring"] == ring]) <= sizes_.max(initial=0) / 2)


@settings(max_examples=50)
@given(
    n_step=st.integers(1, 4),
    stack=st.integers(1, 4),
    old=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    new=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    cycles=st.integers(1, 80),
    end_rate=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_new_transitions_overwrite_the_oldest_first(n_step, stack, old, new, cycles, end_rate, seed):
    ranks = Ranks(*old, 2 * (n_step + stack + 2) + 10, n_step, stack, (1,), seed)
    ranks.play(cycles=cycles, end_rate=end_rate)
    dealt = ranks.redeal(*new, 2 * (n_step + stack + 2) + 10)  # the plan's smallest rings, and ten
    for replay in ranks.replays:
        replay.truncate_episodes()  # as after any restore; there is nothing to truncate
    assert [int(head) for replay in ranks.replays for head in replay._write_positions] == dealt.write_positions.tolist()
    orders = [
        [(slot, int(replay._actions[e, slot])) for slot in np.flatnonzero(replay._step_types[e] != NOTHING)]
        for replay in ranks.replays
        for e in range(new[1])
    ]
    for steps in [1, 2, 3] * (dealt.slots // 3):
        ranks.play(cycles=steps, end_rate=end_rate)
        rows = ranks.rows()
        ranks.check(rows)
        positions = [int(position) for replay in ranks.replays for position in replay._write_positions]
        for order, position in zip(orders, positions, strict=True):
            oldest = max(position - (dealt.slots - 1), 0)
            there = [slot for slot, action in order if action in rows]
            assert there == [slot for slot, _ in order][len(order) - len(there) :]
            assert all(slot >= oldest for slot in there)
            assert all(slot in there for slot, _ in order if slot >= oldest + (stack - 1 if oldest else 0))
        for replay in ranks.replays:
            if min(len(episode.rewards) for episode in ranks.episodes[0]) >= n_step:
                assert len(replay._starts())  # a rank that could not sample would leave the others waiting


@settings(max_examples=50)
@given(
    stack=st.integers(1, 4),
    old=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    new=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    cycles=st.integers(1, 80),
    end_rate=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_within_a_limit_each_ring_keeps_its_newest(stack, old, new, cycles, end_rate, seed):
    ranks = Ranks(*old, 60, 2, stack, (1,), seed)
    ranks.play(cycles=cycles, end_rate=end_rate)
    shards, stored, limit = ranks.shards(), ranks.stored(), 2 * (2 + stack + 2)
    dealt = ranks.redeal(*new, limit, limit)
    assert dealt.slots == limit
    kept = ranks.stored()
    ranks.check(ranks.rows())
    assert kept <= stored
    assert dealt.transitions == len(stored)
    assert dealt.dropped == len(stored) - len(kept)
    # Full rings: a few slots are left, too few for a piece.
    assume(dealt.dropped)
    unlimited = deal(shards, new[0] * new[1], limit, stack)
    assert unlimited.write_positions.max() >= limit
    assert dealt.write_positions.max() >= limit - 1 - stack


def test_masks_and_actions_of_several_dimensions_are_dealt_with_their_observations():
    def bits(numbers: np.ndarray) -> np.ndarray:
        return (numbers.reshape(-1, 1) >> np.arange(13)) % 2 == 1

    def new(slots: int, envs: int) -> Replay:
        rng = np.random.default_rng(envs)
        return Replay(slots, envs, (1,), np.float32, rng, gamma=GAMMA, n_step=2, action_shape=(2,), mask_width=13)

    shards, rng = [], np.random.default_rng(0)
    for rank in range(2):
        replay, number = new(40, 2), np.array([1, 2000]) + 4000 * rank
        for _ in range(70):
            ended = rng.random(2) < 0.1
            replay.add(
                Transition(
                    np.float32(number[:, None]), np.stack([number, -number], axis=1), np.float32(number), ended, ended & False,
                    np.float32(number[:, None] + 1), np.ones(2, bool), bits(number), bits(number + 1),
                )
            )  # fmt: skip
            number += 1 + ended
        shards.append(replay.state())
    for rings in (1, 3):
        dealt = deal(shards, rings, 40, 1)
        mine = new(dealt.slots, rings)
        mine.load_state(gather_state(dealt, range(rings), shards, mine.state()["rng"], into=mine.arrays()))
        batch = mine.gather(mine.draw(2, 300))
        np.testing.assert_array_equal(batch.action[..., 0], batch.observation[..., 0])
        np.testing.assert_array_equal(batch.action[..., 1], -batch.observation[..., 0])
        following = batch.next_observation.astype(int)
        np.testing.assert_array_equal(batch.next_mask.reshape(-1, 13), bits(following))
    unmasked = [{name: value for name, value in shard.items() if name != "masks"} for shard in shards]
    with pytest.raises(LookupError):
        gather_state(dealt, range(3), unmasked, mine.state()["rng"], into=mine.arrays())
