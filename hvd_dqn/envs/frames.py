"""Turns observations of any space into frames, one array each, and stacks the last few frames."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from hvd_dqn.agent.layout import Layout, Part
from hvd_dqn.envs.spaces import Path, leaves, name_of
from hvd_dqn.errors import InputError

# Images in a Dict or Tuple are Boxes of three axes, and integer Boxes of two axes that are at least this long: MiniGrid shows
# 7 x 7 cells.
LEAST_SIDE = 7
# More channels than this, or sides of less than twice their number, do not make a first axis look like channels.
MOST_CHANNELS = 16
# Bounds of integers from here on (the largest int32) only say that there is no bound.
NO_BOUND = 2**31 - 1
STORED_INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32)


class Misfit(ValueError):
    """An observation that has no frame: its number among those that were read, what the environment did, and the value."""

    def __init__(self, row: int, did: str, why: str) -> None:
        super().__init__(f"{did}: {why}")
        self.row, self.did, self.why = row, did, why


class Frames:
    """Frames of `space`, and observations made of `stack` of them, oldest first, along the last axis.

    A frame is one array, laid out as `layout` says. Its parts are the leaves of the space in the order of Gymnasium's
    `flatten`:

      - Discrete and MultiDiscrete are stored as the numbers of their states, counted from 0.
      - Box and MultiBinary keep integers of up to four bytes as they are, bool as uint8. Other numbers become float32, or
        float64 if observations are to be normalised (`normalize`): statistics of wide numbers need all their digits.
      - Integer Boxes are divided by `scale`, or else by the largest absolute value that the space declares. Real numbers
        are not, nor what is normalised.
      - An image [C, H, W] is stored as [H, W, C] where its shape tells: at most 16 channels, sides at least twice as long,
        and no other reading. Square first axes are height and width.

    An episode's first frame fills its whole stack. Returned arrays are copies, never views of arrays that vector classes
    reuse.
    """

    def __init__(
        self, space: gymnasium.Space, stack: int = 1, *, normalize: bool = False, scale: float | None = None
    ) -> None:
        self._space, self.stack = space, stack
        found = leaves(space)
        self._leaves = [
            _Leaf(path, leaf, alone=len(found) == 1, normalize=normalize, scale=scale) for path, leaf in found
        ]
        self._is_whole = not found[0][0]  # the space is its only leaf
        self.layout = Layout([leaf.part for leaf in self._leaves], stack)
        self.shape, self.dtype = self.layout.shape, self.layout.dtype
        self.observation_shape = self.layout.observation_shape
        self._channels = self.shape[-1]
        # Of an observation as a policy takes it: one of the space or, if they are stacked, a stack. None: no single array.
        own = self._leaves[0].shape if self._is_whole else None
        self.seen_shape: tuple[int, ...] | None = own if stack == 1 else self.observation_shape

    def read(self, raw: Any) -> np.ndarray:
        """[n, *shape]: n observations of the space, as a vector class gives them or in a list. Raises Misfit."""
        if self._is_whole:
            return self._leaves[0].read(raw)
        return self.layout.pack([leaf.read(leaf.of(raw)) for leaf in self._leaves])

    def take(self, observation: Any) -> tuple[np.ndarray, bool]:
        """[n, *shape], and whether it was one observation alone instead of n. Raises InputError if it does not fit."""
        values = [leaf.checked(observation, self._space) for leaf in self._leaves]
        leading = {
            value.shape[: value.ndim - len(leaf.shape)] for leaf, value in zip(self._leaves, values, strict=True)
        }
        if len(leading) != 1:
            raise InputError(
                f"Expected: one observation of {self._space} or B of them. Received: parts of different lengths."
            )
        alone = leading == {()}
        try:
            frames = self.read([observation] if alone else observation)
        except Misfit as error:
            raise InputError(f"Expected: observations of {self._space}. Received: one with {error.why}.") from None
        return frames, alone

    def take_stacks(self, seen: Any) -> tuple[np.ndarray, bool]:
        """The same for stacks that `begin` and `push` made: [n, *observation_shape]."""
        stacks = np.asarray(seen)
        alone = stacks.shape == self.observation_shape
        if not alone and (stacks.ndim == 0 or stacks.shape[1:] != self.observation_shape):
            raise InputError(
                f"Expected: one observation of shape {self.observation_shape}, a stack such as `begin` and `push` make, or "
                f"B of them. Received: an array of shape {stacks.shape}."
            )
        exact = self.layout.is_packed or self.layout.parts[0].categories
        if stacks.dtype != self.dtype and (exact or (self.dtype.kind in "iu" and stacks.dtype.kind not in "iub")):
            raise InputError(f"Expected: stacks of {self.dtype}, as `begin` makes. Received: {stacks.dtype}.")
        return np.array(stacks, self.dtype, order="C").reshape(-1, *self.observation_shape), alone

    def begin(self, frame: np.ndarray) -> np.ndarray:
        """[n, *observation_shape]: the observations at the first frames [n, *shape] of n episodes."""
        return frame if self.stack == 1 else np.concatenate((frame,) * self.stack, axis=-1)

    def push(self, observation: np.ndarray, frame: np.ndarray, first: np.ndarray) -> np.ndarray:
        """[n, *observation_shape]: the observations one step later; [n] `first`: whether `frame` begins an episode."""
        if self.stack == 1:
            return frame
        observation = np.concatenate((observation[..., self._channels :], frame), axis=-1)
        if first.any():
            observation[first] = self.begin(frame[first])
        return observation


class _Leaf:
    """Reads one leaf of a space as one part of a frame."""

    def __init__(
        self, path: Path, space: gymnasium.Space, *, alone: bool, normalize: bool, scale: float | None
    ) -> None:
        self.path, self.name = path, name_of(path)
        self.shape = tuple(space.shape or ())
        self._start: np.ndarray | None = None  # the first state of each element; None: a Box
        self._order: tuple[int, ...] | None = None  # of the axes, the first one counting copies; None: as it is
        self._narrows = False  # some values may not fit
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            self.is_whole = True
            self.part = self._states_of(space, alone)
        else:
            assert isinstance(space, spaces.Box | spaces.MultiBinary)
            self.is_whole = np.dtype(space.dtype).kind != "f"
            self.part = self._numbers_of(space, normalize, scale)

    def _states_of(self, space: spaces.Discrete | spaces.MultiDiscrete, alone: bool) -> Part:
        states = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec)
        self._start, self._states = np.ravel(space.start).astype(np.int64), states.astype(np.uint64)
        fitting = (kind for kind in (np.uint8, np.uint16, np.int32) if states.max() - 1 <= np.iinfo(kind).max)
        dtype = np.dtype(np.int32 if alone and isinstance(space, spaces.Discrete) else next(fitting))
        return Part((len(states),), dtype, self.name, categories=tuple(states.tolist()))

    def _numbers_of(self, space: spaces.Box | spaces.MultiBinary, normalize: bool, scale: float | None) -> Part:
        given, axes = np.dtype(space.dtype), len(self.shape)
        first, unsure = _channels(self.shape) if axes == 3 else (False, False)
        self._shape = {0: (1,), 1: self.shape, 2: (*self.shape, 1), 3: self.shape}[axes]
        if first:
            self._shape, self._order = (*self.shape[1:], self.shape[0]), (0, 2, 3, 1)
        normalized = normalize and (given.kind == "f" or (given.kind in "iu" and given.itemsize > 1))
        dtype: np.dtype
        if given == np.bool_:
            dtype = np.dtype(np.uint8)
        elif given in STORED_INTEGERS:
            dtype = given
        else:
            dtype = np.dtype(np.float64 if normalized and given.itemsize > 4 else np.float32)
        self._narrows = given.kind == "f" and given.itemsize > dtype.itemsize
        divisor, declared = None, False
        if isinstance(space, spaces.Box) and given.kind in "iu" and not normalized:
            declared = scale is None
            divisor = self._largest_declared(space) if scale is None else np.array(scale)
        return Part(
            self._shape,
            dtype,
            self.name,
            divisor=divisor,
            declared=declared and divisor is not None,
            normalized=normalized,
            is_image=axes == 3 or (axes == 2 and self.is_whole and min(self.shape) >= LEAST_SIDE),
            unsure=self.shape if unsure else (),
            channels_first=first,
        )

    def _largest_declared(self, space: spaces.Box) -> np.ndarray | None:
        """The largest absolute values, one for all elements if they are equal; None if they change nothing."""
        size = np.maximum(np.abs(space.low, dtype=np.float64), np.abs(space.high, dtype=np.float64))
        bounded = space.bounded_below & space.bounded_above & (size < NO_BOUND)
        size = np.where(bounded & (size > 0), size, 1.0)
        if (size == 1).all():
            return None
        return np.array(size.flat[0]) if (size == size.flat[0]).all() else self._arranged(size)[0]

    def of(self, raw: Any) -> Any:
        """This leaf of n observations: of a Dict of arrays, a tuple of arrays, or a list of observations."""
        if isinstance(raw, list) or (isinstance(raw, np.ndarray) and raw.dtype.hasobject):
            return [self._within(one) for one in raw]
        return self._within(raw)

    def _within(self, observation: Any) -> Any:
        for key in self.path:
            observation = observation[key]
        return observation

    def read(self, raw: Any) -> np.ndarray:
        """[n, *part.shape]: a copy of n values of this leaf."""
        if self._start is not None:
            return self._read_states(raw)
        if not self._narrows:
            return self._arranged(np.array(raw, dtype=self.part.dtype, order="C"))
        try:
            with np.errstate(over="raise"):
                return self._arranged(np.array(raw, dtype=self.part.dtype, order="C"))
        except FloatingPointError:
            raise self._too_large(np.asarray(raw, np.float64).reshape(-1, *self.shape)) from None

    def _arranged(self, values: np.ndarray) -> np.ndarray:
        if self._order is None:
            return values.reshape(-1, *self._shape)
        return np.ascontiguousarray(values.reshape(-1, *self.shape).transpose(self._order))

    def _read_states(self, raw: Any) -> np.ndarray:
        assert self._start is not None
        states = np.asarray(raw, np.int64).reshape(-1, len(self._start)) - self._start
        outside = states.view(np.uint64) >= self._states  # negative ones become huge
        if np.count_nonzero(outside):
            row, element = np.argwhere(outside)[0].tolist()
            value = int(states[row, element] + self._start[element])
            least, most = (
                int(self._start[element]),
                int(self._start[element] + self._states[element].astype(np.int64)) - 1,
            )
            where = f" at index [{element}]" if len(self._start) > 1 else ""
            raise Misfit(
                row, f"returned a state{self._named()} outside its space", f"{value}{where}, not {least} to {most}"
            )
        return states.astype(self.part.dtype)

    def _too_large(self, values: np.ndarray) -> Misfit:
        place = np.argwhere(np.isfinite(values) & (np.abs(values) > np.finfo(np.float32).max))
        # A value just above the largest is rounded down to it or up to infinity.
        row, *index = place[0].tolist()
        where = f" at index {index}" if index else ""
        return Misfit(
            row,
            f"returned an observation{self._named()} that does not fit float32",
            f"{values[tuple(place[0])]:g}{where}; the largest is 3.4e+38",
        )

    def _named(self) -> str:
        return f" `{self.name}`" if self.name else ""

    def checked(self, observation: Any, space: gymnasium.Space) -> np.ndarray:
        """This leaf of one observation of `space` or of B, as an array. Raises InputError if it does not fit."""
        try:
            value = np.asarray(self.of(observation))
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(
                f"Expected: one observation of {space} or B of them. Received: {_outline(observation)}, which has no "
                f"`{self.name}`."
            ) from None
        lead = value.ndim - len(self.shape)
        if lead not in (0, 1) or value.shape[lead:] != self.shape:
            raise InputError(
                f"Expected: one observation{self._named()} of shape {self.shape} or B of them. Received: an array of shape "
                f"{value.shape}."
            )
        if self.is_whole and value.dtype.kind not in "iub":
            raise InputError(f"Expected: whole numbers{self._named()} of {space}. Received: {value.dtype}.")
        return value


def rows_of(raw: Any, rows: np.ndarray) -> Any:
    """These rows of an array, or of each array in a dictionary or tuple."""
    if isinstance(raw, Mapping):
        return {key: rows_of(value, rows) for key, value in raw.items()}
    if isinstance(raw, tuple):
        return tuple(rows_of(value, rows) for value in raw)
    return np.asarray(raw)[rows]


def _outline(observation: Any) -> str:
    if isinstance(observation, Mapping):
        return f"a dictionary of {', '.join(f'`{key}`' for key in observation) or 'nothing'}"
    return f"{type(observation).__name__}"


def _channels(shape: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether the channels of a Box of three axes come first, and whether that cannot be told.

    First: (4, 84, 84), (3, 210, 160). Last: (84, 84, 4), (210, 160, 3), and where the first two axes are equal, as in
    MinAtar's (10, 10, 10). Neither is sure of (7, 11, 11) and (12, 8, 8).
    """
    a, b, c = shape
    if a == b or (b != c and c <= min(a, b)):
        return False, False
    first = a <= MOST_CHANNELS and min(b, c) >= 2 * a
    return first, not first
