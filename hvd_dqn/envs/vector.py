"""Makes, calls and closes Gymnasium's vector environments."""

import contextlib
import difflib
import functools
import importlib
import re
import threading
import traceback
import warnings
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from hvd_dqn.envs import worker_processes
from hvd_dqn.envs.actions import ActionMap, ActionSettings
from hvd_dqn.envs.spaces import check_observations
from hvd_dqn.envs.wrappers import EnvFailure, RecordedEnv, make, one_line
from hvd_dqn.errors import InputError


def build(
    id: str,
    copies: int,
    kwargs: dict[str, Any],
    vectorization: str,
    first_index: int,
    actions: ActionSettings | None = None,
) -> tuple[VectorEnv, ActionMap]:
    """A vector of `copies` environments, and what the agent's actions mean in it.

    Raises InputError if it cannot be made, or if DQN cannot learn its spaces.
    """
    spec, actions = find_spec(id), actions or ActionSettings()
    try:
        native, own = None, spec.vector_entry_point is not None and not spec.additional_wrappers
        if own and vectorization == "auto" and copies > 1:  # a single copy is faster without a vector class
            native = _native(id, spec, copies, kwargs)
        if native is not None:
            action_map = ActionMap(id, native.single_action_space, actions)
            if action_map.numbers is native.single_action_space:
                check_observations(id, native.single_observation_space)
                return native, action_map
            native.close()  # it takes other actions than the agent's numbers
        makers = [functools.partial(make, spec, kwargs, first_index + i, actions) for i in range(copies)]
        with contextlib.ExitStack() as failing:
            made: list[RecordedEnv] = []
            for maker in makers[:1] if vectorization == "async" else makers:
                made.append(maker())
                failing.callback(made[-1].close)
                if len(made) == 1:
                    check_observations(id, made[0].observation_space)
            if vectorization == "async":
                failing.close()
                return worker_processes.start(makers), made[0].action_map
            # copy=False avoids a deep copy: `Frames` copies or converts every array anyway.
            vector = SyncVectorEnv(
                [functools.partial(_identity, copy) for copy in made],
                copy=False,
                autoreset_mode=AutoresetMode.SAME_STEP,
            )
            failing.pop_all()
            return vector, made[0].action_map
    except InputError:
        raise
    except Exception as error:
        raise refusal(id, kwargs, error) from error


def _identity(copy: gymnasium.Env) -> gymnasium.Env:
    return copy


def _native(id: str, spec: EnvSpec, copies: int, kwargs: dict[str, Any]) -> VectorEnv | None:
    """The environment's own vector class; None if it cannot take `kwargs` or does not declare how it resets."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium warns of a missing autoreset mode, checked below
            vector = gymnasium.make_vec(spec, copies, vectorization_mode="vector_entry_point", **kwargs)
    except TypeError:
        return None
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
        return vector
    vector.close()
    return None


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


def find_spec(id: str) -> EnvSpec:
    """Gymnasium's specification of `id`; `module:EnvId-v0` imports `module` first."""
    module, _, name = id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
                raise InputError(
                    f"There is no module `{error.name}` to import for the environment `{id}`. "
                    "Install it, or put its folder on PYTHONPATH."
                ) from error
            raise InputError(
                f"The module `{module}` of the environment `{id}` cannot be imported: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
    try:
        return gymnasium.spec(name)
    except (gymnasium.error.VersionNotFound, gymnasium.error.DeprecatedEnv) as error:
        raise InputError(f"There is no environment `{id}`. {one_line(error)}") from error
    except gymnasium.error.Error as error:
        known = {key.lower(): key for key in gymnasium.registry}
        close = [known[key] for key in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)]
        prefix = f"{module}:" if module else ""
        nearest = f" Nearest: {', '.join(f'`{prefix}{key}`' for key in close)}." if close else ""
        other = "" if module else " If another package registers it, write `package:EnvId-v0`."
        raise InputError(f"There is no environment `{id}`.{nearest}{other}") from error


def refusal(id: str, kwargs: dict[str, Any], error: Exception) -> InputError:
    """The error for an environment that could not be made: the reason and the way out, in one line."""
    text = one_line(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if isinstance(error, ImportError | gymnasium.error.DependencyNotInstalled):
        if "box2d" in text.lower():
            return InputError(f"The environment `{id}` needs Box2D: pip install 'gymnasium[box2d]'")
        if isinstance(error, ModuleNotFoundError):
            return InputError(f"The environment `{id}` needs the package `{error.name}`, which is not installed.")
        return InputError(f"The environment `{id}` needs a package that is not installed: {text}")
    if unknown and unknown[1] in kwargs:
        return InputError(f"The environment `{id}` takes no argument `{unknown[1]}`. Received: --env.kwargs {kwargs}.")
    return InputError(f"The environment `{id}` cannot be made with arguments {kwargs}: {type(error).__name__}: {text}")
