"""A trained network with its preprocessing and its spaces, for evaluations and for the user's own programs."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from hvd_dqn.agent.choices import Choices
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
    """What the agent's numbers mean in the environment's own space. `hvd_dqn.envs.actions` has the only implementation."""

    space: Any
    choices: Choices

    def own(self, action: np.ndarray) -> np.ndarray: ...
    def read_mask(self, mask: Any) -> np.ndarray: ...


class Policy:
    """Chooses actions by the values of a trained network.

    `values` maps [B, *frames.observation_shape] to [B, S], the values of `choices`: preprocessing and network. Random
    actions are drawn from `rng`, a generator or its seed.

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
        actions: Actions,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        self._values, self._frames, self.rng = values, frames, np.random.default_rng(rng)
        self.observation_space, self.action_space = observation_space, actions.space
        self.choices, self._actions = actions.choices, actions
        self.observation_shape = frames.seen_shape
        self._stacks = frames.stack > 1

    def act(self, observation: Any, epsilon: float = 0.0, mask: Any = None) -> Any:
        """The environment's own action for one observation, or B of them for B observations.

        One action of a Discrete space is an int, and others are arrays: [B] int64 for B observations; [*shape] or
        [B, *shape] where the environment's actions have a shape, of its own type.

        It is the action of the highest value or, with probability `epsilon`, a random one. `mask`, [A] or [B, A], is True
        or 1 for allowed actions. For several dimensions it is a tuple of one mask each, or those concatenated, or a list
        of B such masks. Raises InputError if a shape is wrong, or if a mask allows no action.
        """
        if not 0 <= epsilon <= 1:
            raise InputError(f"`epsilon` is a probability, from 0 to 1. Received: {epsilon}.")
        seen, alone = self._read(observation)
        allowed = None if mask is None else self._read_mask(mask, len(seen), alone)
        explores = self.rng.random(len(seen)) < epsilon if epsilon > 0 else None
        if explores is not None and explores.all():
            action = self.choices.random(self.rng, len(seen), allowed)
        else:
            action = self.choices.greedy(self._values(seen), allowed)
            if explores is not None:
                explores = explores.reshape(-1, *(1 for _ in self.choices.shape))
                action = np.where(explores, self.choices.random(self.rng, len(seen), allowed), action)
        own = self._actions.own(action)
        if not alone:
            return own
        return int(own[0]) if own.ndim == 1 and own.dtype.kind in "iu" else own[0]

    def q_values(self, observation: Any) -> np.ndarray:
        """The values [S] for one observation, or [B, S] for B: float32.

        S = A: of all actions, in their order. If the dimensions of actions are factored (`choices.factored`), S is the sum
        of `choices.sizes`: of all choices in the first dimension, then in the second, and so on. Then the value of an
        action is the mean of one value of each dimension.
        """
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

    def choose(self, seen: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Greedy actions [n] or [n, D], counted from 0, for [n, *frames.observation_shape] as `Environments` yields them."""
        return self.choices.greedy(self._values(seen), mask)

    def _read(self, observation: Any) -> tuple[np.ndarray, bool]:
        """[B, *frames.observation_shape], and whether it was one observation alone."""
        return self._frames.take_stacks(observation) if self._stacks else self._frames.take(observation)

    def _read_mask(self, mask: Any, count: int, alone: bool) -> np.ndarray:
        masks = [mask] if alone else mask
        if len(masks) != count:
            raise InputError(f"`mask` must hold one mask for each of {count} observations. Received: {len(masks)}.")
        try:
            read = [self._actions.read_mask(each) for each in masks]
        except ValueError as error:
            raise InputError(
                f"`mask` must be True or 1 for each action of {self.action_space} that is allowed. Received: {error}."
            ) from None
        allowed = np.array(read, np.bool_).reshape(count, self.choices.total)
        if not self.choices.leaves_any(allowed).all():
            raise InputError("`mask` must leave at least one action. Received: one that is False for all.")
        return allowed

    def _frame(self, observation: Any) -> np.ndarray:
        """The frame of one observation, or [B, ...] of B."""
        frames, alone = self._frames.take(observation)
        return frames[0] if alone else frames

    def _itself(self, observation: Any) -> Any:
        return observation if self.observation_shape is None else np.asarray(observation)
