"""Where a vector environment's copies stand within their episodes: whether that can be told, told, and gone back to."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv

from hvd_dqn.envs.vector import ask, is_native
from hvd_dqn.envs.wrappers import PROBE_SECONDS, PROBE_STEPS, Failure, global_generators_kept, plain


class Places(Protocol):
    """Of the E copies of one vector environment. Each method but `state` raises Failure where a copy fails."""

    def probe(self) -> bool:
        """Finds out, by about a hundred steps and some resets of the first copy, whether copies can be put back.

        Afterwards they must be reset with seeds.
        """

    def remember(self) -> None:
        """Has copies remember what `state` tells, from their next reset on."""

    def state(self) -> dict[str, Any]:
        """Arrays, and what `json` can write."""

    def put_back(self, state: Mapping[str, Any], frames: Callable[[Sequence[Any]], np.ndarray]) -> np.ndarray:
        """Returns [E] bool: which copies now stand where `state` tells; the others must be reset.

        They have been reset before. `frames` makes frames of observations, to compare with `state["frame"]`.
        """


def places_of(vector: VectorEnv, first_index: int) -> Places:
    """The copies' places, told in the way that suits `vector`; its first copy has the global number `first_index`."""
    return Attributes(vector) if is_native(vector) else Traces(vector, first_index)


class Traces:
    """Of copies that are stepped one by one: each is led through its episode once more, and compared."""

    def __init__(self, vector: VectorEnv, first_index: int) -> None:
        self._first_index = first_index
        self._ask = functools.partial(ask, vector, first_index)

    def probe(self) -> bool:
        return any(self._ask("call", "probe", self._first_index))

    def remember(self) -> None:
        self._ask("set_attr", "remembers", True)

    def state(self) -> dict[str, Any]:
        try:
            traces = self._ask("call", "trace")
        except Failure:  # the next step will find it, too
            return {}
        actions = [np.empty(0, np.int64) if trace is None else trace.pop("actions") for trace in traces]
        counts = [len(each) for each in actions]
        return {"traces": list(traces), "counts": counts, "actions": np.concatenate(actions)}

    def put_back(self, state: Mapping[str, Any], frames: Callable[[Sequence[Any]], np.ndarray]) -> np.ndarray:
        if "traces" not in state:
            return np.zeros(len(state["frame"]), np.bool_)
        actions = np.split(state["actions"], np.cumsum(state["counts"])[:-1])
        traces = [t and {**t, "actions": a} for t, a in zip(state["traces"], actions, strict=True)]
        self._ask("set_attr", "goal", traces)
        arrived = self._ask("call", "retrace")
        return np.array(
            [
                place is not None
                and frames([place[0]]).tobytes() == state["frame"][i].tobytes()
                and place[1] == state["returns"][i]
                for i, place in enumerate(arrived)
            ]
        )


class Attributes:
    """Of an environment's own vector class: its plain attributes are set once more."""

    def __init__(self, vector: VectorEnv) -> None:
        self._vector = vector

    def probe(self) -> bool:
        before = self.state()
        space: Any = self._vector.single_action_space
        actions = np.random.default_rng(0).integers(space.n, size=(2, PROBE_STEPS, self._vector.num_envs))
        actions += space.start
        try:
            with global_generators_kept():
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
        return [np.array(value).tobytes() for step in steps for value in step]

    def remember(self) -> None:
        """Nothing to be done: attributes are there to be read."""

    def state(self) -> dict[str, Any]:
        found = vars(self._vector.unwrapped)
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

    def put_back(self, state: Mapping[str, Any], frames: Callable[[Sequence[Any]], np.ndarray]) -> np.ndarray:
        try:
            self._set(state)
        except Exception:
            return np.zeros(self._vector.num_envs, np.bool_)
        return np.ones(self._vector.num_envs, np.bool_)

    def _set(self, state: Mapping[str, Any]) -> None:
        """Raises Exception where it cannot."""
        mine = vars(self._vector.unwrapped)
        arrays = {k.removeprefix("vector."): v for k, v in state.items() if k.startswith("vector.")}
        for name, value in {**arrays, **state["vector"]["numbers"]}.items():
            if name not in mine:
                raise KeyError(name)
            setattr(self._vector.unwrapped, name, np.array(value)[()] if isinstance(value, np.ndarray) else value)
        for name, value in state["vector"]["generators"].items():
            mine[name].bit_generator.state = value
