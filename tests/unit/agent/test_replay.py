"""The replay: which transitions may be sampled, and what a sampled one consists of."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dqn.agent import replay as replay_module
from hvd_dqn.agent.replay import Replay
from hvd_dqn.agent.transition import Batch, Transition
from hvd_dqn.errors import InputError

GAMMA = 0.5  # powers of it are exact, so that tables can be compared without tolerance


def new_replay(
    slots: int = 20, envs: int = 1, frame_shape: tuple[int, ...] = (1,), seed: int = 0, **settings
) -> Replay:
    return Replay(slots, envs, frame_shape, np.float32, np.random.default_rng(seed), **{"gamma": GAMMA, **settings})


def play(replay: Replay, episodes: str, first: int = 0) -> None:
    """Plays one environment: `..T` is an episode of three steps that terminates, `X` truncates, `B` does both.

    The observations are `first`, `first` + 1, ... (an episode's last one counts); action and reward are the observation
    that they answer.
    """
    observation = first
    for step in episodes:
        ends = step != "."
        replay.add(
            Transition(
                np.array([[observation]], np.float32),
                np.array([observation]),
                np.array([observation], np.float32),
                np.array([step in "TB"]),
                np.array([step in "XB"]),
                np.array([[observation + 1]], np.float32),
                np.array([True]),
            )
        )
        observation += 1 + ends


def sample(replay: Replay, updates: int, batch_size: int) -> Batch:
    return replay.gather(replay.draw(updates, batch_size))


def rows_of(batch: Batch) -> dict[int, tuple]:
    """By action: observation, reward, discount, next observation."""
    assert batch.weight is None
    flat = [field.reshape(-1, *field.shape[2:]) for field in batch[:5]]
    return {
        int(action): (observation.tolist(), float(reward), float(discount), next_observation.tolist())
        for observation, action, reward, discount, next_observation in zip(*flat, strict=True)
    }


def everything(replay: Replay) -> dict[int, tuple]:
    """All rows that can be sampled. Of at most 20 starts one is missed with a chance below 20 * (19/20)^999 = 1e-21."""
    return rows_of(sample(replay, 3, 333))


# --- the pieces, by hand ---------------------------------------------------------------------------------------------


def test_a_transition_comes_out_as_it_went_in():
    replay = new_replay()
    play(replay, "...")
    #                                    observation  reward  discount  next observation
    assert everything(replay) == {0: ([0.0], 0.0, 0.5, [1.0]), 1: ([1.0], 1.0, 0.5, [2.0]), 2: ([2.0], 2.0, 0.5, [3.0])}


def test_batches_have_the_promised_shapes_types_and_memory_of_their_own():
    # The learner hands the arrays to TensorFlow, which wants them contiguous; a view of the ring would change under it.
    for frame_shape, stack, observation_shape in [
        ((4,), 1, (4,)),
        ((4,), 3, (12,)),
        ((5, 6, 1), 1, (5, 6, 1)),
        ((5, 6, 2), 4, (5, 6, 8)),
    ]:
        replay = Replay(20, 2, frame_shape, np.uint8, np.random.default_rng(0), frame_stack=stack)
        frames = np.zeros((2, *frame_shape), np.uint8)
        one, no = np.ones(2), np.zeros(2, bool)
        for _ in range(9):
            replay.add(Transition(frames, one.astype(int), one, no, no, frames, ~no))
        batch = sample(replay, 3, 7)
        assert batch.observation.shape == batch.next_observation.shape == (3, 7, *observation_shape)
        assert batch.action.shape == batch.reward.shape == batch.discount.shape == (3, 7)
        assert [field.dtype for field in batch[:5]] == [np.uint8, np.int64, np.float32, np.float32, np.uint8]
        for field in batch[:5]:
            assert field.flags.c_contiguous
            assert not any(np.shares_memory(field, array) for array in replay.arrays().values())


def test_an_n_step_return_stops_at_a_termination_and_at_a_truncation():
    # Law: termination is not truncation. The window ends at both, but only a truncation bootstraps, and from the true
    # last observation (3), never from the first of the next episode (4). Terminated and truncated at once is terminal.
    for end, bootstraps in [("T", 0), ("X", 1), ("B", 0)]:
        replay = new_replay(n_step=3)
        play(replay, f"..{end}...", first=0)
        rows = everything(replay)
        #                  reward                discount           next
        assert rows[0] == ([0.0], 0 + 0.5 + 0.5, 0.125 * bootstraps, [3.0])
        assert rows[1] == ([1.0], 1 + 0.5 * 2.0, 0.250 * bootstraps, [3.0])
        assert rows[2] == ([2.0], 2.0, 0.500 * bootstraps, [3.0])
        assert rows[4] == ([4.0], 4 + 2.5 + 1.5, 0.125, [7.0])


def test_a_start_waits_until_its_window_is_complete():
    # At the write head a shorter window would need no lie (its discount could be gamma**m), but then the newest
    # transitions would be learned from with other targets than the rest.
    for episodes, n_step, starts in [
        (".", 1, {0}),  # the newest transition bootstraps from the head
        ("...", 1, {0, 1, 2}),
        ("..", 3, set()),
        ("...", 3, {0}),  # its third reward is the newest, its bootstrap the head
        ("....", 3, {0, 1}),
        (".T", 3, {0, 1}),  # complete by the episode's end
        (".X", 3, {0, 1}),
        (".X.", 3, {0, 1}),
        (".X..", 3, {0, 1}),
        (".X...", 3, {0, 1, 3}),
    ]:
        replay = new_replay(n_step=n_step)
        play(replay, episodes)
        assert set(replay._starts()) == starts, (episodes, n_step)
        if starts:
            assert set(everything(replay)) == starts, (episodes, n_step)


def test_a_stack_repeats_the_first_frame_of_its_episode():
    # Frames of the episode before would show the network a movement that never happened.
    replay = new_replay(frame_stack=3)
    play(replay, "..T...")
    rows = everything(replay)
    #        action  observation  next observation
    for action, stack, next_stack in [
        (0, [0, 0, 0], [0, 0, 1]),
        (1, [0, 0, 1], [0, 1, 2]),
        (2, [0, 1, 2], [1, 2, 3]),  # 3 is the episode's last observation
        (4, [4, 4, 4], [4, 4, 5]),
        (5, [4, 4, 5], [4, 5, 6]),
        (6, [4, 5, 6], [5, 6, 7]),
    ]:
        assert (rows[action][0], rows[action][3]) == (stack, next_stack)
    assert set(rows) == {0, 1, 2, 4, 5, 6}


def test_a_stack_joins_images_on_their_last_axis_oldest_first():
    # Channels of one frame stay together: [frame 0's C channels, frame 1's C channels, ...].
    replay = Replay(20, 1, (2, 2, 2), np.float32, np.random.default_rng(0), frame_stack=2)
    frames = np.arange(24, dtype=np.float32).reshape(3, 1, 2, 2, 2)
    no = np.array([False])
    for t in range(2):
        replay.add(Transition(frames[t], np.array([t]), np.zeros(1), no, no, frames[t + 1], ~no))
    batch = sample(replay, 1, 100)
    row = int(np.argmax(batch.action[0]))
    assert np.array_equal(batch.observation[0, row], np.concatenate([frames[0, 0], frames[1, 0]], axis=-1))
    assert np.array_equal(batch.next_observation[0, row], np.concatenate([frames[1, 0], frames[2, 0]], axis=-1))


def test_a_ring_forgets_its_oldest_and_never_mixes_laps():
    # 6 slots hold 5 transitions and the head. Lap after lap the sample must consist of the newest only, also where a
    # window or a successor crosses the end of the array.
    for steps in range(6, 30):
        replay = new_replay(slots=6)
        play(replay, "." * steps)
        assert everything(replay) == {t: ([t], t, 0.5, [t + 1]) for t in range(steps - 5, steps)}
        assert len(replay) == 5


def test_last_observations_take_slots_but_are_never_sampled():
    # Episodes of one step are the worst case: every second slot is no start, and draws are rejected half of the time.
    replay = new_replay(slots=6)
    play(replay, "T" * 10)  # observations 0 to 19; slots are left for 15 (last), 16, 17 (last), 18, 19 (last)
    assert everything(replay) == {16: ([16], 16, 0, [17]), 18: ([18], 18, 0, [19])}
    assert len(replay) == 2


def test_a_start_whose_stack_has_lost_a_frame_is_not_sampled():
    # The head has overwritten the frames before the ring's oldest: what stands there now is the newest of all.
    for episodes, stack, starts in [
        ("." * 12, 1, {7, 8, 9, 10, 11}),
        ("." * 12, 2, {8, 9, 10, 11}),
        ("." * 12, 3, {9, 10, 11}),
        ("." * 6 + "T" + "." * 4, 3, {8, 9, 10, 11}),  # 7 is the oldest and a last observation; 8 starts an episode
        ("." * 7 + "T" + "." * 3, 3, {9, 10, 11}),  # 7 is the oldest and has lost 5 and 6
        ("." * 5, 4, {0, 1, 2, 3, 4}),  # nothing lost yet: 0 starts an episode
        ("." * 6, 3, {3, 4, 5}),
    ]:
        replay = new_replay(slots=6, frame_stack=stack)
        play(replay, episodes)
        rows = everything(replay)
        assert set(rows) == starts, (episodes, stack)
        for action, (observation, *_) in rows.items():
            assert observation[-1] == action
            assert observation == sorted(observation)  # a frame of a later lap would be greater


def test_a_row_that_is_not_valid_leaves_its_stream_alone():
    # Vector classes that reset one step late report that step as one; its action was never taken.
    replay = new_replay(envs=2)
    yes, no = np.array([True, True]), np.array([False, False])
    for t, (ends, valid) in enumerate([((0, 1), (1, 1)), ((0, 0), (1, 0)), ((0, 0), (1, 1))]):
        observation = np.array([[t], [10 + t]], np.float32)
        replay.add(
            Transition(
                observation, np.array([t, 10 + t]), np.ones(2), np.array(ends) > 0, no, observation + 1, yes & valid
            )
        )
    rows = everything(replay)
    assert set(rows) == {0, 1, 2, 10, 12}
    assert rows[10] == ([10], 1, 0, [11])
    assert rows[12] == ([12], 1, 0.5, [13])
    assert len(replay) == 5


def test_episodes_cut_from_outside_end_as_truncated():
    # After a restore the environments begin anew: without the cut, 2 -> 100 would be learned as a step of the game.
    replay = new_replay(n_step=2)
    play(replay, "...")
    replay.truncate_episodes()
    replay.truncate_episodes()  # no episode is under way any more: nothing to do
    play(replay, "..", first=100)
    assert everything(replay) == {
        0: ([0], 0.5, 0.25, [2]),
        1: ([1], 2.0, 0.25, [3]),
        2: ([2], 2.0, 0.50, [3]),
        100: ([100], 150.5, 0.25, [102]),
    }


def test_every_start_of_every_environment_is_equally_likely():
    # Environments drawn first and slots second would favour the transitions of an environment that has few.
    replay = new_replay(slots=12, envs=3, n_step=2, frame_stack=3)
    random = np.random.default_rng(5)
    yes, no = np.ones(3, bool), np.zeros(3, bool)
    for t in range(40):
        valid = np.array([True, t % 2 == 0, t > 35])  # different counts in all three
        frames = np.zeros((3, 1), np.float32)
        ends = random.random(3) < 0.3
        replay.add(Transition(frames, 3 * t + np.arange(3), np.zeros(3), ends, no, frames, yes & valid))
    starts = len(replay._starts())
    assert starts > 10
    draws = 200 * starts
    _, counts = np.unique(sample(replay, 1, draws).action, return_counts=True)
    assert len(counts) == starts
    chi_square = float(np.sum((counts - 200) ** 2 / 200))
    # Mean starts - 1, deviation sqrt(2 * (starts - 1)); five deviations leave no room for a factor of two anywhere.
    assert chi_square < starts - 1 + 5 * math.sqrt(2 * (starts - 1))


def test_draws_left_over_by_rejection_come_from_the_list_of_all_starts(monkeypatch):
    # In practice this happens once in many runs, so it must be forced; the result must look the same.
    replay = new_replay(slots=8, n_step=2, frame_stack=2)
    play(replay, "...T..X....")
    drawn = everything(replay)
    monkeypatch.setattr(replay_module, "ROUNDS", 0)
    assert everything(replay) == drawn


def test_sampling_without_any_start_is_an_error():
    for episodes in ["", ".."]:
        replay = new_replay(n_step=3)
        play(replay, episodes)
        with pytest.raises(ValueError, match="no transition that can be sampled"):
            sample(replay, 1, 1)


def test_the_smallest_ring_always_has_a_start_and_smaller_ones_are_refused():
    # A rank that cannot sample when the plan says so would leave the others waiting in a collective.
    random = np.random.default_rng(2)
    for n_step, stack in [(1, 1), (3, 1), (1, 4), (4, 3)]:
        with pytest.raises(ValueError, match=f"at least n_step \\+ frame_stack \\+ 1 = {n_step + stack + 1} slots"):
            new_replay(slots=n_step + stack, n_step=n_step, frame_stack=stack)
        replay = new_replay(slots=n_step + stack + 1, n_step=n_step, frame_stack=stack)
        play(replay, "." * n_step)
        for step in random.choice(list("..TX"), 300):
            play(replay, step)
            assert len(replay._starts())


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_million_atari_transitions_take_7_gigabytes_and_not_56():
    assert Replay.memory_needed(31_250, 32, (84, 84, 1), np.uint8) / 1e9 == pytest.approx(7.07, abs=0.01)


def test_the_announced_memory_is_the_allocated():
    for shape, dtype in [((4,), np.float32), ((8, 8, 3), np.uint8), ((3,), np.float64)]:
        replay = Replay(50, 3, shape, dtype, np.random.default_rng(0))
        assert replay.nbytes == Replay.memory_needed(50, 3, shape, dtype)


# --- state -----------------------------------------------------------------------------------------------------------


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_one_seed_draws_the_same_batches_and_another_seed_others():
    samples = []
    for seed in (1, 1, 2):
        replay = new_replay(seed=seed)
        play(replay, "..T...X....")
        samples.append(sample(replay, 2, 50))
    assert same(samples[0], samples[1])
    assert not same(samples[0], samples[2])


@pytest.mark.parametrize("episodes", ["...", "..T", "..T....X...", "..T....X..." * 4, "..T....X..T" * 4])
def test_a_restored_replay_continues_exactly_as_the_saved_one(episodes):
    # A ring that is partly filled saves its used slots only; one that has wrapped saves all.
    old = new_replay(slots=20, n_step=2, frame_stack=2, seed=3)
    play(old, episodes)
    sample(old, 1, 5)  # the generator is somewhere in its stream
    state = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in old.state().items()}
    state["rng"] = json.loads(json.dumps(state["rng"]))
    assert not any(value.dtype.hasobject for value in state.values() if isinstance(value, np.ndarray))
    assert state["frames"].shape[1] == min(20, old._write_positions[0] + 1)

    new = new_replay(slots=20, n_step=2, frame_stack=2, seed=4)
    play(new, "." * 50, first=1000)  # all of this must be gone
    new.load_state(state)
    for name, value in old.state().items():
        assert np.array_equal(new.state()[name], value), name
    assert len(new) == len(old)
    assert same(sample(new, 2, 50), sample(old, 2, 50))
    for replay in (old, new):
        play(replay, "....X..", first=500)
    assert same(sample(new, 2, 50), sample(old, 2, 50))


def test_a_state_of_another_size_is_refused():
    # The write heads would point elsewhere in a ring of another length, silently.
    saved = new_replay(slots=20, envs=2)
    for other in [
        new_replay(slots=21, envs=2),
        new_replay(slots=20, envs=3),
        new_replay(slots=20, envs=2, frame_shape=(2,)),
        Replay(20, 2, (1,), np.uint8, np.random.default_rng(0)),
    ]:
        with pytest.raises(InputError, match=r"Expected: \d+ slots in \d environments"):
            other.load_state(saved.state())


# --- against a naive reference ---------------------------------------------------------------------------------------


class Reference:
    """One environment's whole history as a list of episodes; what a ring has lost is worked out from slot numbers."""

    def __init__(self, slots: int, n_step: int, stack: int) -> None:
        self.slots, self.n_step, self.stack = slots, n_step, stack
        self.episodes: list[dict] = []

    def add(self, frame, action, reward, terminated, truncated, next_frame) -> None:
        if not self.episodes or self.episodes[-1]["end"]:
            first = self.episodes[-1]["first"] + len(self.episodes[-1]["frames"]) if self.episodes else 0
            self.episodes.append({"first": first, "frames": [frame], "actions": [], "rewards": [], "end": ""})
        episode = self.episodes[-1]
        episode["actions"].append(action)
        episode["rewards"].append(reward)
        episode["frames"].append(next_frame)
        episode["end"] = "terminated" if terminated else "truncated" if truncated else ""

    def cut(self) -> None:
        if self.episodes:
            self.episodes[-1]["end"] = self.episodes[-1]["end"] or "truncated"

    def stacked(self, episode: dict, t: int) -> list:
        frames = [episode["frames"][max(t - i, 0)] for i in reversed(range(self.stack))]
        return np.concatenate(frames, axis=-1).tolist()

    def rows(self) -> dict[int, tuple]:
        if not self.episodes:
            return {}
        last = self.episodes[-1]
        # The head is the newest frame's slot, or the one after it where the episode has ended.
        head = last["first"] + len(last["frames"]) - (not last["end"])
        oldest = head - (self.slots - 1)
        rows = {}
        for episode in self.episodes:
            steps = len(episode["actions"])
            for t in range(steps):
                if episode["first"] + max(t - (self.stack - 1), 0) < max(oldest, 0):
                    continue
                if t + self.n_step > steps and not episode["end"]:
                    continue
                until = min(t + self.n_step, steps)
                reward = sum(GAMMA**i * r for i, r in enumerate(episode["rewards"][t:until]))
                terminal = until == steps and episode["end"] == "terminated"
                discount = 0.0 if terminal else GAMMA ** (until - t)
                rows[episode["actions"][t]] = (
                    self.stacked(episode, t),
                    reward,
                    discount,
                    self.stacked(episode, until),
                )
        return rows


@settings(max_examples=300)
@given(
    n_step=st.integers(1, 5),
    stack=st.integers(1, 4),
    spare_slots=st.integers(0, 12),
    envs=st.integers(1, 3),
    cycles=st.integers(0, 60),
    frame_shape=st.sampled_from([(1,), (2,), (2, 1, 1), (1, 2, 2)]),
    end_rate=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    late_reset=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_starts_and_their_rows_are_those_of_a_naive_reference(
    n_step, stack, spare_slots, envs, cycles, frame_shape, end_rate, late_reset, seed
):
    slots = n_step + stack + 1 + spare_slots  # tiny rings, so that most cases wrap around several times
    random = np.random.default_rng(seed)
    replay = new_replay(slots, envs, frame_shape, seed, n_step=n_step, frame_stack=stack)
    references = [Reference(slots, n_step, stack) for _ in range(envs)]
    frames = random.random((envs, *frame_shape), np.float32)
    resets = np.zeros(envs, bool)
    for cycle in range(cycles):
        action = cycle * envs + np.arange(envs)  # tells a row's origin
        reward = random.integers(-8, 8, envs).astype(np.float32)  # exact in any order of summation
        terminated, truncated = random.random((2, envs)) < end_rate / 2
        next_frames = random.random((envs, *frame_shape), np.float32)
        # Some environments spend the step after an episode on their reset; some steps are missing for no reason at all.
        valid = ~resets & (random.random(envs) < 0.95)
        replay.add(Transition(frames, action, reward, terminated, truncated, next_frames, valid))
        for e in np.flatnonzero(valid):
            references[e].add(
                frames[e], int(action[e]), float(reward[e]), bool(terminated[e]), bool(truncated[e]), next_frames[e]
            )
        cut = ~valid & truncated  # an environment that was made anew: its episode ends without a transition
        for e in np.flatnonzero(cut):
            references[e].cut()
        done = valid & (terminated | truncated) | cut
        resets = done & late_reset
        first_frames = random.random((envs, *frame_shape), np.float32)
        # A step that is missing leaves its observation as it was, for the next one to start from.
        moved = valid.reshape(-1, *[1] * len(frame_shape))
        ended = done.reshape(moved.shape)
        frames = np.where(ended, first_frames, np.where(moved, next_frames, frames))

    expected: dict[int, tuple] = {}
    for reference in references:
        expected |= reference.rows()
    starts = replay._actions.reshape(-1)[replay._starts()].tolist()
    assert sorted(starts) == sorted(expected)
    if expected:
        # At most 3 * 20 starts: one of them is missed with a chance below 60 * (59/60)^4000 = 4e-28.
        assert rows_of(sample(replay, 2, 2000)) == expected
    else:
        with pytest.raises(ValueError, match="no transition"):
            sample(replay, 1, 1)


def test_a_drawn_transition_is_held_until_a_younger_one_takes_its_slot():
    replay = new_replay(slots=8)
    play(replay, "....", first=0)  # slots 0 to 3, and the head in 4
    draw = replay.draw(2, 200)
    assert set(draw.action.ravel()) == {0, 1, 2, 3}
    assert replay.is_held(draw).all()
    for step in range(4, 12):
        play_on(replay, step)
        # The ring has 8 slots, one of them the head's: transition i is overwritten when step i + 7 is stored.
        np.testing.assert_array_equal(replay.is_held(draw), draw.action + 7 > step)
    assert not replay.is_held(draw).any()
    assert replay.is_held(replay.draw(1, 200)).all()


def play_on(replay: Replay, step: int) -> None:
    """One more step of an episode under way."""
    no, yes = np.array([False]), np.array([True])
    observation, following = np.array([[step]], np.float32), np.array([[step + 1]], np.float32)
    replay.add(Transition(observation, np.array([step]), np.float32([step]), no, no, following, yes))


def test_rewards_are_turned_into_learned_ones_step_by_step():
    replay = Replay(9, 1, (1,), np.float32, np.random.default_rng(0), n_step=3, gamma=0.5)
    nothing, frame = np.zeros(1, bool), np.zeros((1, 1), np.float32)
    for reward in (1.0, 10.0, -10.0, 2.0):
        replay.add(Transition(frame, np.zeros(1, int), np.float32([reward]), nothing, nothing, frame, np.ones(1, bool)))
    clipped = lambda reward: np.clip(reward.astype(np.float64), -2, 2)  # noqa: E731
    rewards = replay.draw(1, 200, clipped).reward
    assert set(rewards.ravel().tolist()) == {1 + 0.5 * 2 - 0.25 * 2, 2 - 0.5 * 2 + 0.25 * 2}


def test_actions_of_several_dimensions_and_masks_travel_with_their_observations():
    """The mask of each observation is its number in binary, and the action (number, number + 1)."""
    replay = new_replay(16, envs=2, action_shape=(2,), mask_width=11, n_step=2)
    bits = lambda numbers: (numbers[:, None] >> np.arange(11)) % 2 == 1  # noqa: E731
    number, rng = np.array([1, 1001]), np.random.default_rng(0)
    for _ in range(60):
        ended, valid = rng.random(2) < 0.2, rng.random(2) < 0.9
        replay.add(
            Transition(
                np.float32(number[:, None]),
                np.stack([number, number + 1], axis=1),
                np.float32(number),
                np.zeros(2, bool),
                ended & valid,
                np.float32(number[:, None] + 1),
                valid,
                bits(number),
                bits(number + 1),
            )
        )
        number += np.where(valid, 1 + ended, 0)
    restored = new_replay(16, envs=2, action_shape=(2,), mask_width=11, n_step=2, seed=1)
    restored.load_state(json_free(replay.state()))
    for each in (replay, restored):
        batch = sample(each, 4, 100)
        assert batch.action.shape == (4, 100, 2)
        np.testing.assert_array_equal(batch.action[..., 0], batch.observation[..., 0])
        np.testing.assert_array_equal(batch.action[..., 1], batch.observation[..., 0] + 1)
        assert batch.next_mask.dtype == np.bool_
        following = batch.next_observation[..., 0].astype(int).ravel()
        np.testing.assert_array_equal(batch.next_mask.reshape(-1, 11), bits(following))
    assert replay.nbytes == Replay.memory_needed(16, 2, (1,), np.float32, (2,), 11)


def json_free(state):
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in state.items()}


@pytest.mark.parametrize(
    ("saved", "mine"),
    [
        ({}, {"mask_width": 4}),
        ({"mask_width": 4}, {}),
        ({"mask_width": 4}, {"mask_width": 9}),
        ({}, {"action_shape": (2,)}),
    ],
)
def test_a_replay_of_other_actions_or_masks_is_refused(saved, mine):
    with pytest.raises(InputError, match="another size") as refused:
        new_replay(**mine).load_state(new_replay(**saved).state())
    assert len(str(refused.value).splitlines()) == 1
