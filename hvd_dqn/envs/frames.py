"""Turns observations into frames, and stacks the last few frames."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Frames:
    """Frames of `space`, and observations made of `stack` of them, oldest first, along the last axis.

    Box observations of uint8 stay uint8; others become float32. A Discrete observation becomes the int32 number of its
    state, counted from 0. An episode's first frame fills its whole stack. Returned arrays are copies, never views of
    arrays that vector classes reuse.
    """

    shape: tuple[int, ...]  # [D] or [H, W, C]
    dtype: np.dtype
    categories: int | None  # number of states of a Discrete observation
    observation_shape: tuple[int, ...]  # [k * D] or [H, W, k * C]
    seen_shape: tuple[int, ...]  # of an observation of the space or, if they are stacked, of a stack

    def __init__(self, space: gymnasium.Space, stack: int) -> None:
        self._stack = stack
        self.categories, self._first_state = None, 0
        if isinstance(space, spaces.Discrete):
            self.categories, self._first_state = int(space.n), int(space.start)
            self.shape, self.dtype = (1,), np.dtype(np.int32)
        else:
            assert isinstance(space, spaces.Box)
            self.shape = {0: (1,), 1: space.shape, 2: (*space.shape, 1), 3: space.shape}[len(space.shape)]
            self.dtype = np.dtype(np.uint8 if space.dtype == np.uint8 else np.float32)
        self._channels = self.shape[-1]
        self.observation_shape = (*self.shape[:-1], stack * self._channels)
        self.seen_shape = tuple(space.shape or ()) if stack == 1 else self.observation_shape

    def read(self, raw: Any) -> np.ndarray:
        """[n, *shape]: copies of n observations of the space."""
        return self._converted(raw).reshape(-1, *self.shape)

    def read_seen(self, seen: np.ndarray) -> np.ndarray:
        """[n, *observation_shape]: copies of n observations of the space or, if they are stacked, of n stacks."""
        return self._converted(seen).reshape(-1, *self.observation_shape)

    def _converted(self, raw: Any) -> np.ndarray:
        if self.categories is not None:
            raw = np.asarray(raw) - self._first_state
        return np.array(raw, dtype=self.dtype, order="C")

    def begin(self, frame: np.ndarray) -> np.ndarray:
        """[n, *observation_shape]: the observations at the first frames [n, *shape] of n episodes."""
        return frame if self._stack == 1 else np.concatenate((frame,) * self._stack, axis=-1)

    def push(self, observation: np.ndarray, frame: np.ndarray, first: np.ndarray) -> np.ndarray:
        """[n, *observation_shape]: the observations one step later; [n] `first`: whether `frame` begins an episode."""
        if self._stack == 1:
            return frame
        observation = np.concatenate((observation[..., self._channels :], frame), axis=-1)
        if first.any():
            observation[first] = self.begin(frame[first])
        return observation
