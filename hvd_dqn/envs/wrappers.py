"""Wraps one copy of an environment: records its episode, so that it can be restored later, and names its failures."""

import contextlib
import copy
import json
import random
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from hvd_dqn.envs.actions import ActionMap, ActionSettings, NumberedActions, mask_method
from hvd_dqn.envs.conformity import Fault, fault_of_error, fault_of_observation, fault_of_reset, fault_of_step
from hvd_dqn.envs.registry import hush_old_gym
from hvd_dqn.envs.spaces import check_kinds
from hvd_dqn.envs.wrapping import Wrapper, wrap

# The most actions that are recorded of an episode, 40 B each in a list; an array of 8 B each is half as fast. Longer
# episodes are not restored, which would also take long. Atari's longest has 27,000 steps.
MOST_ACTIONS = 250_000
PROBE_STEPS = 10
# The probe ends if an environment takes longer for a reset and PROBE_STEPS steps.
PROBE_SECONDS = 5.0
TRIAL_STEPS = 3  # before training; the interface shows in the first, and a wrong array often in the second


class EnvFailure(Exception):
    """Copies that can no longer be stepped: their numbers, what happened and why, and the traceback, maybe empty.

    `cure` is what to do where a restart cannot help; without it, a restart may.
    """

    numbers: Sequence[int]
    did: str
    why: str
    trace: str
    cure: str

    def __init__(
        self, numbers: "Sequence[int] | EnvFailure", did: str = "", why: str = "", trace: str = "", cure: str = ""
    ) -> None:
        # AsyncVectorEnv raises a worker's error as the only argument of a new error of the same class.
        told: tuple[Any, ...] = numbers.args if isinstance(numbers, EnvFailure) else (numbers, did, why, trace, cure)
        super().__init__(*told)
        self.numbers, self.did, self.why, self.trace, self.cure = told


class RecordedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The copy with this global number. It records a *trace* of its episode.

    The trace holds the seed of the last seeded reset, the state of the generator `np_random` just before the episode's
    reset, the actions since, and the generator's state now. To retrace means to repeat all that. It leads to the same
    state only if nothing else influences the environment. So the caller compares the result with what was saved.
    """

    records = False  # from its next reset on
    # For evaluations. After its episode it takes no steps until it is reset with a seed. Meanwhile it returns how the
    # episode began. So a vector's own reset costs nothing, and neither does a copy that has nothing left to play.
    rests = False
    resting = False
    masked = False  # whether `info["action_mask"]` is [S] bool at every reset and step
    saved_trace: dict[str, Any] | None = None  # the trace for `retrace`

    def __init__(self, env: gymnasium.Env, number: int, action_map: ActionMap) -> None:
        super().__init__(env)
        self.action_map, self._mask_method = action_map, mask_method(env)
        self._mask: np.ndarray | None = None  # [S] the current one
        self._number = number
        self._seed: int | None = None
        self._before: dict[str, Any] | None = None  # the generator's state; None if the episode began with the seed
        self._actions: list[Any] = []
        self._room = 0  # for actions; without room left the trace is incomplete
        self._base = env.unwrapped
        # A changed shape would be broadcast without a word, or be an error of NumPy in which no copy is named.
        self._shape = env.observation_space.shape if isinstance(env.observation_space, spaces.Box) else None
        self._beginning: tuple[Any, dict[str, Any]] = (None, {})  # of the episode, for a copy that `rests`

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self.rests and seed is None:
            self.resting = True
            return self._beginning
        self.resting = False
        self._actions = []
        self._room = MOST_ACTIONS if self.records else 0
        if seed is not None:
            self._seed, self._before = seed, None
        elif self.records:
            self._before = self._generator_state()
        try:
            began = self.env.reset(seed=seed, options=options or None)  # a vector's partial reset leaves {}
        except Exception as error:
            raise self._failure(error) from error
        if fault := fault_of_reset(began):
            raise self._broken(fault)
        self._check_shape(began[0], "at a reset")
        if self.masked:
            began = (began[0], self._masked_info(began[1]))
        if self.rests:
            self._beginning = copy.deepcopy(began)
        return began

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self.resting:
            observation, info = self._beginning
            return observation, 0.0, False, False, info
        try:
            result = self.env.step(action)
        except Exception as error:
            raise self._failure(error) from error
        if type(result) is not tuple or len(result) != 5:
            raise self._broken(fault_of_step(result))
        if self.masked:
            result = (*result[:4], self._masked_info(result[4], is_terminal=bool(result[2])))
        if self._shape is not None and getattr(result[0], "shape", None) != self._shape:
            self._check_shape(result[0], "in a step")
        actions = self._actions
        if len(actions) < self._room:
            actions.append(action)
        if result[2] or result[3]:
            # An environment may write the first observation of the next episode into the same array.
            return (copied(result[0]), *result[1:])
        return result

    def _masked_info(self, info: dict[str, Any], is_terminal: bool = False) -> dict[str, Any]:
        """`info` with the mask as the agent reads it. All actions are allowed at a terminal state, where none follows."""
        if is_terminal:
            self._mask = np.ones(self.action_map.choices.total, np.bool_)
        else:
            try:
                given = self._given_mask(info)
                if given is None:
                    raise ValueError("expected an action mask, as at the first reset, received none")
                self._mask = self.action_map.read_mask(given)
            except Exception as error:  # also of the environment's own method
                raise self._failure(error) from error
        return {**info, "action_mask": self._mask}

    def _given_mask(self, info: Mapping[str, Any]) -> Any:
        mask = info.get("action_mask")
        return self._mask_method() if mask is None and self._mask_method is not None else mask

    def finds_mask(self, number: int) -> bool | str:
        """Whether a reset gives a mask, or what is wrong with it. Only copy `number` tries it; others return False.

        Afterwards the copy must be reset with a seed.
        """
        if number != self._number:
            return False
        try:
            with preserved_global_generators():
                given = self._given_mask(self.reset(seed=1)[1])
        except Exception:
            return False  # the first reset of the run will fail too, and report it
        try:
            return given is not None and bool(self.action_map.read_mask(given).size)
        except ValueError as error:
            return str(error)

    def trace(self) -> dict[str, Any] | None:
        """The trace: an array of actions and JSON values. None if it is incomplete."""
        if len(self._actions) == self._room or self._seed is None:
            return None
        return {
            "seed": self._seed,
            "before": jsonable(self._before),
            "actions": np.array(self._actions, np.int64).reshape(-1, *self.action_map.choices.shape),
            "now": jsonable(self._generator_state()),
        }

    def retrace(self) -> tuple[Any, float] | None:
        """The last observation and the return at the end of the trace `saved_trace`; None if the states differ."""
        saved_trace, self.saved_trace = self.saved_trace, None
        if saved_trace is None:
            return None
        try:
            observation, _ = self.reset(seed=saved_trace["seed"])
            if saved_trace["before"] is not None:
                if saved_trace["before"]:
                    self._base.np_random.bit_generator.state = saved_trace["before"]
                observation, _ = self.reset()
            total = 0.0
            for action in saved_trace["actions"]:
                observation, reward, terminated, truncated, _ = self.step(action)
                total += float(reward)
                if terminated or truncated:
                    return None
            return (copied(observation), total) if jsonable(self._generator_state()) == saved_trace["now"] else None
        except Exception:
            return None

    def try_out(self, number: int) -> Fault | None:
        """What a reset and a few steps show that is against Gymnasium's interface or the environment's own space.

        Only copy `number` tries it. Whatever else fails is left to the training, which names rank and step. Afterwards
        the copy must be reset with a seed.
        """
        if number != self._number:
            return None
        space = copy.deepcopy(self.action_space)  # the environment may draw from its own
        space.seed(0)
        with preserved_global_generators(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Gymnasium's checker says the same in several lines
            try:
                observation, _ = self.reset(seed=1)
                fault = fault_of_observation(self.observation_space, observation, "at a reset")
                for _ in range(TRIAL_STEPS):
                    if fault:
                        break
                    observation, _, terminated, truncated, _ = self.step(space.sample())
                    fault = fault_of_observation(self.observation_space, observation, "in a step")
                    if terminated or truncated:
                        break
                return fault
            except EnvFailure as failure:
                return Fault(failure.did, failure.why, failure.cure) if failure.cure else None
            except Exception:
                return None

    def probe(self, number: int) -> bool:
        """Whether retracing repeats an episode exactly. Only copy `number` tries it; others return False.

        Afterwards the copy must be reset with a seed.
        """
        if number != self._number:
            return False
        kept, self.records = self.records, True
        try:
            with preserved_global_generators():
                return self._probe()
        except Exception:
            return False  # some environments refuse a reset within an episode
        finally:
            self.records = kept

    def _probe(self) -> bool:
        action_map, rng = self.action_map, np.random.default_rng(0)
        first = int(self.action_space.start) if isinstance(self.action_space, spaces.Discrete) else 0
        parts = first + action_map.choices.random(rng, 4 * PROBE_STEPS).reshape(
            4, PROBE_STEPS, *action_map.choices.shape
        )
        began = time.monotonic()
        self.reset(seed=1)
        self._play(parts[0])
        if time.monotonic() - began > PROBE_SECONDS:
            return False
        self.reset()  # so that a generator's state, not the seed, begins the episode
        self._play(parts[1])
        self.saved_trace = self.trace()
        future = self._play(parts[2]) + self._begin() + self._play(parts[3])
        self.reset(seed=2)
        self._play(parts[0])
        return self.retrace() is not None and future == self._play(parts[2]) + self._begin() + self._play(parts[3])

    def _play(self, actions: np.ndarray) -> list[bytes]:
        """What the environment returns for `actions`, or others if the mask forbids them. Resets it if an episode ends."""
        seen = []
        for action in actions:
            if self._mask is not None:
                action = self._allowed(action)
            observation, reward, terminated, truncated, _ = self.step(action)
            ended = bool(terminated), bool(truncated)
            seen += [as_bytes(observation), np.float64(reward).tobytes(), bytes(ended)]
            if any(ended):
                seen += self._begin()
        return seen

    def _allowed(self, action: Any) -> Any:
        """An action that the mask allows; which one follows from `action`."""
        rng, start = np.random.default_rng(np.abs(np.atleast_1d(action))), getattr(self.action_space, "start", 0)
        assert self._mask is not None
        return start + self.action_map.choices.random(rng, 1, self._mask[None])[0]

    def _begin(self) -> list[bytes]:
        return [as_bytes(self.reset()[0])]

    def _generator_state(self) -> dict[str, Any]:
        """{} if there is none."""
        generator = getattr(self._base, "_np_random", None)  # reading `np_random` would make one
        return dict(generator.bit_generator.state) if isinstance(generator, np.random.Generator) else {}

    def _check_shape(self, observation: Any, when: str) -> None:
        if self._shape is not None and np.shape(observation) != self._shape:
            raise self._broken(fault_of_observation(self.observation_space, observation, when))

    def _broken(self, fault: Fault | None) -> EnvFailure:
        assert fault is not None
        return EnvFailure([self._number], fault.did, fault.why, cure=fault.cure)

    def _failure(self, error: Exception) -> EnvFailure:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        raiser = last and last.tb_frame.f_locals.get("self")
        if fault := fault_of_error(error, isinstance(raiser, gymnasium.Wrapper)):
            return self._broken(fault)
        inner = error.__traceback__
        while inner is not None and inner.tb_frame.f_locals.get("self") is not self._base:
            inner = inner.tb_next  # skips the frames of Gymnasium's wrappers
        text = "".join(traceback.format_exception(type(error), error, inner or error.__traceback__)).rstrip()
        return EnvFailure([self._number], "failed", f"{type(error).__name__}: {one_line(error)}", text)


def make(
    spec: EnvSpec,
    kwargs: dict[str, Any],
    number: int,
    wrappers: Sequence[Wrapper] = (),
    actions: ActionSettings | None = None,
) -> RecordedEnv:
    """The copy with this global number, in `wrappers`. Every copy of a job is made here, or by a native vector class."""
    hush_old_gym()
    # Gymnasium's checker warns about wrong observations and rewards. One checked copy in the whole job is enough.
    checked = {"disable_env_checker": None if number == 0 else True}
    # Some environments change the lists and mappings that they are made with.
    env = wrap(gymnasium.make(spec, **{**checked, **copy.deepcopy(kwargs)}), wrappers)
    check_kinds(spec.id, env.observation_space, env.action_space)
    action_map = ActionMap(spec.id, env.action_space, actions or ActionSettings())
    if action_map.numbers is not env.action_space:
        env = NumberedActions(env, action_map)
    return RecordedEnv(env, number, action_map)


def copied(observation: Any) -> Any:
    """A copy: of an array, or of each one in a dictionary or tuple."""
    if isinstance(observation, Mapping):
        return {key: copied(value) for key, value in observation.items()}
    if isinstance(observation, tuple):
        return tuple(copied(value) for value in observation)
    return np.array(observation)


def as_bytes(observation: Any) -> bytes:
    """All numbers of an observation, to compare it with others."""
    if isinstance(observation, Mapping):
        return b"".join(as_bytes(observation[key]) for key in sorted(observation))
    if isinstance(observation, tuple):
        return b"".join(as_bytes(value) for value in observation)
    return np.asarray(observation).tobytes()


@contextlib.contextmanager
def preserved_global_generators() -> Iterator[None]:
    """Leaves Python's and NumPy's global generators as they were, for environments that draw from them."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def jsonable(state: Mapping[str, Any] | None) -> Any:
    """The state as `json` would read it back: some generators keep arrays."""
    return json.loads(json.dumps(state, default=lambda array: array.tolist()))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
