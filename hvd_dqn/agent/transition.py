"""The two records that are passed through the program: the result of a cycle, and a stack of minibatches."""

from typing import NamedTuple

import numpy as np


class Transition(NamedTuple):
    """One step of each of a rank's E environments.

    If an episode ended, `next_observation` is its true last observation, not the first of the next episode. `valid` is
    False if the environment only reset itself in this step (vector classes that reset one step late), or failed and was
    made again. A row that is truncated but not valid means that its episode was cut off without a transition.
    """

    observation: np.ndarray  # [E, *frame]
    action: np.ndarray  # [E] int64, or [E, D] in D dimensions
    reward: np.ndarray  # [E] float32, after scaling and clipping
    terminated: np.ndarray  # [E] bool: the episode reached a terminal state
    truncated: np.ndarray  # [E] bool: the episode was cut off, by a time limit for instance
    next_observation: np.ndarray  # [E, *frame]
    valid: np.ndarray  # [E] bool
    # [E, S] bool: the actions that `observation` and `next_observation` allow (see `Choices`). None if masks are not used.
    mask: np.ndarray | None = None
    next_mask: np.ndarray | None = None


class Batch(NamedTuple):
    """K stacked minibatches of B n-step transitions.

    `reward` is the discounted sum of up to n rewards; `discount` multiplies the bootstrap value: 0 at terminal states
    and gamma**m after m steps elsewhere. `weight` multiplies the loss of each; None if all count the same. `next_mask`
    is True for the actions that the next observation allows (see `Choices`); None if masks are not used.
    """

    observation: np.ndarray  # [K, B, *observation]
    action: np.ndarray  # [K, B] int64, or [K, B, D] in D dimensions
    reward: np.ndarray  # [K, B] float32
    discount: np.ndarray  # [K, B] float32
    next_observation: np.ndarray  # [K, B, *observation]
    weight: np.ndarray | None = None  # [K, B] float32
    next_mask: np.ndarray | None = None  # [K, B, S] bool
