"""Quantities that change with the total steps, as pure functions."""

import numpy as np


def linear(step: float, start: float, end: float, duration: float) -> float:
    """Goes from `start` at step 0 to `end` at `duration` and stays there; a duration of 0 is `end` at once."""
    fraction = min(max(step / duration, 0.0), 1.0) if duration > 0 else 1.0
    return start + fraction * (end - start)


def epsilon_ladder(epsilon: float, alpha: float, first: int, count: int, total: int) -> np.ndarray:
    """Spreads exploration over environments: epsilon ** (1 + alpha * i / (total - 1)) (Horgan et al. 2018, arXiv:1803.00933).

    Returns [count], for the global environment indices `first` and up, out of `total`. With `alpha` 0 all are equal.
    """
    index = np.arange(first, first + count)
    return epsilon ** (1.0 + alpha * index / max(total - 1, 1))
