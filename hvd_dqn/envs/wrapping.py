"""Applies wrappers that are given by name, `module:Class` with keyword arguments, to an environment."""

import copy
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from hvd_dqn.errors import InputError, nearest

GYMNASIUMS = "gymnasium.wrappers"  # where a class without a module is looked for
Wrapper = str | Mapping[str, Mapping[str, Any]]  # a class, or {class: {keyword: value}}


def wrap(env: gymnasium.Env, wrappers: Sequence[Wrapper]) -> gymnasium.Env:
    """`env` in these wrappers: the first is the innermost. Raises InputError, and closes `env`, if one cannot be had."""
    try:
        for wrapper in wrappers:
            env = _wrap(env, *named(wrapper))
    except InputError:
        env.close()
        raise
    return env


def named(wrapper: Wrapper) -> tuple[str, dict[str, Any]]:
    """The class's name and the keyword arguments."""
    if isinstance(wrapper, str):
        return wrapper, {}
    ((name, kwargs),) = wrapper.items()
    return name, dict(kwargs)


def described(wrapper: Wrapper) -> str:
    """As it would be called: `ResizeObservation(shape=[84, 84])`."""
    name, kwargs = named(wrapper)
    return name + (f"({', '.join(f'{key}={value!r}' for key, value in kwargs.items())})" if kwargs else "")


def _wrap(env: gymnasium.Env, name: str, kwargs: dict[str, Any]) -> gymnasium.Env:
    found = _class(name)
    accepted = {key: p for key, p in list(inspect.signature(found).parameters.items())[1:] if p.kind != p.VAR_KEYWORD}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(found).parameters.values())
    for key in kwargs:
        if key not in accepted and not takes_any:
            raise InputError(
                f"--env.wrappers: `{name}` takes no argument `{key}`.{nearest(key, accepted)} "
                + (f"It takes: {', '.join(accepted)}." if accepted else "It takes none.")
            )
    missing = [key for key, p in accepted.items() if p.default is p.empty and p.kind != p.VAR_POSITIONAL]
    if lacking := [key for key in missing if key not in kwargs]:
        raise InputError(
            f"--env.wrappers: `{name}` needs {', '.join(f'`{key}`' for key in lacking)}. "
            f"Write: --env.wrappers '[{{{name}: {{{lacking[0]}: ...}}}}]'."
        )
    values = {key: _converted(value, accepted.get(key)) for key, value in copy.deepcopy(kwargs).items()}
    try:
        wrapped = found(env, **values)
    except Exception as error:
        text = " ".join([f"{type(error).__name__}:", *str(error).split()]).removesuffix(":")
        raise InputError(
            f"--env.wrappers: `{described({name: kwargs})}` cannot wrap this environment: {text} "
            f"(observations: {_short(env.observation_space)}; actions: {_short(env.action_space)})."
        ) from error
    if not isinstance(wrapped, gymnasium.Env):
        raise InputError(f"--env.wrappers: `{name}` makes no environment. Received: {type(wrapped).__name__}.")
    return wrapped


def _class(name: str) -> Any:
    module_name, _, inner = name.rpartition(":")
    try:
        module = importlib.import_module(module_name or GYMNASIUMS)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"--env.wrappers: there is no module `{error.name}` to import for `{name}`. "
                "Install it, or put its folder on PYTHONPATH."
            ) from error
        raise InputError(
            f"--env.wrappers: the module of `{name}` cannot be imported: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    wrappers = [each for each in dir(module) if _is_wrapper(getattr(module, each, None))]
    try:
        found = getattr(module, inner)  # Gymnasium's old names raise an error of their own, which names the new ones
    except Exception as error:
        raise InputError(
            f"--env.wrappers: there is no wrapper `{inner}` in {module.__name__}.{nearest(inner, wrappers)}"
            + ("" if module_name else " One of another module is written `module:Class`.")
            + ("" if type(error) is AttributeError and "has no attribute" in str(error) else f" {error}")
        ) from error
    if not _is_wrapper(found):
        raise InputError(
            f"--env.wrappers: `{name}` is no wrapper: expected a subclass of gymnasium.Wrapper, "
            f"received {found!r}.{nearest(inner, wrappers)}"
        )
    return found


def _is_wrapper(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, gymnasium.Wrapper)


def _converted(value: Any, parameter: inspect.Parameter | None) -> Any:
    """A list of YAML as the tuple or array that the parameter's annotation or default asks for."""
    if not isinstance(value, list) or parameter is None:
        return value
    annotation = str(parameter.annotation)
    if "ndarray" in annotation:
        return np.array(value)
    if "tuple" in annotation.lower() or isinstance(parameter.default, tuple):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return value


def _short(space: gymnasium.Space) -> str:
    text = " ".join(str(space).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
