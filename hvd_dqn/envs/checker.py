"""Runs Gymnasium's own checker on one environment, and collects what it says."""

import contextlib
import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env

from hvd_dqn.envs.registry import find_spec, hush_old_gym
from hvd_dqn.envs.wrappers import one_line, preserved_global_generators


def findings(id: str, kwargs: Mapping[str, Any]) -> list[str]:
    """What Gymnasium's checker warns of, in its order, and the error at which it gives up. Opens no window.

    The environment itself is checked, without wrappers. Raises whatever the environment raises when it is made.
    """
    hush_old_gym()
    gave_up = list[str]()
    with (
        contextlib.closing(
            gymnasium.make(find_spec(id), disable_env_checker=True, **copy.deepcopy(dict(kwargs)))
        ) as env,
        warnings.catch_warnings(record=True) as warned,
        preserved_global_generators(),
    ):
        warnings.simplefilter("always")
        try:
            check_env(env.unwrapped, skip_render_check=True)
        except Exception as failed:
            gave_up.append(f"it gave up: {type(failed).__name__}: {one_line(failed)}")
    said = [_plain(str(each.message)) for each in warned if "gymnasium" in each.filename]
    return list(dict.fromkeys(said + gave_up))


def has_time_limit(id: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether Gymnasium truncates its episodes; the environment may do so by itself."""
    return "max_episode_steps" in kwargs or find_spec(id).max_episode_steps is not None


def _plain(text: str) -> str:
    """Without the colours of a terminal and the word that tells the level."""
    return re.sub(r"\x1b\[[\d;]*m", "", " ".join(text.split())).removeprefix("WARN: ").removeprefix("ERROR: ")
