"""A rank's memory of past transitions: one ring of single observations per environment, sampled uniformly."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hvd_dqn.agent.transition import Batch, Transition
from hvd_dqn.errors import InputError

# Step types, one per slot: no transition starts here (slot not yet written, last observation of an episode, write
# head), or one does, after which the episode continues, was terminated, or was truncated.
NOTHING, GOES_ON, TERMINATED, TRUNCATED = np.arange(4, dtype=np.uint8)

# Rounds of rejection sampling. The plan's smallest rings, full of episodes of one step, still accept a quarter of the
# draws. The (3/4)^64 = 1e-8 that are missing after these rounds are drawn from the list of all starts. That is exact
# too, but its time grows with the ring.
ROUNDS = 64


def as_stored(reward: np.ndarray) -> np.ndarray:
    return reward.astype(np.float64)


class Draw(NamedTuple):
    """K x B sampled transitions, [K, B] each, without their observations.

    `start` and `end` are the slots of the first observation and of the one after the last step, as indices into the
    flattened rings. `generation` distinguishes the transitions that a slot holds over time. `weight` is None if all
    were equally likely, as they are here.
    """

    start: np.ndarray  # int64
    end: np.ndarray  # int64
    action: np.ndarray  # int64, [K, B, D] in D dimensions
    reward: np.ndarray  # float32, summed over the steps
    discount: np.ndarray  # float32
    generation: np.ndarray  # int64
    weight: np.ndarray | None = None  # float32

    def part(self, begin: int, end: int) -> "Draw":
        """Those of the updates from `begin` on and before `end`."""
        return Draw(**{name: field[begin:end] for name, field in self._asdict().items() if field is not None})


class Replay:
    """Rings of `slots` observations, one for each of `envs` environments, with the transitions between them.

    A slot holds an observation and the action, reward and step type of the transition that starts there. An action is an
    array of `action_shape`. If `mask_width` is not 0, a slot also holds the mask of the actions that its observation
    allows, of this many numbers and in as many bits. The write head
    is the slot of the newest observation, where no transition starts yet. An episode's last observation takes a slot of
    its own, where none ever starts. So a transition costs one observation, and an episode one more.

    A sampled observation is the last `frame_stack` ones concatenated on the last axis, oldest first: [k * D] from [D],
    [H, W, k * C] from [H, W, C]. At an episode's start its first frame is repeated, as Gymnasium's
    FrameStackObservation does with padding_type="reset".

    A *start* is a stored transition that may be sampled:
      - the frames that its stack needs are all still in the ring, and
      - its window is complete: the n transitions from it on are stored, or fewer up to its episode's end.
    The reward is summed over the window. The discount is 0 after a termination (even if the same step was truncated)
    and gamma**m after m steps elsewhere: truncation bootstraps from the true last observation.

    `rng` is PCG64, NumPy's default.
    """

    def __init__(
        self,
        slots: int,
        envs: int,
        frame_shape: tuple[int, ...],
        frame_dtype: np.dtype | type,
        rng: np.random.Generator,
        *,
        frame_stack: int = 1,
        n_step: int = 1,
        gamma: float = 0.99,
        action_shape: tuple[int, ...] = (),
        mask_width: int = 0,
    ) -> None:
        # A full ring has slots - 1 besides the head. The newest n - 1 of them may lack a window, and the oldest k - 1 a
        # stack. Of two neighbours among the others one is a start, because last observations are never neighbours.
        if slots < n_step + frame_stack + 1:
            raise ValueError(
                f"A ring needs at least n_step + frame_stack + 1 = {n_step + frame_stack + 1} slots. Received: {slots}."
            )
        self._slots, self._envs = slots, envs
        self._rng = rng
        self._frame_stack, self._n_step, self._gamma = frame_stack, n_step, gamma
        self._frames = np.zeros((envs, slots, *frame_shape), frame_dtype)
        self._actions = np.zeros((envs, slots, *action_shape), np.int64)
        self._rewards = np.zeros((envs, slots), np.float32)
        self._step_types = np.full((envs, slots), NOTHING)
        self._episode_steps = np.zeros((envs, slots), np.int32)  # steps since the episode's first observation
        self._mask_width = mask_width
        self._masks = np.zeros((envs, slots, _bytes(mask_width)), np.uint8) if mask_width else None
        # Slots passed since the start. Modulo `slots` this is the write head; itself, it tells how full the ring is.
        self._write_positions = np.zeros(envs, np.int64)

    @staticmethod
    def memory_needed(
        slots: int,
        envs: int,
        frame_shape: tuple[int, ...],
        frame_dtype: np.dtype | type,
        action_shape: tuple[int, ...] = (),
        mask_width: int = 0,
    ) -> int:
        """Bytes of one replay's arrays."""
        frame = math.prod(frame_shape) * np.dtype(frame_dtype).itemsize
        # Action, reward, step type, episode step. 10^6 Atari frames: 10^6 * (84 * 84 + 17) B = 7.1 GB.
        return envs * (slots * (frame + 8 * math.prod(action_shape) + 4 + 1 + 4 + _bytes(mask_width)) + 8)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values()) + self._write_positions.nbytes

    def __len__(self) -> int:
        """The number of stored transitions. A few of them may not be starts: see the class."""
        return int(np.count_nonzero(self._step_types))

    def add(self, transition: Transition) -> None:
        """Stores one cycle of all environments.

        Invalid rows change nothing, except that a truncated one ends the current episode.
        """
        assert transition.observation.shape == transition.next_observation.shape == self._frames[:, 0].shape
        assert (transition.mask is None) == (transition.next_mask is None) == (self._masks is None)
        rows = np.flatnonzero(transition.valid)
        cut = None if len(rows) == self._envs else transition.truncated & ~transition.valid
        if cut is not None:
            taken = {name: values[rows] for name, values in transition._asdict().items() if values is not None}
            transition = Transition(**taken)
        terminated, truncated = transition.terminated, transition.truncated
        frames = self._frames.reshape(-1, *self._frames.shape[2:])
        at = self._write_slots(rows)  # flat indices: twice as fast as pairs
        frames[at] = transition.observation
        self._flat_actions()[at] = transition.action
        if transition.mask is not None:
            self._flat_masks()[at] = np.packbits(transition.mask, axis=1)
        self._rewards.reshape(-1)[at] = transition.reward
        self._step_types.reshape(-1)[at] = np.where(terminated, TERMINATED, np.where(truncated, TRUNCATED, GOES_ON))
        # If the episode continues, the next cycle overwrites this with an equal observation. If it has ended, the slot
        # is kept, because truncation bootstraps from it.
        at = self._advance(rows, self._episode_steps.reshape(-1)[at] + 1)
        frames[at] = transition.next_observation
        if transition.next_mask is not None:
            self._flat_masks()[at] = np.packbits(transition.next_mask, axis=1)
        ended = rows[terminated | truncated]
        if len(ended):
            self._advance(ended, 0)
        if cut is not None:
            self.truncate_episodes(cut)

    def truncate_episodes(self, where: np.ndarray | None = None) -> None:
        """Truncates the current episodes of the environments `where`, [E] bool; by default of all environments.

        Call it when environments are reset from outside, for example after a restore: their next observation does not
        follow the last one stored.
        """
        rows = np.arange(self._envs) if where is None else np.flatnonzero(where)
        rows = rows[self._episode_steps[rows, self._write_positions[rows] % self._slots] > 0]
        self._step_types[rows, (self._write_positions[rows] - 1) % self._slots] = TRUNCATED
        self._advance(rows, 0)

    def _write_slots(self, rows: np.ndarray) -> np.ndarray:
        """The slots at the write heads of these rings, as indices into the flattened rings."""
        return rows * self._slots + self._write_positions[rows] % self._slots

    def _advance(self, rows: np.ndarray, episode_step: np.ndarray | int) -> np.ndarray:
        """Moves the write heads of these rings on by one slot and returns these slots. `episode_step` is theirs."""
        self._write_positions[rows] += 1
        at = self._write_slots(rows)
        self._step_types.reshape(-1)[at] = NOTHING
        self._episode_steps.reshape(-1)[at] = episode_step
        return at

    def draw(
        self,
        updates: int,
        batch_size: int,
        learned: Callable[[np.ndarray], np.ndarray] = as_stored,
    ) -> Draw:
        """Draws K = `updates` minibatches of B = `batch_size` transitions.

        `learned` turns the stored reward of each step into the one that is summed, float64.

        Every draw is uniform over the starts of all environments, independently of the others (with replacement).
        Raises ValueError if there is no start.
        """
        start, generation = self._draw(updates * batch_size)  # [K * B], as everything below
        end: np.ndarray = start
        step_types, rewards = self._step_types.reshape(-1), self._rewards.reshape(-1)
        reward = learned(rewards[start])
        discount: np.ndarray = np.full(len(start), self._gamma)
        for _ in range(1, self._n_step):
            goes_on = step_types[end] == GOES_ON
            end = np.where(goes_on, self._moved(end, 1), end)
            reward += np.where(goes_on, discount * learned(rewards[end]), 0)
            discount = np.where(goes_on, discount * self._gamma, discount)
        discount = np.where(step_types[end] == TERMINATED, 0, discount)
        shape = (updates, batch_size)
        return Draw(
            start=start.reshape(shape),
            end=self._moved(end, 1).reshape(shape),
            action=self._flat_actions()[start].reshape(*shape, *self._actions.shape[2:]),
            reward=reward.astype(np.float32).reshape(shape),
            discount=discount.astype(np.float32).reshape(shape),
            generation=generation.reshape(shape),
        )

    def gather(self, draw: Draw) -> Batch:
        """Stacks the observations of the sampled transitions. Call it before the next `add`."""
        return Batch(
            observation=self._stacks(draw.start),
            action=draw.action,
            reward=draw.reward,
            discount=draw.discount,
            next_observation=self._stacks(draw.end),
            weight=draw.weight,
            next_mask=None if self._masks is None else self._mask_of(draw.end),
        )

    def _mask_of(self, at: np.ndarray) -> np.ndarray:
        """[..., S] bool: the masks at the flat indices `at`."""
        packed = self._flat_masks().take(at, axis=0)
        return np.unpackbits(packed, axis=-1, count=self._mask_width).view(np.bool_)

    def _flat_actions(self) -> np.ndarray:
        return self._actions.reshape(-1, *self._actions.shape[2:])

    def _flat_masks(self) -> np.ndarray:
        assert self._masks is not None
        return self._masks.reshape(-1, self._masks.shape[2])

    def is_held(self, draw: Draw) -> np.ndarray:
        """[K, B] bool: whether each sampled transition is still stored, that is, not overwritten."""
        return self._write_positions[draw.start // self._slots] - draw.generation < self._slots

    def _draw(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """[size] each: independent uniform draws from the starts, as flat indices and as generations."""
        oldest, candidates = self._candidates()
        bounds = np.cumsum(candidates)
        step_types, episode_steps = self._step_types.reshape(-1), self._episode_steps.reshape(-1)
        drawn, generation = np.empty(size, np.int64), np.empty(size, np.int64)
        missing = np.arange(size)
        for _ in range(ROUNDS if bounds[-1] else 0):
            place = self._rng.integers(bounds[-1], size=len(missing))
            env = np.searchsorted(bounds, place, side="right")
            place -= (bounds - candidates)[env]  # from here on relative to the environment's oldest slot
            generation[missing] = unreduced = oldest[env] + place
            drawn[missing] = at = env * self._slots + unreduced % self._slots
            is_start = step_types[at] != NOTHING
            if self._frame_stack > 1:
                is_start &= np.minimum(episode_steps[at], self._frame_stack - 1) <= place
            missing = missing[~is_start]
            if len(missing) == 0:
                return drawn, generation
        starts = self._starts()
        if len(starts) == 0:
            raise ValueError("The replay holds no transition that can be sampled yet.")
        # Rejected draws are replaced by uniform ones, so all stay uniform.
        drawn[missing] = at = self._rng.choice(starts, len(missing))
        env = at // self._slots
        generation[missing] = oldest[env] + (at - oldest[env]) % self._slots
        return drawn, generation

    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """The oldest observations [E], numbered as in `_write_positions`, and how many [E] have a complete window."""
        held = np.minimum(self._write_positions, self._slots - 1)  # without the head itself
        # All windows of an ended episode are complete. The newest n - 1 of the current one are not.
        under_way = self._episode_steps[np.arange(self._envs), self._write_positions % self._slots]
        incomplete = np.minimum(under_way, self._n_step - 1)
        return self._write_positions - held, held - incomplete

    def _starts(self) -> np.ndarray:
        """All starts, as indices into the flattened rings."""
        oldest, candidates = self._candidates()
        place = (np.arange(self._slots) - oldest[:, None]) % self._slots  # [E, L], counted from the oldest slot
        has_stack = np.minimum(self._episode_steps, self._frame_stack - 1) <= place
        return np.flatnonzero((self._step_types != NOTHING) & (place < candidates[:, None]) & has_stack)

    def _moved(self, at: np.ndarray, by: np.ndarray | int) -> np.ndarray:
        """The flat indices `by` slots further in their rings."""
        slot = at % self._slots
        return at - slot + (slot + by) % self._slots

    def _stacks(self, at: np.ndarray) -> np.ndarray:
        """The observations [K, B, *observation] at the flat indices `at` [K, B], stacked."""
        frames = self._frames.reshape(-1, *self._frames.shape[2:])
        if self._frame_stack == 1:
            return frames.take(at, axis=0)
        episode_step = self._episode_steps.reshape(-1)[at]
        depth = frames.shape[-1]
        stacks = np.empty((*at.shape, *frames.shape[1:-1], self._frame_stack * depth), frames.dtype)
        for i in range(self._frame_stack):
            back = np.minimum(self._frame_stack - 1 - i, episode_step)  # never beyond the episode's first frame
            stacks[..., i * depth : (i + 1) * depth] = frames.take(self._moved(at, -back), axis=0)
        return stacks

    def arrays(self) -> dict[str, np.ndarray]:
        """The rings themselves, [E, slots, ...] each. Packed masks are there only if masks are used."""
        masks = {} if self._masks is None else {"masks": self._masks}
        return {
            "frames": self._frames,
            "actions": self._actions,
            "rewards": self._rewards,
            "step_types": self._step_types,
            "episode_steps": self._episode_steps,
            **masks,
        }

    def state(self) -> dict[str, Any]:
        """Arrays, the number of slots, and under "rng" what `json` can write.

        The arrays are views of the used slots: write or copy them before the next `add`.
        """
        used = min(int(self._write_positions.max()) + 1, self._slots)
        arrays = {name: array[:, :used] for name, array in self.arrays().items()}
        own = {"write_positions": self._write_positions, "slots": self._slots, "rng": self._rng.bit_generator.state}
        return arrays | own

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state()` returned. `n_step`, `gamma` and `frame_stack` may have changed since.

        An array [E, used, ...] may be any object with a shape and a dtype that yields rows. So a large array need not
        be in memory twice. Raises InputError if the rings have other sizes.
        """
        saved, mine = state["frames"], self._frames
        expected = (self._slots, self._envs, mine.shape[2:], mine.dtype, *_action_sizes(self.arrays()))
        received = (int(state["slots"]), len(saved), saved.shape[2:], saved.dtype, *_action_sizes(state))
        if received != expected:
            raise InputError(
                "The saved replay has another size than this one. Expected: {} slots in {} environments with "
                "observations {} {}, actions {} and {} B of mask. Received: {}, {}, {} {}, {}, {} B.".format(
                    *expected, *received
                )
            )
        used = saved.shape[1]
        for name, array in self.arrays().items():
            for row, saved_row in zip(array, state[name], strict=True):
                row[:used] = saved_row
        self._step_types[:, used:] = NOTHING
        for i, position in enumerate(state["write_positions"]):
            self._write_positions[i] = position
        self._rng.bit_generator.state = state["rng"]


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _action_sizes(arrays: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """The shape of an action, and the bytes of a mask."""
    return tuple(arrays["actions"].shape[2:]), arrays["masks"].shape[2] if "masks" in arrays else 0
