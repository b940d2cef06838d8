"""Which spaces DQN can learn: observations are one Box or Discrete, actions are Discrete."""

import math

import gymnasium
from gymnasium import spaces

from hvd_dqn.errors import InputError


def check_spaces(id: str, observation: gymnasium.Space, action: gymnasium.Space) -> None:
    """Raises InputError unless observations are one Box of at most three axes or Discrete, and actions Discrete."""
    for what, space in (("observation", observation), ("action", action)):
        if not isinstance(space, spaces.Space):
            raise InputError(
                f"The {what} space of `{id}` must be one of gymnasium.spaces. Received: {space!r} of "
                f"{type(space).__module__}, as old Gym has it."
            )
    if not isinstance(action, spaces.Discrete):
        kind = "continuous" if isinstance(action, spaces.Box) else type(action).__name__
        cure = "Name a wrapper of your own that makes them so: --env.wrappers module:Class."
        if isinstance(action, spaces.Box) and action.is_bounded():
            cure = "Cut them into some: --env.wrappers '[{DiscretizeAction: {bins: 3}}]'."
        raise InputError(
            f"The environment `{id}` has {kind} actions, but DQN needs a Discrete action space. Received: {action}. {cure}"
        )
    if not isinstance(observation, spaces.Box | spaces.Discrete):
        kind = {"Dict": "dictionary", "Tuple": "tuple"}.get(name := type(observation).__name__, name)
        raise InputError(
            f"The environment `{id}` has {kind} observations, but hvd_dqn needs one Box or Discrete. "
            f"Received: {observation}. {_flattening(observation)}"
        )
    shape = observation.shape or ()
    if len(shape) > 3:
        raise InputError(
            f"The observations of `{id}` must be [D], [H, W] or [H, W, C]. Received: a shape of {shape}. To change it: "
            f"--env.wrappers '[{{ReshapeObservation: {{shape: [{shape[0]}, {shape[1]}, {math.prod(shape[2:])}]}}}}]'."
        )


def _flattening(space: gymnasium.Space) -> str:
    """How to flatten observations; those of no fixed size, such as texts, are left out."""
    if _is_flat(space):
        return "To flatten them: --env.wrappers FlattenObservation."
    if isinstance(space, spaces.Dict) and (keep := [key for key, inner in space.spaces.items() if _is_flat(inner)]):
        return (
            f"To flatten {' and '.join(keep)}: --env.wrappers '[{{FilterObservation: {{filter_keys: [{', '.join(keep)}]}}}}, "
            "FlattenObservation]'."
        )
    return "Name a wrapper of your own that makes them so: --env.wrappers module:Class."


def _is_flat(space: gymnasium.Space) -> bool:
    """Whether Gymnasium can make one Box of it."""
    try:
        return isinstance(spaces.utils.flatten_space(space), spaces.Box)
    except NotImplementedError:
        return False
