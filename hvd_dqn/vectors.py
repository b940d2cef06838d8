"""Makes, ends and saves Gymnasium's vector environments: one rank's copies, or the environment's own vector class."""

import contextlib
import difflib
import functools
import importlib
import re
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from hvd_dqn import workers
from hvd_dqn.copies import PROBE_SECONDS, PROBE_STEPS, global_generators_kept, line, make, plain
from hvd_dqn.errors import InputError


def build(id: str, copies: int, kwargs: dict[str, Any], vectorization: str, first_index: int) -> VectorEnv:
    """The copies in Gymnasium's vector environment, whose spaces DQN can learn; InputError where that cannot be."""
    spec = find(id)
    try:
        native, own = None, spec.vector_entry_point is not None and not spec.additional_wrappers
        if own and vectorization == "auto" and copies > 1:  # a single copy is stepped sooner without arrays around it
            native = _native(id, spec, copies, kwargs)
        if native is not None:
            check_spaces(id, native.single_observation_space, native.single_action_space)
            return native
        makers = [functools.partial(make, spec, kwargs, first_index + i) for i in range(copies)]
        with contextlib.ExitStack() as failing:
            made = []
            for maker in makers[:1] if vectorization == "async" else makers:
                made.append(maker())
                failing.callback(made[-1].close)
                if len(made) == 1:
                    check_spaces(id, made[0].observation_space, made[0].action_space)
            if vectorization == "async":
                failing.close()
                return workers.start(makers)
            # copy=False saves a deep copy: each array is copied or converted here anyway.
            vector = SyncVectorEnv(
                [functools.partial(_identity, copy) for copy in made],
                copy=False,
                autoreset_mode=AutoresetMode.SAME_STEP,
            )
            failing.pop_all()
            return vector
    except InputError:
        raise
    except Exception as error:
        raise refusal(id, kwargs, error) from error


def _identity(copy: gymnasium.Env) -> gymnasium.Env:
    return copy


def _native(id: str, spec: EnvSpec, copies: int, kwargs: dict[str, Any]) -> VectorEnv | None:
    """The environment's own vector class; None where it cannot take `kwargs` or does not say how it resets."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is decided here: a missing autoreset mode
            vector = gymnasium.make_vec(spec, copies, vectorization_mode="vector_entry_point", **kwargs)
    except TypeError:
        return None
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        package = getattr(error, "name", None)
        missing = f"the package `{package}`, which is not installed" if package else f"a missing package: {line(error)}"
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
    """Whether it is the environment's own vector class."""
    return not isinstance(vector, SyncVectorEnv | AsyncVectorEnv)


def end(vector: VectorEnv, seconds: float) -> None:
    """Closes all copies, whatever that raises, and leaves them after `seconds`."""
    if isinstance(vector, AsyncVectorEnv):
        workers.end(vector, seconds)
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


def attributes(vector: VectorEnv) -> dict[str, Any]:
    """What tells where an environment's own vector class stands: arrays, and what `json` can write."""
    found = vars(vector.unwrapped)
    numbers = {name: value for name, value in found.items() if value is None or type(value) in (bool, int, float)}
    generators = {
        name: plain(value.bit_generator.state)
        for name, value in found.items()
        if isinstance(value, np.random.Generator)
    }
    arrays = {
        f"vector.{name}": np.array(value, order="C")
        for name, value in found.items()
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject
    }
    return {"vector": {"numbers": numbers, "generators": generators}, **arrays}


def set_attributes(vector: VectorEnv, state: Mapping[str, Any]) -> None:
    """Takes over what `attributes` returned; the vector has been reset before. Raises Exception where it cannot."""
    mine = vars(vector.unwrapped)
    arrays = {k.removeprefix("vector."): v for k, v in state.items() if k.startswith("vector.")}
    for name, value in {**arrays, **state["vector"]["numbers"]}.items():
        if name not in mine:
            raise KeyError(name)
        setattr(vector.unwrapped, name, np.array(value)[()] if isinstance(value, np.ndarray) else value)
    for name, value in state["vector"]["generators"].items():
        mine[name].bit_generator.state = value


def probe(vector: VectorEnv) -> bool:
    """Whether an environment's own vector class comes to stand where it stood when its attributes are set.

    Afterwards it must be reset with a seed.
    """
    before = attributes(vector)
    space: Any = vector.single_action_space
    actions = space.start + np.random.default_rng(0).integers(space.n, size=(2, PROBE_STEPS, vector.num_envs))

    def play(part: np.ndarray) -> list[bytes]:
        steps = [vector.step(action)[:4] for action in part]
        return [np.array(value).tobytes() for step in steps for value in step]

    try:
        with global_generators_kept():
            began = time.monotonic()
            vector.reset(seed=1)
            play(actions[0])
            if time.monotonic() - began > PROBE_SECONDS:
                return False
            there = attributes(vector)
            future = play(actions[1])
            vector.reset(seed=2)
            play(actions[0])
            set_attributes(vector, there)
            return future == play(actions[1])
    except Exception:
        return False
    finally:
        with contextlib.suppress(Exception):
            set_attributes(vector, before)


def find(id: str) -> EnvSpec:
    """Gymnasium's record of `id`; `module:EnvId-v0` imports `module` first."""
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
                f"{type(error).__name__}: {line(error)}"
            ) from error
    try:
        return gymnasium.spec(name)
    except (gymnasium.error.VersionNotFound, gymnasium.error.DeprecatedEnv) as error:
        raise InputError(f"There is no environment `{id}`. {line(error)}") from error
    except gymnasium.error.Error as error:
        known = {key.lower(): key for key in gymnasium.registry}
        close = [known[key] for key in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)]
        prefix = f"{module}:" if module else ""
        nearest = f" Nearest: {', '.join(f'`{prefix}{key}`' for key in close)}." if close else ""
        other = "" if module else " One that another package registers is written `package:EnvId-v0`."
        raise InputError(f"There is no environment `{id}`.{nearest}{other}") from error


def check_spaces(id: str, observation: gymnasium.Space, action: gymnasium.Space) -> None:
    """Raises InputError unless observations are one Box of at most three axes or Discrete, and actions Discrete."""
    wrapper = "register an id of your own whose entry point wraps it in"
    if not isinstance(action, spaces.Discrete):
        kind = "continuous" if isinstance(action, spaces.Box) else type(action).__name__
        raise InputError(
            f"The environment `{id}` has {kind} actions, and DQN needs a Discrete action space. Received: {action}. "
            f"Take another environment, or {wrapper} gymnasium.wrappers.DiscretizeAction."
        )
    if not isinstance(observation, spaces.Box | spaces.Discrete):
        kind = {"Dict": "dictionary", "Tuple": "tuple"}.get(name := type(observation).__name__, name)
        raise InputError(
            f"The environment `{id}` has {kind} observations, and hvd_dqn needs one Box or Discrete. "
            f"Received: {observation}. To flatten them, {wrapper} gymnasium.wrappers.FlattenObservation."
        )
    if len(observation.shape or ()) > 3:
        raise InputError(
            f"The observations of `{id}` must be [D], [H, W] or [H, W, C]. Received: a shape of {observation.shape}. "
            f"To change it, {wrapper} gymnasium.wrappers.ReshapeObservation."
        )


def refusal(id: str, kwargs: dict[str, Any], error: Exception) -> InputError:
    """Says in one line why an environment could not be made, and the way out."""
    text = line(error)
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
