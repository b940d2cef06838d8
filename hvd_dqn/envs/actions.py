"""What the agent's actions, whole numbers from 0, mean in an environment's own space; and its masks.

    space                 the agent's action
    Discrete              its number, counted from 0
    MultiDiscrete,        one number for all dimensions together (*joint*: the product of their sizes), or one in each
    MultiBinary           dimension (*factored*)
    Box                   the same; `bins` numbers in each dimension stand for equally distant values from its lowest to
                          its highest, both included, so that two bins are bang-bang control

A mask is what `info["action_mask"]` holds at resets and steps, Gymnasium's convention, or else what the unwrapped
environment's method `action_mask()` or `action_masks()` returns: 1 for each action that is allowed. For several dimensions
it is a tuple of one mask each, as their spaces' `sample` takes it, or these masks concatenated.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from hvd_dqn.agent.choices import Choices
from hvd_dqn.errors import InputError

# Up to here several dimensions are one choice by default. Chosen by us: an output for each of 128 actions takes half the
# parameters of a hidden layer of 256 x 256, and each is learned from less than 1 % of the transitions.
MOST_JOINT_BY_DEFAULT = 128
MOST_JOINT = 10_000


class ActionSettings(NamedTuple):
    """The settings env.action_bins, agent.factored and env.action_mask."""

    bins: int | None = None
    factored: bool | None = None  # None decides by the number of joint actions
    mask: bool = True  # whether masks are used where there are any


class ActionMap:
    """The agent's actions for `space`, the environment's own. Raises InputError if DQN cannot choose from it."""

    space: gymnasium.Space  # the environment's own
    choices: Choices
    numbers: spaces.Discrete | spaces.MultiDiscrete  # the space of what the environment, made by `make`, takes

    def __init__(self, id: str, space: gymnasium.Space, settings: ActionSettings) -> None:
        self.space = space
        values = _values(id, space, settings.bins)
        self.dimensions = tuple(len(each) for each in values)
        # [D, widest]: what the numbers mean. Shorter dimensions end with zeros.
        self._table = np.zeros((len(values), max(self.dimensions)), space.dtype)
        for row, each in zip(self._table, values, strict=True):
            row[: len(each)] = each
        self._rows = np.arange(len(values))
        factored, joint = settings.factored, math.prod(self.dimensions)
        if factored and len(self.dimensions) == 1:
            raise InputError(
                f"--agent.factored needs actions of several dimensions, but those of `{id}` have one. "
                f"Received: {space}. Leave it out."
            )
        if factored is None:
            factored = len(self.dimensions) > 1 and joint > MOST_JOINT_BY_DEFAULT
        if not factored and joint > MOST_JOINT and len(self.dimensions) > 1:
            raise InputError(
                f"The actions of `{id}` have {joint:,} combinations, but one head chooses among at most {MOST_JOINT:,}. "
                f"Received: {space} with {' x '.join(map(str, self.dimensions))} choices and --agent.factored False. "
                "Choose --agent.factored True, or lower --env.action_bins."
            )
        self.choices = Choices(self.dimensions if factored else (joint,))
        if isinstance(space, spaces.Discrete):
            self.numbers = space
        else:
            self.numbers = spaces.MultiDiscrete(list(self.dimensions)) if factored else spaces.Discrete(joint)

    def own(self, action: np.ndarray) -> np.ndarray:
        """The environment's own actions [..., *space.shape] for the agent's: [...], or [..., D] if factored."""
        if isinstance(self.space, spaces.Discrete):
            return action + int(self.space.start)
        numbers = action if self.choices.factored else np.stack(np.unravel_index(action, self.dimensions), axis=-1)
        return self._table[self._rows, numbers].reshape((*numbers.shape[:-1], *(self.space.shape or ())))

    def read_mask(self, mask: Any) -> np.ndarray:
        """[S] bool of a mask in the environment's own form. Raises ValueError if it has another form."""
        if isinstance(self.space, spaces.Box):
            raise ValueError("a mask of continuous actions, whose values are --env.action_bins'")
        is_split = isinstance(mask, tuple | list) and len(mask) > 0 and np.ndim(mask[0]) > 0
        parts = [np.asarray(part) for part in mask] if is_split else [np.asarray(mask)]
        allowed = np.concatenate([part.ravel() for part in parts])
        sizes = self.dimensions if is_split else (sum(self.dimensions),)
        if tuple(part.size for part in parts) != sizes or allowed.dtype.kind not in "biuf":
            raise ValueError(
                f"a mask of {' + '.join(str(part.size) for part in parts)} values of type {allowed.dtype} for actions "
                f"{self.space}"
            )
        allowed = allowed != 0
        if self.choices.factored or len(self.dimensions) == 1:
            return allowed
        return functools.reduce(np.multiply.outer, np.split(allowed, np.cumsum(self.dimensions)[:-1])).ravel()

    def __str__(self) -> str:
        if len(self.dimensions) == 1:
            return f"one of {self.choices.total:,}"
        same = set(self.dimensions)
        sizes = f"{same.pop()}" if len(same) == 1 else ", ".join(map(str, self.dimensions))
        kind = "each chosen by itself (factored)" if self.choices.factored else f"{self.choices.total:,} joint actions"
        return f"{len(self.dimensions)} dimensions of {sizes} choices, {kind}"


class NumberedActions(gymnasium.ActionWrapper):
    """The environment with the agent's actions.

    `gymnasium.wrappers.DiscretizeAction` takes the centres of bins, so that two of them reach only half of a Box.
    """

    def __init__(self, env: gymnasium.Env, action_map: ActionMap) -> None:
        super().__init__(env)
        self.action_space, self._map = action_map.numbers, action_map

    def action(self, action: Any) -> Any:
        return self._map.own(np.asarray(action))


def mask_method(env: gymnasium.Env) -> Callable[[], Any] | None:
    """The environment's own method that returns its mask, if it has one that needs no argument."""
    for name in ("action_mask", "action_masks"):
        method = getattr(env.unwrapped, name, None)
        if callable(method):
            try:
                inspect.signature(method).bind()
            except (TypeError, ValueError):
                continue
            return method
    return None


def _values(id: str, space: gymnasium.Space, bins: int | None) -> list[np.ndarray]:
    """What the numbers from 0 mean in each dimension of a space."""
    if isinstance(space, spaces.Box):
        return _bins(id, space, bins)
    if bins is not None:
        raise InputError(
            f"--env.action_bins is for continuous actions, but those of `{id}` are whole numbers. Received: {space}. "
            "Leave it out."
        )
    if isinstance(space, spaces.Discrete):
        return [int(space.start) + np.arange(int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        return [start + np.arange(n) for n, start in zip(space.nvec.ravel(), space.start.ravel(), strict=True)]
    if isinstance(space, spaces.MultiBinary):
        return [np.arange(2)] * math.prod(space.shape)
    raise InputError(
        f"The environment `{id}` has {type(space).__name__} actions, but DQN needs Discrete, MultiDiscrete, MultiBinary or "
        f"Box ones. Received: {space}. Change them in a wrapper of your own, gymnasium.wrappers.TransformAction for instance."
    )


def _bins(id: str, space: spaces.Box, bins: int | None) -> list[np.ndarray]:
    if bins is None:
        raise InputError(
            f"The environment `{id}` has continuous actions, and DQN chooses among values: say how many in each dimension, "
            f"for instance --env.action_bins 3, or 2 for the lowest and the highest alone. Received: {space}."
        )
    low, high = space.low.ravel(), space.high.ravel()
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise InputError(
            f"The continuous actions of `{id}` have no finite bounds to place --env.action_bins {bins} between. Received: "
            f"{space}. Give them bounds in a wrapper of your own, gymnasium.wrappers.TransformAction with another Box."
        )
    values = [np.linspace(float(a), float(b), bins) for a, b in zip(low, high, strict=True)]
    if space.dtype is not None and space.dtype.kind in "iu":
        values = [np.rint(each) for each in values]
    return [np.unique(each) for each in values]  # a dimension may have fewer values than bins
