"""Saves and restores the state of environments within their episodes, if that is possible."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv

from hvd_dqn.envs.vector import call, is_native
from hvd_dqn.envs.wrappers import (
    PROBE_SECONDS,
    PROBE_STEPS,
    EnvFailure,
    as_bytes,
    jsonable,
    preserved_global_generators,
)


class Restorer(Protocol):
    """Saves and restores the E copies of a vector environment. All but `state` raise EnvFailure if a copy fails."""

    def probe(self) -> bool:
        """Finds out whether copies can be restored, with about a hundred steps and some resets of the first copy.

        Afterwards the copies must be reset with seeds.
        """

    def record(self) -> None:
        """Makes copies record what `state` needs, from their next reset on."""

    def state(self) -> dict[str, Any]:
        """Arrays and JSON values."""

    def restore(self, state: Mapping[str, Any], shows: Callable[[int, Any], bool]) -> np.ndarray:
        """Returns [E] bool: which copies are now in the saved state. The others must be reset.

        Reset all copies first. `shows(i, observation)` tells whether copy i was saved with this observation.
        """


def restorer_for(vector: VectorEnv, first_index: int) -> Restorer:
    """The restorer for `vector`. The global number of its first copy is `first_index`."""
    return AttributeRestorer(vector) if is_native(vector) else TraceRestorer(vector, first_index)


class TraceRestorer:
    """Restores copies that are stepped one by one. Each replays its episode, and the result is compared."""

    def __init__(self, vector: VectorEnv, first_index: int) -> None:
        self._first_index, self._action_shape = first_index, vector.single_action_space.shape or ()
        self._call = functools.partial(call, vector, first_index)

    def probe(self) -> bool:
        return any(self._call("call", "probe", self._first_index))

    def record(self) -> None:
        self._call("set_attr", "records", True)

    def state(self) -> dict[str, Any]:
        try:
            traces = self._call("call", "trace")
        except EnvFailure:  # the next step will fail too, and report it
            return {}
        none = np.empty((0, *self._action_shape), np.int64)
        actions = [none if trace is None else trace.pop("actions") for trace in traces]
        counts = [len(each) for each in actions]
        return {"traces": list(traces), "counts": counts, "actions": np.concatenate(actions)}

    def restore(self, state: Mapping[str, Any], shows: Callable[[int, Any], bool]) -> np.ndarray:
        if "traces" not in state:
            return np.zeros(len(state["frame"]), np.bool_)
        actions = np.split(state["actions"], np.cumsum(state["counts"])[:-1])
        traces = [t and {**t, "actions": a} for t, a in zip(state["traces"], actions, strict=True)]
        self._call("set_attr", "saved_trace", traces)
        arrived = self._call("call", "retrace")
        return np.array(
            [
                place is not None and shows(i, place[0]) and place[1] == state["returns"][i]
                for i, place in enumerate(arrived)
            ]
        )


class AttributeRestorer:
    """Restores an environment's own vector class by setting its plain attributes."""

    def __init__(self, vector: VectorEnv) -> None:
        self._vector = vector

    def probe(self) -> bool:
        before = self.state()
        space: Any = self._vector.single_action_space
        actions = np.random.default_rng(0).integers(space.n, size=(2, PROBE_STEPS, self._vector.num_envs))
        actions += space.start
        try:
            with preserved_global_generators():
                began = time.monotonic()
                self._vector.reset(seed=1)
                self._play(actions[0])
                if time.monotonic() - began > PROBE_SECONDS:
                    return False
                there = self.state()
                future = self._play(actions[1])
                self._vector.reset(seed=2)
                self._play(actions[0])
                self._set(there)
                return future == self._play(actions[1])
        except Exception:
            return False
        finally:
            with contextlib.suppress(Exception):
                self._set(before)

    def _play(self, actions: np.ndarray) -> list[bytes]:
        steps = [self._vector.step(action)[:4] for action in actions]
        return [as_bytes(value) for step in steps for value in step]

    def record(self) -> None:
        """Does nothing: attributes can be read at any time."""

    def state(self) -> dict[str, Any]:
        found = vars(self._vector.unwrapped)
        numbers = {name: value for name, value in found.items() if value is None or type(value) in (bool, int, float)}
        generators = {
            name: jsonable(value.bit_generator.state)
            for name, value in found.items()
            if isinstance(value, np.random.Generator)
        }
        arrays = {
            f"vector.{name}": np.array(value, order="C")
            for name, value in found.items()
            if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject
        }
        return {"vector": {"numbers": numbers, "generators": generators}, **arrays}

    def restore(self, state: Mapping[str, Any], shows: Callable[[int, Any], bool]) -> np.ndarray:
        try:
            self._set(state)
        except Exception:
            return np.zeros(self._vector.num_envs, np.bool_)
        return np.ones(self._vector.num_envs, np.bool_)

    def _set(self, state: Mapping[str, Any]) -> None:
        """Raises Exception if it cannot."""
        mine = vars(self._vector.unwrapped)
        arrays = {k.removeprefix("vector."): v for k, v in state.items() if k.startswith("vector.")}
        for name, value in {**arrays, **state["vector"]["numbers"]}.items():
            if name not in mine:
                raise KeyError(name)
            setattr(self._vector.unwrapped, name, np.array(value)[()] if isinstance(value, np.ndarray) else value)
        for name, value in state["vector"]["generators"].items():
            mine[name].bit_generator.state = value
