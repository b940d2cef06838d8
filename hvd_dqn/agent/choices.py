"""What an agent chooses among: one of A actions, or one number in each of several dimensions. Masks allow some of them."""

import itertools
from collections.abc import Sequence

import numpy as np


class Choices:
    """Numbers from 0: one below A or, *factored*, one below n_d in each of D dimensions.

    `sizes` is (A,) or (n_1, ..., n_D). Values and masks have S numbers, A or n_1 + ... + n_D: dimension after dimension.
    An action is one number, or [D] of them. A mask [S] is True for the numbers that may be chosen.
    """

    sizes: tuple[int, ...]
    total: int  # S
    factored: bool
    shape: tuple[int, ...]  # of an action: () or (D,)

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(int(n) for n in sizes)
        self.total, self.factored = sum(self.sizes), len(self.sizes) > 1
        self.shape = (len(self.sizes),) if self.factored else ()
        self._begins = np.array([0, *itertools.accumulate(self.sizes[:-1])])  # [D] where each dimension begins
        # [D * widest] bool: the places of the S numbers if all dimensions are made as long as the widest.
        self._places = (np.arange(max(self.sizes)) < np.array(self.sizes)[:, None]).ravel()

    def greedy(self, q: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """[N] or [N, D]: what has the highest value in `q` [N, S], among what `mask` [N, S] allows."""
        if mask is not None:
            q = np.where(mask, q, -np.inf)
        return self._by_dimension(q, -np.inf).argmax(axis=-1) if self.factored else q.argmax(axis=1)

    def random(self, rng: np.random.Generator, count: int, mask: np.ndarray | None = None) -> np.ndarray:
        """[N] or [N, D]: independent uniform draws, in each dimension from what `mask` [N, S] allows."""
        if mask is None:
            return rng.integers(self.sizes if self.factored else self.total, size=(count, *self.shape))
        place = np.cumsum(self._by_dimension(mask, False), axis=-1)  # [N, D, widest], counted from 1
        drawn = np.floor(rng.random((count, len(self.sizes))) * place[..., -1])
        return (place > drawn[..., None]).argmax(axis=-1).reshape(count, *self.shape)

    def allows(self, mask: np.ndarray, action: np.ndarray) -> np.ndarray:
        """[N] bool: whether `mask` [N, S] allows each action, [N] or [N, D]."""
        taken = self._begins + action.reshape(len(mask), -1)  # [N, D]
        return np.asarray(np.logical_and.reduce(np.take_along_axis(mask, taken, axis=1), axis=1))

    def leaves_any(self, mask: np.ndarray) -> np.ndarray:
        """[N] bool: whether `mask` [N, S] allows an action at all, which takes a number in every dimension."""
        if not self.factored:
            return np.asarray(mask.any(axis=1))
        any_left = np.logical_or.reduce(self._by_dimension(mask, False), axis=2)  # [N, D]
        possible: np.ndarray = np.logical_and.reduce(any_left, axis=1)
        return possible

    def _by_dimension(self, values: np.ndarray, fill: float | bool) -> np.ndarray:
        """[N, D, widest] of [N, S]; dimensions with fewer numbers end with `fill`."""
        apart = np.full((len(values), len(self._places)), fill, values.dtype)
        apart[:, self._places] = values
        return apart.reshape(len(values), len(self.sizes), -1)
