"""How an observation lies in the replay: one array of numbers or, if it has several parts, all of them packed into one."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Part(NamedTuple):
    """One array of numbers within an observation: a Box, or the states of Discrete spaces."""

    shape: Shape  # of one frame: [D] or [H, W, C]
    dtype: np.dtype  # as the replay stores it
    name: str = ""  # its keys in the space; none if it is all of the observation
    divisor: np.ndarray | None = None  # [] or `shape`, float64: the network sees the numbers divided by this
    declared: bool = False  # the divisor is what the space declares to be the largest number
    categories: tuple[int, ...] = ()  # for each element the number of its states, counted from 0; numbers have none
    normalized: bool = False  # by running statistics
    is_image: bool = False
    unsure: Shape = ()  # the space's shape, if its first or its last axis may be the channels
    channels_first: bool = False  # in the space; stored they are last

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


class Layout:
    """The parts of an observation of `stack` frames, and their places.

    A single part is stored as it is, and stacked along its last axis: [D] as [k * D], [H, W, C] as [H, W, k * C].
    Several parts are packed into one row [P] for each frame, one after another: so the replay, checkpoints and
    redistribution handle one array per transition, whatever the space. A row consists of the parts' numbers if all have
    one dtype, else of their bytes. Rows are stacked as [k * P].
    """

    shape: Shape  # of a frame
    dtype: np.dtype
    observation_shape: Shape  # of a stack

    def __init__(self, parts: Sequence[Part], stack: int = 1) -> None:
        self.parts, self.stack = tuple(parts), stack
        self.is_packed = len(self.parts) > 1
        dtypes = {part.dtype for part in self.parts}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.uint8)
        sizes = [part.numbers * (part.dtype.itemsize // self.dtype.itemsize) for part in self.parts]
        ends = list(itertools.accumulate(sizes))
        self.places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]  # within a row
        self.shape = (ends[-1],) if self.is_packed else self.parts[0].shape
        self.observation_shape = (*self.shape[:-1], stack * self.shape[-1])

    def pack(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """[n, *shape]: n frames of these parts, [n, *part.shape] each."""
        if not self.is_packed:
            return values[0]
        rows = np.empty((len(values[0]), *self.shape), self.dtype)
        for value, part, place in zip(values, self.parts, self.places, strict=True):
            rows[:, place].view(part.dtype)[:] = value.reshape(len(value), -1)
        return rows

    def views(self, frames: np.ndarray) -> list[np.ndarray]:
        """[n, *part.shape] each: the parts of frames [n, *shape]."""
        if not self.is_packed:
            return [frames]
        return [
            frames[:, place].view(part.dtype).reshape(-1, *part.shape)
            for part, place in zip(self.parts, self.places, strict=True)
        ]

    def stacks(self, observation: np.ndarray) -> list[np.ndarray]:
        """[B, D], [B, k * D] or [B, H, W, k * C] each: the parts of observations [B, *observation_shape]."""
        if not self.is_packed:
            return [observation]
        if self.stack == 1:
            return self.views(observation)
        views = self.views(observation.reshape(-1, *self.shape))
        frames = [view.reshape(-1, self.stack, *view.shape[1:]) for view in views]  # [B, k, ...]
        return [np.concatenate([frame[:, i] for i in range(self.stack)], axis=-1) for frame in frames]

    def stacked_shapes(self) -> list[Shape]:
        return [(*part.shape[:-1], self.stack * part.shape[-1]) for part in self.parts]

    def normalized(self, frames: np.ndarray) -> np.ndarray:
        """[n, *shape] or, of packed frames, [n, D]: the numbers that running statistics are taken of."""
        if not self.is_packed:
            return frames
        chosen = [view for part, view in zip(self.parts, self.views(frames), strict=True) if part.normalized]
        return np.concatenate([view.reshape(len(view), -1) for view in chosen], axis=1, dtype=np.float64)

    def normalized_shape(self) -> Shape:
        """The shape of one such frame."""
        return (sum(part.numbers for part in self.parts if part.normalized),) if self.is_packed else self.parts[0].shape

    def neutral(self, mean: np.ndarray) -> np.ndarray:
        """A frame [*shape] of zeros, but for the numbers that are normalised, which are `mean`."""
        frame = np.zeros((1, *self.shape), self.dtype)
        first, flat = 0, np.ravel(mean)
        for part, view in zip(self.parts, self.views(frame), strict=True):
            if part.normalized:
                view[:] = flat[first : first + part.numbers].reshape(part.shape)
                first += part.numbers
        return frame[0]

    def largest(self, frames: np.ndarray) -> np.ndarray:
        """[S, 2]: for each part with a `declared` divisor the largest number in frames [n, *shape], and as a quotient."""
        found = []
        for part, view in zip(self.parts, self.views(frames), strict=True):
            if part.declared:
                size = np.maximum(view.max(axis=0).astype(np.float64), -view.min(axis=0).astype(np.float64))
                found.append((size.max(), (size / part.divisor).max()))
        return np.array(found, np.float64).reshape(-1, 2)

    def describe(self) -> str:
        """What the network sees of each part, for display."""
        return "; ".join(_described(part) for part in self.parts)


def single(shape: Shape, dtype: np.dtype | type = np.float32, *, divisor: float | None = None) -> Layout:
    """The layout of one array of numbers, with its stack already in `shape`."""
    return Layout([Part(shape, np.dtype(dtype), divisor=None if divisor is None else np.array(float(divisor)))])


def _described(part: Part) -> str:
    shape = " x ".join(map(str, part.shape))
    if part.categories:
        states = part.categories[0] if len(set(part.categories)) == 1 else " + ".join(map(str, part.categories))
        text = f"one-hot, {states} states" + (f" x {len(part.categories)}" if len(part.categories) > 1 else "")
    elif part.normalized:
        text = f"{shape} {part.dtype}, normalised"
    elif part.divisor is not None:
        least, most = part.divisor.min(), part.divisor.max()
        text = f"{shape} {part.dtype} / {most:g}" if least == most else f"{shape} {part.dtype} / {least:g} to {most:g}"
    else:
        text = f"{shape} {part.dtype}"
    text = f"{part.name}: {text}" if part.name else text
    return text + (", channels moved from first to last" if part.channels_first else "")
