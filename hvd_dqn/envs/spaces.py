"""Which observation spaces DQN can learn: those made of numbers and states. For actions see `actions.py`."""

import math

import gymnasium
from gymnasium import spaces

from hvd_dqn.errors import InputError

Path = tuple[str | int, ...]  # the keys that lead to a leaf


def check_kinds(id: str, observation: gymnasium.Space, action: gymnasium.Space) -> None:
    """Raises InputError unless both are spaces of Gymnasium."""
    for what, space in (("observation", observation), ("action", action)):
        if not isinstance(space, spaces.Space):
            raise InputError(
                f"The {what} space of `{id}` must be one of gymnasium.spaces. Received: {space!r} of "
                f"{type(space).__module__}, as old Gym has it."
            )


def leaves(space: gymnasium.Space, path: Path = ()) -> list[tuple[Path, gymnasium.Space]]:
    """The spaces within a Dict or Tuple and their keys, in the order of Gymnasium's `flatten`."""
    if isinstance(space, spaces.Dict):
        inner: list[tuple[str | int, gymnasium.Space]] = [*space.spaces.items()]
    elif isinstance(space, spaces.Tuple):
        inner = list(enumerate(space.spaces))
    else:
        return [(path, space)]
    return [leaf for key, each in inner for leaf in leaves(each, (*path, key))]


def name_of(path: Path) -> str:
    return ".".join(map(str, path))


def check_observations(id: str, space: gymnasium.Space) -> None:
    """Raises InputError unless `space` is a Box of at most three axes, Discrete, MultiDiscrete or MultiBinary.

    Or a Dict or Tuple of those, also nested.
    """
    found = leaves(space)
    if not found:
        raise InputError(
            f"The environment `{id}` observes nothing. Received: {space}. Expected: at least one Box or Discrete."
        )
    unfit = [(path, leaf) for path, leaf in found if not _is_usable(leaf)]
    if not unfit:
        return
    path, leaf = unfit[0]
    what = f"observations `{name_of(path)}`" if path else "observations"
    if isinstance(leaf, spaces.Box | spaces.MultiBinary) and leaf.shape:
        shape = leaf.shape
        cure = "Leave out the empty one in a wrapper: --env.wrappers module:Class."
        if 0 not in shape:
            flat = f"[{shape[0]}, {shape[1]}, {math.prod(shape[2:])}]"
            cure = f"To change it: --env.wrappers '[{{ReshapeObservation: {{shape: {flat}}}}}]'."
        raise InputError(f"The {what} of `{id}` must be [D], [H, W] or [H, W, C]. Received: a shape of {shape}. {cure}")
    usable = sorted({str(path[0]) for path, leaf in found if path} - {str(path[0]) for path, leaf in unfit if path})
    if usable:
        keys = ", ".join(usable)
        cure = f"Drop it: --env.wrappers '[{{FilterObservation: {{filter_keys: [{keys}]}}}}]'"
        if type(leaf).__module__.startswith("minigrid."):
            cure += ", or keep the image alone: --env.wrappers '[minigrid.wrappers:ImgObsWrapper]'"
    else:
        cure = "Turn it into numbers in a wrapper: --env.wrappers '[module:Class]'"
    raise InputError(
        f"The {what} of `{id}` cannot be learned from: expected Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or "
        f"Tuple of these. Received: {type(leaf).__name__}. {cure}."
    )


def _is_usable(space: gymnasium.Space) -> bool:
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return len(space.shape) <= 3 and 0 not in space.shape
    return isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
