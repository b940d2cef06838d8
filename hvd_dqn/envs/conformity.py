"""Compares what an environment returns with what it declares, and knows the way out of the usual faults."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

OLD_GYM = (
    "That is the interface of old Gym, and a restart would not help. Your own environment: return what Gymnasium expects "
    "(gymnasium.farama.org, migration guide). One that is registered with old gym: pip install 'shimmy[gym-v21]', then "
    "--env.id shimmy:GymV21Environment-v0 --env.kwargs '{env_id: ITS_ID}'."
)
OWN_SPACE = "Correct the environment or its observation_space; a restart would not help."
NO_DISPLAY = (
    "Without a display: SDL_VIDEODRIVER=dummy for pygame, MUJOCO_GL=egl or osmesa for MuJoCo, or `xvfb-run -a` in front of "
    "the command; and leave render_mode human out of --env.kwargs."
)
DISPLAY = re.compile(
    r"(?i)no available video device|video system not initialized|open display|DISPLAY (environment )?variable|NoSuchDisplay|"
    r"cannot connect to \"|X11:|GLX|\bEGL\b|GLFW|gladLoadGL|OpenGL platform|libGL"
)


class Fault(NamedTuple):
    """What an environment does against its interface, and what to do about it: no restart can help."""

    did: str
    why: str
    cure: str


def fault_of_reset(result: Any) -> Fault | None:
    """What is wrong with the value that `reset` returned."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        return None
    received = f"{len(result)} values" if isinstance(result, tuple) else f"only {_kind(result)}"
    if isinstance(result, tuple) and len(result) == 2:
        received = f"no dictionary as info, but {_kind(result[1])}"
    return Fault("broke Gymnasium's interface", f"reset must return (observation, info), received {received}", OLD_GYM)


def fault_of_step(result: Any) -> Fault | None:
    """What is wrong with the value that `step` returned."""
    if isinstance(result, tuple) and len(result) == 5:
        return None
    received = f"{len(result)} values" if isinstance(result, tuple) else f"only {_kind(result)}"
    return Fault(
        "broke Gymnasium's interface",
        f"step must return (observation, reward, terminated, truncated, info), received {received}",
        OLD_GYM,
    )


def fault_of_error(error: Exception, by_wrapper: bool) -> Fault | None:
    """What an exception tells of the interface. `by_wrapper`: whether a wrapper raised it, not the environment."""
    text = " ".join(str(error).split())
    if unknown := re.search(r"reset\(\) got an unexpected keyword argument '(seed|options)'", text):
        return Fault(
            "broke Gymnasium's interface",
            f"reset must take seed and options by keyword, and takes no `{unknown[1]}`",
            OLD_GYM,
        )
    if isinstance(error, AssertionError) and re.search(
        r"`env.reset\(\)` was not a dictionary", text
    ):  # Gymnasium's checker
        return fault_of_reset((None, None))
    if by_wrapper and "unpack" in text and (wanted := re.search(r"expected ([25])\b", text)):
        received = re.search(r"got (\d+)", text)
        what = f"{received[1]} values" if received else "another number of values"
        if wanted[1] == "5":
            return fault_of_step(tuple(range(int(received[1])))) if received else fault_of_step(None)
        return Fault("broke Gymnasium's interface", f"reset must return (observation, info), received {what}", OLD_GYM)
    if DISPLAY.search(text):
        return Fault("needs a display", f"{type(error).__name__}: {text}", NO_DISPLAY)
    return None


def fault_of_observation(space: gymnasium.Space, value: Any, when: str) -> Fault | None:
    """Whether an observation has another structure, shape or type than `space` declares."""
    wrong = wrong_form(space, value)
    return wrong and Fault("broke its own observation space", f"{wrong} {when}", OWN_SPACE)


def wrong_form(space: gymnasium.Space, value: Any, name: str = "observation") -> Any:
    """What differs in structure, shape or type, in words; "" if nothing does."""
    if isinstance(space, spaces.Dict):
        if not isinstance(value, Mapping):
            return f"expected {name} to be a dictionary, received {_kind(value)}"
        if set(value) != set(space.spaces):
            return f"expected {name} with the keys {sorted(space.spaces)}, received {sorted(map(str, value))}"
        return _first(wrong_form(inner, value[key], f"{name}[{key!r}]") for key, inner in space.spaces.items())
    if isinstance(space, spaces.Tuple):
        if not isinstance(value, Sequence) or len(value) != len(space.spaces):
            return f"expected {name} to be a tuple of {len(space.spaces)}, received {_kind(value)}"
        return _first(wrong_form(inner, value[i], f"{name}[{i}]") for i, inner in enumerate(space.spaces))
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        try:
            array = np.asarray(value)
        except ValueError:
            return f"expected {name} to be an array, received {_kind(value)}"
        if array.shape != (space.shape or ()):
            return f"expected {name} of shape {space.shape or ()}, received {array.shape}"
        if not np.can_cast(array.dtype, space.dtype or np.int64, "same_kind") and not _is_whole(array, space):
            return f"expected {name} of type {space.dtype}, received {array.dtype}"
        return ""
    return "" if space.contains(value) else f"expected {name} in {space}, received {_kind(value)}"


def outside(space: gymnasium.Space, values: Any, name: str = "observation") -> str:
    """The first of a batch of observations that lies outside `space`, in words; "" if all lie inside."""
    if isinstance(space, spaces.Dict):
        return _first(outside(inner, values[key], f"{name}[{key!r}]") for key, inner in space.spaces.items())
    if isinstance(space, spaces.Tuple):
        return _first(outside(inner, values[i], f"{name}[{i}]") for i, inner in enumerate(space.spaces))
    if isinstance(space, spaces.Box):
        low, high = space.low, space.high
    elif isinstance(space, spaces.Discrete):
        low, high = np.asarray(space.start), np.asarray(space.start + space.n - 1)
    elif isinstance(space, spaces.MultiDiscrete):
        low, high = space.start, space.start + space.nvec - 1
    elif isinstance(space, spaces.MultiBinary):
        low, high = np.zeros(space.shape, np.int8), np.ones(space.shape, np.int8)
    else:
        return ""
    values = np.asarray(values)
    beyond = (values < low) | (values > high)
    if not np.count_nonzero(beyond):
        return ""
    place = tuple(np.argwhere(beyond)[0].tolist())
    inner_place = place[values.ndim - np.ndim(low) :]
    where = f" at index {list(inner_place)}" if inner_place else ""
    least, most = np.asarray(low)[inner_place], np.asarray(high)[inner_place]
    return f"{name} {values[place]}{where} lies outside the declared {least} to {most}"


def _is_whole(array: np.ndarray, space: gymnasium.Space) -> bool:
    """Integers of another size, as NumPy's, in a space of integers: vector classes take them one by one."""
    return not isinstance(space, spaces.Box) and array.dtype.kind in "iub"


def _first(texts: Any) -> str:
    return next((text for text in texts if text), "")


def _kind(value: Any) -> str:
    return f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
