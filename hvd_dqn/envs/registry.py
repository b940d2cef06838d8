"""Finds the specification of an environment by its id, and says what is missing where there is none."""

import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium
from gymnasium.envs import registration
from gymnasium.envs.registration import EnvSpec

from hvd_dqn.errors import InputError

# Packages name a function that registers their environments in one of these. Gymnasium 1.0 and later read neither.
ENTRY_POINTS = ("gymnasium.envs", "gymnasium.envs.__root__")


class Package(NamedTuple):
    """A package whose environments are known by the beginning of their ids."""

    begins: str  # a regular expression
    install: str  # what pip installs
    module: str  # importing it registers the environments


PACKAGES = (
    Package(r"ALE/|\w+NoFrameskip-v\d", "ale-py", "ale_py"),
    Package("MinAtar/", "minatar", "minatar"),
    Package("MiniGrid-|BabyAI-", "minigrid", "minigrid"),
    Package("MiniWorld-", "miniworld", "miniworld"),
    Package(
        "(highway|merge|roundabout|parking|intersection|racetrack|exit|two-way|u-turn|lane-keeping)-",
        "highway-env",
        "highway_env",
    ),
    Package("Sepsis/", "icu-sepsis", "icu_sepsis"),
    Package("Panda(Reach|Push|Slide|PickAndPlace|Stack|Flip)", "panda-gym", "panda_gym"),
    Package(
        "Fetch(Reach|Push|Slide|PickAndPlace)|Hand(Reach|Manipulate)|AntMaze|PointMaze|Adroit|FrankaKitchen",
        "gymnasium-robotics",
        "gymnasium_robotics",
    ),
    Package("Meta-World/", "metaworld", "metaworld"),
    Package("procgen_gym/", "procgen-gym", "procgen_gym"),
    Package("(stocks|forex)-", "gym-anytrading", "gym_anytrading"),
    Package("sardine/", "sardine-rec", "sardine"),
    Package("FlappyBird-", "flappy-bird-gymnasium", "flappy_bird_gymnasium"),
    Package("dm_control/", "'shimmy[dm-control]'", "shimmy"),
)


def find_spec(id: str) -> EnvSpec:
    """Gymnasium's specification of `id`; `module:EnvId-v0` imports `module` first.

    Without a module, packages are asked that register environments by an entry point or are in `PACKAGES`. Raises
    InputError with the nearest ids and, if it is known, the package to install.
    """
    module, _, name = id.rpartition(":")
    known, broken = _package_of(name), list[str]()
    if module:
        _import(module, id)
        if name not in gymnasium.registry:
            _register_by_function(module)
    elif name not in gymnasium.registry:
        broken = _load_entry_points(name)
        if name not in gymnasium.registry and known and importlib.util.find_spec(known.module):
            _import(known.module, id)
    try:
        return gymnasium.spec(name)
    except gymnasium.error.Error as error:
        raise InputError(_not_found(id, module, name, known, broken, error)) from error


def newest(spec: EnvSpec) -> str | None:
    """The id of a newer version of the same environment, if there is one."""
    version = registration.find_highest_version(spec.namespace, spec.name)
    if version is None or spec.version is None or version <= spec.version:
        return None
    return registration.get_env_id(spec.namespace, spec.name, version)


def hush_old_gym() -> None:
    """Old `gym` prints five lines about itself when it is imported, in every process. Takes them away beforehand."""
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("gym_notices.notices").notices.clear()


def _package_of(name: str) -> Package | None:
    return next((package for package in PACKAGES if re.match(package.begins, name, re.IGNORECASE)), None)


def _import(module: str, id: str) -> ModuleType:
    hush_old_gym()
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            package = next((p for p in PACKAGES if p.module == module.partition(".")[0]), None)
            install = (
                f"Install it: pip install {package.install}"
                if package
                else "Install it, or put its folder on PYTHONPATH"
            )
            raise InputError(
                f"There is no module `{error.name}` to import for the environment `{id}`. {install}."
            ) from error
        reason = " ".join(str(error).split())
        raise InputError(
            f"The module `{module}` of the environment `{id}` cannot be imported: {type(error).__name__}: {reason}"
        ) from error


def _register_by_function(module: str) -> None:
    """Calls `register_envs()` of the module, or of its submodule `gym`, as MinAtar needs it."""
    for place in (module, f"{module}.gym"):
        with contextlib.suppress(ImportError):
            register: Any = getattr(importlib.import_module(place), "register_envs", None)
            # Gymnasium has a function of this name, which takes a module and does nothing.
            if callable(register) and not inspect.signature(register).parameters:
                register()
                return


def _load_entry_points(name: str) -> list[str]:
    """Registers environments of installed packages until `name` is one of them. Returns what went wrong, in words."""
    points = [point for group in ENTRY_POINTS for point in importlib.metadata.entry_points(group=group)]
    broken = []
    for point in sorted(points, key=lambda point: not name.startswith(f"{point.name}/")):
        if trouble := _load_entry_point(point):
            broken.append(trouble)
        if name in gymnasium.registry:
            break
    return broken


@functools.cache
def _load_entry_point(point: importlib.metadata.EntryPoint) -> str:
    """Once, because Gymnasium warns of what is registered twice. Returns what went wrong, in words."""
    hush_old_gym()
    alone = point.name == "__root__" or point.group.endswith("__root__")
    try:
        register = point.load()
        # The entry point's name is the namespace of its ids.
        with contextlib.nullcontext() if alone else registration.namespace(point.name):
            if callable(register):
                register()
    except Exception as error:
        return f"{point.value} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _not_found(id: str, module: str, name: str, known: Package | None, broken: list[str], error: Exception) -> str:
    parts = [f"There is no environment `{id}`."]
    if isinstance(error, gymnasium.error.VersionNotFound | gymnasium.error.DeprecatedEnv):
        return " ".join([*parts, *str(error).split()])
    by_lower = {key.lower(): key for key in gymnasium.registry}
    close = [by_lower[key] for key in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)]
    installed = known is not None and importlib.util.find_spec(known.module) is not None
    if known and not installed and not module:
        parts.append(f"The package {known.install} has it: pip install {known.install}.")
    elif close:
        parts.append(f"Nearest: {', '.join(f'`{module}:{key}`' if module else f'`{key}`' for key in close)}.")
    if not module and not known:
        parts.append("If another package registers it, write `package:EnvId-v0`.")
    return " ".join(parts + [f"Of the installed packages, {trouble}." for trouble in broken])
