"""Keeps ranks in lockstep: broadcasts the chief's weights, checks for drift, and spreads an error of one rank to all."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from hvd_dqn.errors import InputError, JobError
from hvd_dqn.ranks.world import World

T = TypeVar("T")


class BroadcastHook:
    """Makes all ranks start from the chief's weights: at the start, after a restore and whenever ranks join."""

    def __init__(self, world: World, variables: Mapping[str, Any]) -> None:
        self._world, self._variables = world, list(variables.values())

    def __call__(self) -> None:
        self._world.broadcast(self._variables)


def check_drift(
    world: World, variables: Mapping[str, Any], when: str, arrays: Mapping[str, np.ndarray] | None = None
) -> None:
    """Compares a checksum of every variable and of `arrays` over ranks. Raises JobError, on all ranks, if any differ.

    The message names the ranks whose values differ from the chief's. `when` tells the point of the run.
    """
    values = {f"{name} ({variable.name})": variable.numpy() for name, variable in variables.items()} | dict(
        arrays or {}
    )
    sums = np.array([zlib.crc32(value.tobytes()) for value in values.values()], np.float64)
    largest = world.max(np.concatenate([sums, -sums]))
    if np.array_equal(largest[: len(sums)], -largest[len(sums) :]):
        return
    everyone = np.stack(world.gather(sums))  # [size, variables]
    differs = everyone != everyone[0]
    ranks = ", ".join(str(rank) for rank in np.flatnonzero(differs.any(axis=1)))
    odd = differs.any(axis=0)
    names = ", ".join(name for name, is_odd in zip(values, odd, strict=True) if is_odd)
    raise JobError(
        f"The ranks have drifted apart {when}: on rank {ranks} the variables {names} differ from rank 0's. "
        "Something changed weights without averaging; continue from the last checkpoint with --resume."
    )


def check_equal(world: World, facts: Mapping[str, str], cure: str) -> None:
    """Compares `facts`, each a name in words and its value, over ranks. Raises InputError, on all ranks, if any differ."""
    chief, *others = world.gather(dict(facts))
    for rank, theirs in enumerate(others, start=1):
        for name, value in chief.items():
            if theirs[name] != value:
                raise InputError(
                    f"All ranks must have the same {name}. Received: {value} on rank 0, {theirs[name]} on rank {rank}. {cure}"
                )


def in_step(world: World, action: Callable[[], T]) -> T:
    """Does `action` on every rank. A collective. If some ranks raise InputError, all ranks raise the first one's."""
    complaint = None
    try:
        result = action()
    except InputError as error:
        complaint = str(error)
    for message in world.gather(complaint):
        if message is not None:
            raise InputError(message)
    return result
