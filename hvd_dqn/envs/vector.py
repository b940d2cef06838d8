"""Makes, calls and closes Gymnasium's vector environments."""

import contextlib
import functools
import re
import threading
import traceback
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from hvd_dqn.envs import worker_processes
from hvd_dqn.envs.actions import ActionMap, ActionSettings
from hvd_dqn.envs.conformity import DISPLAY, NO_DISPLAY, OLD_GYM
from hvd_dqn.envs.registry import find_spec, hush_old_gym, newest
from hvd_dqn.envs.spaces import check_kinds, check_observations
from hvd_dqn.envs.wrappers import EnvFailure, RecordedEnv, make, one_line
from hvd_dqn.envs.wrapping import Wrapper
from hvd_dqn.errors import InputError

# What Gymnasium's own environments need, and the extra that installs it.
EXTRAS = {"Box2D": "box2d", "MuJoCo": "mujoco", "pygame": "classic-control", "jax": "jax"}


class Built(NamedTuple):
    """A vector of copies."""

    vector: VectorEnv
    action_map: ActionMap  # what the agent's actions mean in it
    notes: list[str]  # what a person should know of how it came about


def build(
    id: str,
    copies: int,
    kwargs: dict[str, Any],
    vectorization: str,
    first_index: int,
    wrappers: Sequence[Wrapper] = (),
    actions: ActionSettings | None = None,
) -> Built:
    """A vector of `copies` environments. Raises InputError if it cannot be made, or if DQN cannot learn its spaces.

    The environment's own vector class is taken if it is asked for by name ("native"), or under "auto" if it shows the
    same spaces as the environment itself: otherwise training and evaluation would see two environments.
    """
    spec, actions = find_spec(id), actions or ActionSettings()
    newer = newest(spec)
    notes = [f"`{spec.id}` is an old version: the newest is `{newer}`."] if newer else []
    try:
        if vectorization == "native":
            return Built(*_native_by_name(id, spec, copies, kwargs, wrappers, actions), notes)
        # A single copy is faster without a vector class.
        if vectorization == "auto" and copies > 1 and spec.vector_entry_point is not None:
            native, why_not = _native_if_alike(id, spec, copies, kwargs, wrappers, actions)
            if native is not None:
                return Built(*native, notes)
            notes.append(f"The vector class of `{id}` is not used: {why_not}.")
        return Built(*_one_by_one(id, spec, copies, kwargs, vectorization, first_index, wrappers, actions), notes)
    except InputError:
        raise
    except Exception as error:
        raise refusal(id, kwargs, error, newer) from error


def _one_by_one(
    id: str,
    spec: EnvSpec,
    copies: int,
    kwargs: dict[str, Any],
    vectorization: str,
    first_index: int,
    wrappers: Sequence[Wrapper],
    actions: ActionSettings,
) -> tuple[VectorEnv, ActionMap]:
    makers = [functools.partial(make, spec, kwargs, first_index + i, wrappers, actions) for i in range(copies)]
    with contextlib.ExitStack() as failing:
        made: list[RecordedEnv] = []
        for maker in makers[:1] if vectorization == "async" else makers:
            made.append(maker())
            failing.callback(made[-1].close)
            if len(made) == 1:
                check_observations(id, made[0].observation_space)
        if vectorization == "async":
            failing.close()
            return worker_processes.start(makers, shows_first=first_index == 0), made[0].action_map
        # copy=False avoids a deep copy: `Frames` copies or converts every array anyway.
        vector = SyncVectorEnv(
            [functools.partial(_identity, copy) for copy in made],
            copy=False,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        failing.pop_all()
        return vector, made[0].action_map


def _identity(copy: gymnasium.Env) -> gymnasium.Env:
    return copy


def _native_if_alike(
    id: str, spec: EnvSpec, copies: int, kwargs: dict[str, Any], wrappers: Sequence[Wrapper], actions: ActionSettings
) -> tuple[tuple[VectorEnv, ActionMap] | None, str]:
    """The environment's own vector class, or None and the reason why it cannot stand for the environment itself."""
    if wrappers or spec.additional_wrappers:
        return None, "it takes no wrappers"
    native, why_not = _native(id, spec, copies, kwargs)
    if native is None:
        return None, why_not
    with contextlib.ExitStack() as failing:
        failing.callback(native.close)
        with contextlib.closing(make(spec, kwargs, 1, (), actions)) as plain:
            check_observations(id, plain.observation_space)
            for what, shown, expected in (
                ("observations", native.single_observation_space, plain.observation_space),
                ("actions", native.single_action_space, plain.action_map.space),
            ):
                if shown != expected:
                    return None, (
                        f"it has other {what}, {short(shown)} instead of {short(expected)}, and would train and evaluate "
                        "on two environments. --env.vectorization native takes it for both"
                    )
        action_map = ActionMap(id, native.single_action_space, actions)
        if action_map.numbers is not native.single_action_space:
            return None, "it takes other actions than the agent's numbers"
        failing.pop_all()
    return (native, action_map), ""


def _native_by_name(
    id: str, spec: EnvSpec, copies: int, kwargs: dict[str, Any], wrappers: Sequence[Wrapper], actions: ActionSettings
) -> tuple[VectorEnv, ActionMap]:
    if spec.vector_entry_point is None:
        raise InputError(
            f"--env.vectorization native needs a vector class, and `{id}` has none of its own. Use auto, sync or async."
        )
    if wrappers or spec.additional_wrappers:
        raise InputError(
            f"The vector class of `{id}` takes no wrappers. Leave out --env.wrappers, or use --env.vectorization sync."
        )
    native, why_not = _native(id, spec, copies, kwargs)
    if native is None:
        raise InputError(f"The vector class of `{id}` cannot be used: {why_not}. Use --env.vectorization sync.")
    with contextlib.ExitStack() as failing:
        failing.callback(native.close)
        check_kinds(id, native.single_observation_space, native.single_action_space)
        check_observations(id, native.single_observation_space)
        action_map = ActionMap(id, native.single_action_space, actions)
        if action_map.numbers is not native.single_action_space:
            raise InputError(
                f"The vector class of `{id}` takes {short(native.single_action_space)} actions, not the agent's numbers. "
                "Use --env.vectorization sync."
            )
        failing.pop_all()
    return native, action_map


def _native(id: str, spec: EnvSpec, copies: int, kwargs: dict[str, Any]) -> tuple[VectorEnv | None, str]:
    """The environment's own vector class, or None and the reason: it refuses `kwargs`, or hides how it resets."""
    hush_old_gym()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium warns of a missing autoreset mode, checked below
            vector = gymnasium.make_vec(spec, copies, vectorization_mode="vector_entry_point", **deepcopy(kwargs))
    except TypeError as error:
        return None, f"it cannot be made with {kwargs} ({one_line(error)})"
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        package = getattr(error, "name", None)
        missing = (
            f"the package `{package}`, which is not installed" if package else f"a missing package: {one_line(error)}"
        )
        raise InputError(
            f"The vector class of the environment `{id}` needs {missing}. "
            "Install it, or step the copies one by one with --env.vectorization sync."
        ) from error
    mode = vector.metadata.get("autoreset_mode")
    if mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, "NextStep", "SameStep"):
        return vector, ""
    vector.close()
    return None, f"it must reset by itself, in the same step or the next. Its autoreset_mode is {mode}"


def is_native(vector: VectorEnv) -> bool:
    """Whether `vector` is the environment's own vector class."""
    return not isinstance(vector, SyncVectorEnv | AsyncVectorEnv)


def call(vector: VectorEnv, first_index: int, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of `vector`. Raises EnvFailure; `first_index` is the global number of the first copy."""
    try:
        return getattr(vector, method)(*args, **kwargs)
    except EnvFailure:
        raise
    except Exception as error:
        if vector.closed:
            raise
        if isinstance(vector, AsyncVectorEnv):
            raise worker_processes.failure(vector, error, first_index) from error
        text = "".join(traceback.format_exception(error)).rstrip()
        numbers = range(first_index, first_index + vector.num_envs)
        raise EnvFailure(numbers, "failed", f"{type(error).__name__}: {one_line(error)}", text) from error


def close_vector(vector: VectorEnv, seconds: float) -> None:
    """Closes all copies, ignores their errors, and gives up after `seconds`."""
    if isinstance(vector, AsyncVectorEnv):
        worker_processes.end(vector, seconds)
        return

    def close_each() -> None:
        for each in vector.envs if isinstance(vector, SyncVectorEnv) else [vector]:
            with contextlib.suppress(Exception):
                each.close()

    if not vector.closed:
        closing = threading.Thread(target=close_each, daemon=True)
        closing.start()
        closing.join(seconds)
        vector.closed = True


def refusal(id: str, kwargs: dict[str, Any], error: Exception, newer: str | None = None) -> InputError:
    """The error for an environment that could not be made: the reason and the way out, in one line."""
    text = one_line(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if isinstance(error, ImportError | gymnasium.error.DependencyNotInstalled):
        if newer:
            return InputError(f"The environment `{id}` is an old version, which cannot be made here: use `{newer}`.")
        for name, extra in EXTRAS.items():
            if name.lower() in text.lower():
                return InputError(f"The environment `{id}` needs {name}: pip install 'gymnasium[{extra}]'")
        if isinstance(error, ModuleNotFoundError) and error.name:
            return InputError(f"The environment `{id}` needs the package `{error.name}`, which is not installed.")
        if not DISPLAY.search(text):
            return InputError(f"The environment `{id}` needs a package that is not installed: {text}")
    if unknown and unknown[1] in kwargs:
        return InputError(f"The environment `{id}` takes no argument `{unknown[1]}`. Received: --env.kwargs {kwargs}.")
    if isinstance(error, TypeError) and "Gym is incompatible with Gymnasium" in text:
        return InputError(f"The environment `{id}` is one of old Gym: its class must be a gymnasium.Env. {OLD_GYM}")
    cure = f" {NO_DISPLAY}" if DISPLAY.search(text) else ""
    return InputError(
        f"The environment `{id}` cannot be made with arguments {kwargs}: {type(error).__name__}: {text}"
        + (f".{cure}" if cure and not text.endswith(".") else cure)
    )


def short(space: gymnasium.Space) -> str:
    """A space in a few words; a box by its shape and type."""
    if isinstance(space, gymnasium.spaces.Box):
        return f"{space.shape} {space.dtype} from {space.low.min():g} to {space.high.max():g}"
    text = " ".join(str(space).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
