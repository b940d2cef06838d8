"""A trained network with its preprocessing and its spaces, for evaluations and for the user's own programs."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from hvd_dqn.errors import InputError

NOT_FIRST = np.zeros((), np.bool_)  # the frame is not the first of an episode


class Frames(Protocol):
    """Turns observations of the space into what the network sees. `hvd_dqn.envs.frames` has the only implementation."""

    stack: int
    seen_shape: tuple[int, ...] | None

    def take(self, observation: Any) -> tuple[np.ndarray, bool]: ...
    def take_stacks(self, seen: Any) -> tuple[np.ndarray, bool]: ...
    def begin(self, frame: np.ndarray) -> np.ndarray: ...
    def push(self, observation: np.ndarray, frame: np.ndarray, first: np.ndarray) -> np.ndarray: ...


class Actions(Protocol):
    """A Discrete space: the actions start, ..., start + n - 1."""

    n: Any
    start: Any


class Policy:
    """Chooses actions by the values of a trained network.

    `values` maps [B, *frames.observation_shape] to [B, A]: preprocessing and network. Random actions are drawn from `rng`,
    a generator or its seed.

    `act` and `q_values` take one observation, as the environment gives it, or B of them, and keep no state. B
    dictionaries or tuples come in a list or, as vector classes give them, as one dictionary or tuple of arrays [B, ...].

    A policy that was trained with `frame_stack` > 1 takes stacks, which `begin` and `push` make. Without stacks these
    two return the observation itself, so this loop works with every policy:

        seen = policy.begin(observation)  # from env.reset()
        while not over:
            observation, reward, terminated, truncated, info = env.step(policy.act(seen))
            seen, over = policy.push(seen, observation), terminated or truncated
    """

    observation_shape: (
        tuple[int, ...] | None
    )  # of one observation, as `act` takes it; dictionaries and tuples have none

    def __init__(
        self,
        values: Callable[[np.ndarray], np.ndarray],
        frames: Frames,
        observation_space: Any,
        action_space: Actions,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        self._values, self._frames, self.rng = values, frames, np.random.default_rng(rng)
        self.observation_space, self.action_space = observation_space, action_space
        self.actions, self._first_action = int(action_space.n), int(action_space.start)
        self.observation_shape = frames.seen_shape
        self._stacks = frames.stack > 1

    def act(
        self, observation: Any, epsilon: float = 0.0, mask: np.ndarray | list[Any] | None = None
    ) -> int | np.ndarray:
        """The action for one observation, an int, or for B observations, [B] int64: numbers of the action space.

        It is the action of the highest value or, with probability `epsilon`, a random one. `mask`, [A] bool or [B, A],
        is True for allowed actions. Raises InputError if a shape is wrong, or if a mask allows no action.
        """
        if not 0 <= epsilon <= 1:
            raise InputError(f"`epsilon` is a probability, from 0 to 1. Received: {epsilon}.")
        seen, alone = self._read(observation)
        allowed = None if mask is None else self._read_mask(mask, len(seen), alone)
        explores = self.rng.random(len(seen)) < epsilon if epsilon > 0 else None
        if explores is not None and explores.all():
            action = self._random(len(seen), allowed)
        else:
            action = _highest(self._values(seen), allowed)
            if explores is not None:
                action = np.where(explores, self._random(len(seen), allowed), action)
        action = action + self._first_action
        return int(action[0]) if alone else action

    def q_values(self, observation: Any) -> np.ndarray:
        """The values [A] of all actions for one observation, or [B, A] for B: float32, in the order of the actions."""
        seen, alone = self._read(observation)
        q = self._values(seen).astype(np.float32, copy=False)
        return q[0] if alone else q

    def begin(self, observation: Any) -> Any:
        """What `act` takes at the first observation of an episode, or at the first ones of B episodes."""
        return self._frames.begin(self._frame(observation)) if self._stacks else self._itself(observation)

    def push(self, seen: Any, observation: Any) -> Any:
        """What `act` takes one step later: `observation` becomes the newest of the stack, and the oldest is dropped."""
        if not self._stacks:
            return self._itself(observation)
        return self._frames.push(seen, self._frame(observation), NOT_FIRST)

    def choose(self, seen: np.ndarray) -> np.ndarray:
        """Greedy actions [n], counted from 0, for [n, *frames.observation_shape] as `Environments` yields them."""
        return self._values(seen).argmax(axis=1)

    def _read(self, observation: Any) -> tuple[np.ndarray, bool]:
        """[B, *frames.observation_shape], and whether it was one observation alone."""
        return self._frames.take_stacks(observation) if self._stacks else self._frames.take(observation)

    def _read_mask(self, mask: Any, count: int, alone: bool) -> np.ndarray:
        allowed = np.asarray(mask)
        expected = (self.actions,) if alone else (count, self.actions)
        if allowed.shape != expected or allowed.dtype != np.bool_:
            raise InputError(
                f"`mask` must be bool of shape {expected}, True where an action may be taken. "
                f"Received: {allowed.dtype} of shape {allowed.shape}."
            )
        allowed = allowed.reshape(count, self.actions)
        if not allowed.any(axis=1).all():
            raise InputError("`mask` must leave at least one action. Received: one that is False for all.")
        return allowed

    def _random(self, count: int, allowed: np.ndarray | None) -> np.ndarray:
        if allowed is None:
            return self.rng.integers(self.actions, size=count)
        # Each of several independent numbers is the highest with the same probability.
        return _highest(self.rng.random(allowed.shape), allowed)

    def _frame(self, observation: Any) -> np.ndarray:
        """The frame of one observation, or [B, ...] of B."""
        frames, alone = self._frames.take(observation)
        return frames[0] if alone else frames

    def _itself(self, observation: Any) -> Any:
        return observation if self.observation_shape is None else np.asarray(observation)


def _highest(values: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    """[B] the action of the highest value [B, A] among those `allowed`."""
    return (values if allowed is None else np.where(allowed, values, -np.inf)).argmax(axis=1)
