"""The two records that travel through the program: what a cycle yields, and what a minibatch holds."""

from typing import NamedTuple

import numpy as np


class Transition(NamedTuple):
    """One step of each of a rank's E environments.

    `next_observation` is the true last observation of an episode where one ended, not the first of the next episode.
    `valid` is False where an environment only reset itself in this step (vector classes that reset one step late), and
    where environments failed and were made anew. A row that is not valid but truncated: the episode was cut off without
    a transition.
    """

    observation: np.ndarray  # [E, *frame]
    action: np.ndarray  # [E] int64
    reward: np.ndarray  # [E] float32, after scaling and clipping
    terminated: np.ndarray  # [E] bool: the episode reached a terminal state
    truncated: np.ndarray  # [E] bool: the episode was cut off, by a time limit for instance
    next_observation: np.ndarray  # [E, *frame]
    valid: np.ndarray  # [E] bool


class Batch(NamedTuple):
    """K stacked minibatches of B n-step transitions.

    `reward` is the discounted sum of up to n rewards; `discount` multiplies the bootstrap value: 0 at terminal states
    and gamma**m after m steps elsewhere. `weight` multiplies the loss of each; None where all count the same.
    """

    observation: np.ndarray  # [K, B, *observation]
    action: np.ndarray  # [K, B] int64
    reward: np.ndarray  # [K, B] float32
    discount: np.ndarray  # [K, B] float32
    next_observation: np.ndarray  # [K, B, *observation]
    weight: np.ndarray | None = None  # [K, B] float32
