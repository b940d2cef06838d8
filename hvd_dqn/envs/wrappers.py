"""One copy of an environment: remembers how its episode came about, leads back to it, and tells how it failed."""

import contextlib
import json
import random
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

# Actions remembered of one episode, 40 B each: a list is twice as fast as an array of 8 B each. A longer episode is not
# led back to, which would take long, too. Atari's longest has 27,000 steps.
LONGEST = 250_000
PROBE_STEPS = 10
# An environment that takes longer for a reset and PROBE_STEPS steps is not probed any further.
PROBE_SECONDS = 5.0


class Failure(Exception):
    """Copies that can no longer be stepped: their numbers, what they did and why, and the traceback as text or ""."""

    numbers: Sequence[int]
    did: str
    why: str
    trace: str

    def __init__(self, numbers: "Sequence[int] | Failure", did: str = "", why: str = "", trace: str = "") -> None:
        # AsyncVectorEnv raises what came from a worker as the only argument of another of its class.
        told: tuple[Any, ...] = numbers.args if isinstance(numbers, Failure) else (numbers, did, why, trace)
        super().__init__(*told)
        self.numbers, self.did, self.why, self.trace = told


class Copy(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The copy with this global number.

    Its *trace* is how its episode came about: the seed it was last reset with, the state of its generator `np_random`
    just before the episode's reset, and the actions since; and, to know the place again, the generator's state now. To
    retrace it is to do all that once more. This leads to the same place only where nothing else matters to the
    environment, so whoever retraces compares where he has arrived.
    """

    remembers = False  # from its next reset on
    goal: dict[str, Any] | None = None  # the trace for `retrace`

    def __init__(self, env: gymnasium.Env, number: int) -> None:
        super().__init__(env)
        self._number = number
        self._seed: int | None = None
        self._before: dict[str, Any] | None = None  # the generator's state; None where the episode began with the seed
        self._actions: list[Any] = []
        self._room = 0  # for actions; a full one does not tell the whole episode
        self._base = env.unwrapped

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._actions = []
        self._room = LONGEST if self.remembers else 0
        if seed is not None:
            self._seed, self._before = seed, None
        elif self.remembers:
            self._before = self._generator_state()
        try:
            return self.env.reset(seed=seed, options=options or None)  # a vector's partial reset leaves {}
        except Exception as error:
            raise self._failure(error) from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            result = self.env.step(action)
        except Exception as error:
            raise self._failure(error) from error
        actions = self._actions
        if len(actions) < self._room:
            actions.append(action)
        if result[2] or result[3]:
            # An environment may write the first observation of the next episode into the same array.
            return (np.array(result[0]), *result[1:])
        return result

    def trace(self) -> dict[str, Any] | None:
        """All but the actions, an array, is what `json` can write."""
        if len(self._actions) == self._room or self._seed is None:
            return None
        return {
            "seed": self._seed,
            "before": plain(self._before),
            "actions": np.array(self._actions, np.int64),
            "now": plain(self._generator_state()),
        }

    def retrace(self) -> tuple[np.ndarray, float] | None:
        """The last observation and the return at the end of the trace `goal`; None where it led elsewhere."""
        goal, self.goal = self.goal, None
        if goal is None:
            return None
        try:
            observation, _ = self.reset(seed=goal["seed"])
            if goal["before"] is not None:
                if goal["before"]:
                    self._base.np_random.bit_generator.state = goal["before"]
                observation, _ = self.reset()
            total = 0.0
            for action in goal["actions"]:
                observation, reward, terminated, truncated, _ = self.step(action)
                total += float(reward)
                if terminated or truncated:
                    return None
            return (np.array(observation), total) if plain(self._generator_state()) == goal["now"] else None
        except Exception:
            return None

    def probe(self, number: int) -> bool:
        """Whether what comes after a trace is the same once more. Tried out in the copy of this number; else False.

        Afterwards the copy must be reset with a seed.
        """
        if number != self._number:
            return False
        kept, self.remembers = self.remembers, True
        try:
            with global_generators_kept():
                return self._probe()
        except Exception:
            return False  # some environments do not let themselves be reset within an episode, for instance
        finally:
            self.remembers = kept

    def _probe(self) -> bool:
        space: Any = self.action_space
        parts = space.start + np.random.default_rng(0).integers(space.n, size=(4, PROBE_STEPS))
        began = time.monotonic()
        self.reset(seed=1)
        self._play(parts[0])
        if time.monotonic() - began > PROBE_SECONDS:
            return False
        self.reset()  # so that a generator's state, not the seed, begins the episode
        self._play(parts[1])
        self.goal = self.trace()
        future = self._play(parts[2]) + self._begin() + self._play(parts[3])
        self.reset(seed=2)
        self._play(parts[0])
        return self.retrace() is not None and future == self._play(parts[2]) + self._begin() + self._play(parts[3])

    def _play(self, actions: np.ndarray) -> list[bytes]:
        """What `actions` lead to, through ends of episodes."""
        seen = []
        for action in actions:
            observation, reward, terminated, truncated, _ = self.step(action)
            ended = bool(terminated), bool(truncated)
            seen += [np.asarray(observation).tobytes(), np.float64(reward).tobytes(), bytes(ended)]
            if any(ended):
                seen += self._begin()
        return seen

    def _begin(self) -> list[bytes]:
        return [np.asarray(self.reset()[0]).tobytes()]

    def _generator_state(self) -> dict[str, Any]:
        """{} where there is none."""
        generator = getattr(self._base, "_np_random", None)  # `np_random` would make one
        return dict(generator.bit_generator.state) if isinstance(generator, np.random.Generator) else {}

    def _failure(self, error: Exception) -> Failure:
        inner = error.__traceback__
        while inner is not None and inner.tb_frame.f_locals.get("self") is not self._base:
            inner = inner.tb_next  # Gymnasium's wrappers tell nothing
        text = "".join(traceback.format_exception(type(error), error, inner or error.__traceback__)).rstrip()
        return Failure([self._number], "failed", f"{type(error).__name__}: {line(error)}", text)


def make(spec: EnvSpec, kwargs: dict[str, Any], number: int) -> Copy:
    # Gymnasium's checker warns about wrong observations and rewards; in one copy of the whole job that is enough.
    return Copy(gymnasium.make(spec, **{"disable_env_checker": None if number == 0 else True, **kwargs}), number)


@contextlib.contextmanager
def global_generators_kept() -> Iterator[None]:
    """Leaves Python's and NumPy's global generators as they were, for environments that draw from them."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def plain(state: Mapping[str, Any] | None) -> Any:
    """As `json` would read it: some generators keep arrays."""
    return json.loads(json.dumps(state, default=lambda array: array.tolist()))


def line(error: BaseException) -> str:
    return " ".join(str(error).split())
