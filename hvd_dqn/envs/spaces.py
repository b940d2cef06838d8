"""Which observation spaces DQN can learn: one Box or Discrete. For actions see `actions.py`."""

import gymnasium
from gymnasium import spaces

from hvd_dqn.errors import InputError


def check_observations(id: str, observation: gymnasium.Space) -> None:
    """Raises InputError unless observations are one Box of at most three axes or Discrete."""
    wrapper = "register your own id, whose entry point wraps it in"
    if not isinstance(observation, spaces.Box | spaces.Discrete):
        kind = {"Dict": "dictionary", "Tuple": "tuple"}.get(name := type(observation).__name__, name)
        raise InputError(
            f"The environment `{id}` has {kind} observations, but hvd_dqn needs one Box or Discrete. "
            f"Received: {observation}. To flatten them, {wrapper} gymnasium.wrappers.FlattenObservation."
        )
    if len(observation.shape or ()) > 3:
        raise InputError(
            f"The observations of `{id}` must be [D], [H, W] or [H, W, C]. Received: a shape of {observation.shape}. "
            f"To change it, {wrapper} gymnasium.wrappers.ReshapeObservation."
        )
