"""One rank's copies of a Gymnasium environment, stepped together; the only file that knows Gymnasium."""

import contextlib
import difflib
import functools
import importlib
import multiprocessing.connection
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from hvd_dqn.errors import InputError, RunError
from hvd_dqn.transition import Transition

# How long worker processes may take to close their environments before they are killed.
CLOSING_SECONDS = 5.0


class Episodes(NamedTuple):
    """The n episodes that ended in one step, in the order of their environments."""

    returns: np.ndarray  # [n] float64: sums of the environment's own rewards, neither scaled nor clipped
    lengths: np.ndarray  # [n] int64: steps


class Environments:
    """E copies of one environment: steps them, resets those that end, and stacks what the agent sees.

    A step yields single frames (for the replay); `observation` holds the last `frame_stack` of them, oldest first. An
    episode's first frame fills its whole stack. Box observations keep uint8 and otherwise become float32; a Discrete
    observation becomes the int32 number of its state, counted from 0. Arrays handed out are never written again and
    must not be written by others. `first_index` is the global index of the first copy and, with `rank`, names a copy
    in errors. Raises InputError where the environment cannot be made or cannot be learned by DQN.
    """

    frame_shape: tuple[int, ...]  # [D] or [H, W, C]
    frame_dtype: np.dtype
    observation_shape: tuple[int, ...]  # [k * D] or [H, W, k * C]
    actions: int
    categories: int | None  # number of states of a Discrete observation
    observation: np.ndarray  # [E, *observation_shape]: what the agent sees now
    returns: np.ndarray  # [E] float64: of the episodes under way, as in Episodes

    def __init__(
        self,
        id: str,
        copies: int,
        *,
        kwargs: Mapping[str, Any] | None = None,
        vectorization: str = "auto",
        frame_stack: int = 1,
        reward_scale: float = 1.0,
        reward_clip: float | None = None,
        first_index: int = 0,
        rank: int = 0,
    ) -> None:
        self.id = id
        self.copies = copies
        self._stack = frame_stack
        self._reward_scale = reward_scale
        self._reward_clip = reward_clip
        self._first_index = first_index
        self._rank = rank
        self._vector = build(id, copies, dict(kwargs or {}), vectorization, first_index)

        space, action_space = self._vector.single_observation_space, self._vector.single_action_space
        assert isinstance(action_space, spaces.Discrete)
        self.actions = int(action_space.n)
        self._first_action = int(action_space.start)
        self.frame_shape, self.frame_dtype = frame_of(space)
        self.categories = int(space.n) if isinstance(space, spaces.Discrete) else None
        self._first_state = int(space.start) if isinstance(space, spaces.Discrete) else 0
        self._channels = self.frame_shape[-1]
        self.observation_shape = (*self.frame_shape[:-1], frame_stack * self._channels)

        # Such a class resets an environment in the step after the one that ended its episode.
        self._resets_late = AutoresetMode(self._vector.metadata["autoreset_mode"]) == AutoresetMode.NEXT_STEP
        self._all = np.ones(copies, dtype=np.bool_)
        self._all.flags.writeable = False
        self._steps = 0
        self._start(np.zeros((copies, *self.frame_shape), self.frame_dtype))

    def reset(self, seeds: Sequence[int]) -> None:
        """Starts an episode in every copy, from its own seed; an environment's vector class takes only the first."""
        assert len(seeds) == self.copies
        numbers = [int(seed) for seed in seeds]
        native = not isinstance(self._vector, SyncVectorEnv | AsyncVectorEnv)
        raw, _ = self._ask(self._vector.reset, seed=numbers[0] if native else numbers)
        frame = self._frames(raw)
        self._check_finite("observation", frame, "at its reset")
        self._start(frame)

    def _start(self, frame: np.ndarray) -> None:
        self._frame = frame  # [E, *frame]: the newest frame
        self.observation = self._filled(frame)
        self.returns = np.zeros(self.copies, dtype=np.float64)
        self._lengths = np.zeros(self.copies, dtype=np.int64)
        self._ended = np.zeros(self.copies, dtype=np.bool_)  # [E]: in the last step
        self._any_ended = False

    def step(self, action: np.ndarray) -> tuple[Transition, Episodes]:
        """Takes `action`, [E] integers from 0, in all copies. Raises RunError at values that are not finite."""
        raw, raw_reward, raw_terminated, raw_truncated, info = self._ask(self._vector.step, action + self._first_action)
        self._steps += 1
        frame = self._frames(raw)
        reward = np.array(raw_reward, dtype=np.float64)
        terminated = np.array(raw_terminated, dtype=np.bool_)
        truncated = np.array(raw_truncated, dtype=np.bool_)
        valid = self._all
        if self._resets_late and self._any_ended:
            valid = ~self._ended
            reward[self._ended] = 0
            terminated &= valid
            truncated &= valid
        ended = terminated | truncated
        any_ended = np.count_nonzero(ended) > 0  # a fifth of the time of ended.any()
        next_frame = frame
        if any_ended and not self._resets_late:
            next_frame = self._with_final(frame, ended, info)
            self._check_finite("observation", frame, "at its reset")
        self._check_finite("reward", reward, f"in step {self._steps}")
        self._check_finite("observation", next_frame, f"in step {self._steps}")

        self.returns += reward
        self._lengths += valid
        episodes = NO_EPISODES
        if any_ended:
            episodes = Episodes(self.returns[ended], self._lengths[ended])
            self.returns[ended] = 0
            self._lengths[ended] = 0

        learned = reward * self._reward_scale
        if self._reward_clip is not None:
            learned = np.minimum(np.maximum(learned, -self._reward_clip), self._reward_clip)
        transition = Transition(
            observation=self._frame,
            action=np.array(action, dtype=np.int64),
            reward=learned.astype(np.float32),
            terminated=terminated,
            truncated=truncated,
            next_observation=next_frame,
            valid=valid,
        )
        self._frame = frame
        self._push(frame, ~valid if self._resets_late else ended)
        self._ended, self._any_ended = ended, any_ended
        return transition, episodes

    def close(self) -> None:
        """Ends the environments and their processes; a second call does nothing."""
        if isinstance(self._vector, AsyncVectorEnv):
            _end_workers(self._vector, CLOSING_SECONDS)
        else:
            self._vector.close()

    def _frames(self, raw: Any) -> np.ndarray:
        """Copies: vector classes use their arrays again."""
        if self.categories is not None:
            raw = np.asarray(raw) - self._first_state
        return np.array(raw, dtype=self.frame_dtype).reshape(-1, *self.frame_shape)

    def _with_final(self, frame: np.ndarray, ended: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        """`frame`, with the last one of the episode that has ended instead of the first of the next."""
        if "final_obs" not in info:
            raise RunError(
                f"The vector class of {self.id} must give the last observation of an episode as info['final_obs'], and "
                f"gave {sorted(info)}. Step the copies one by one with --env.vectorization sync."
            )
        final = info["final_obs"]  # [E] objects, None where no episode ended
        next_frame = frame.copy()
        next_frame[ended] = self._frames([final[i] for i in np.flatnonzero(ended)])
        return next_frame

    def _push(self, frame: np.ndarray, fresh: np.ndarray) -> None:
        """Makes `frame` the newest of each stack and, where it is `fresh`, the first of an episode, the only one."""
        if self._stack == 1:
            self.observation = frame
            return
        self.observation = np.concatenate((self.observation[..., self._channels :], frame), axis=-1)
        if fresh.any():
            self.observation[fresh] = self._filled(frame[fresh])

    def _filled(self, frame: np.ndarray) -> np.ndarray:
        return frame if self._stack == 1 else np.concatenate((frame,) * self._stack, axis=-1)

    def _check_finite(self, what: str, values: np.ndarray, when: str) -> None:
        if values.dtype.kind != "f" or np.count_nonzero(np.isfinite(values)) == values.size:
            return
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        where = f" at index {place[1:]}" if place[1:] else ""
        raise RunError(
            f"Environment {self._first_index + place[0]} ({self.id}) on rank {self._rank} returned a non-finite {what} "
            f"{when}: {values[tuple(place)]}{where}. Mend the environment: it would spread to all weights."
        )

    def _ask(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the vector environment. A worker that failed becomes one line; Gymnasium has printed its traceback."""
        try:
            return method(*args, **kwargs)
        except Exception as error:
            if not isinstance(self._vector, AsyncVectorEnv) or self._vector.closed:
                raise
            processes = self._vector.processes
            gone = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1)
            failed = [i for i, process in enumerate(processes) if process.sentinel in gone]
            for i in failed:
                processes[i].join(1)  # the sentinel comes a moment before the exit code
            codes = [processes[i].exitcode for i in failed]
            _end_workers(self._vector, 0)
            which = ", ".join(str(self._first_index + i) for i in failed) or "unknown"
            died = isinstance(error, EOFError | OSError)
            raise RunError(
                f"Environment {which} ({self.id}) on rank {self._rank} failed in step {self._steps + 1}: "
                + (f"its process ended with exit code {codes}" if died else f"{type(error).__name__}: {_line(error)}")
            ) from error


NO_EPISODES = Episodes(np.empty(0, np.float64), np.empty(0, np.int64))


def frame_of(space: gymnasium.Space) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one frame of a supported observation space."""
    if isinstance(space, spaces.Discrete):
        return (1,), np.dtype(np.int32)
    assert isinstance(space, spaces.Box)
    shape = {0: (1,), 1: space.shape, 2: (*space.shape, 1), 3: space.shape}[len(space.shape)]
    return shape, np.dtype(np.uint8 if space.dtype == np.uint8 else np.float32)


def build(id: str, copies: int, kwargs: dict[str, Any], vectorization: str, first_index: int) -> VectorEnv:
    """The copies in Gymnasium's vector environment, whose spaces DQN can learn; InputError where that cannot be."""
    spec = find(id)
    try:
        native = None
        if vectorization == "auto" and spec.vector_entry_point is not None and not spec.additional_wrappers:
            native = _native(id, spec, copies, kwargs)
        if native is not None:
            check_spaces(id, native.single_observation_space, native.single_action_space)
            return native
        makers: list[Callable[[], gymnasium.Env]] = [
            functools.partial(_make, spec, kwargs, check=first_index + i == 0) for i in range(copies)
        ]
        first = makers[0]()
        check_spaces(id, first.observation_space, first.action_space)
        if vectorization != "async":
            # copy=False saves a deep copy: each array is copied or converted here anyway.
            return SyncVectorEnv([lambda: first, *makers[1:]], copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        first.close()
        with _plain_children():
            return AsyncVectorEnv(
                [functools.partial(_make_in_worker, maker) for maker in makers],
                copy=False,
                # Spawned, because a forked child would share the parent's MPI and TensorFlow threads.
                context="spawn",
                autoreset_mode=AutoresetMode.SAME_STEP,
            )
    except InputError:
        raise
    except Exception as error:
        raise refusal(id, kwargs, error) from error


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
        missing = (
            f"the package `{package}`, which is not installed" if package else f"a missing package: {_line(error)}"
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


class _KeepFinal(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Copies an episode's last observation: an environment may write the first of the next into the same array."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        if result[2] or result[3]:
            return (np.array(result[0]), *result[1:])
        return result


def _make(spec: EnvSpec, kwargs: dict[str, Any], check: bool) -> gymnasium.Env:
    # Gymnasium's checker warns about wrong observations and rewards; in one copy of the whole job that is enough.
    return _KeepFinal(gymnasium.make(spec, **{"disable_env_checker": None if check else True, **kwargs}))


def _make_in_worker(maker: Callable[[], gymnasium.Env]) -> gymnasium.Env:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal: the rank decides how to end.
    return maker()


@contextlib.contextmanager
def _plain_children() -> Iterator[None]:
    """Lets processes start as bare Python: they neither run the main module again nor see that their parent is a rank.

    The main module would import TensorFlow and Horovod in every worker; an `import mpi4py` in an environment would take
    the worker for the rank itself.
    """
    main = sys.modules["__main__"]
    names = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    ranked = {k: v for k, v in os.environ.items() if k.startswith(("OMPI_", "PMI_", "PMIX_", "HOROVOD_"))}
    for name in names:
        setattr(main, name, None)
    for name in ranked:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(ranked)
        for name, value in names.items():
            setattr(main, name, value)


def _end_workers(vector: AsyncVectorEnv, seconds: float) -> None:
    """Ends worker processes within `seconds`. Gymnasium's own `close` waits forever for one that hangs or has died."""
    if vector.closed:
        return
    vector.closed = True
    deadline = time.monotonic() + seconds
    if seconds:
        for pipe in vector.parent_pipes:
            with contextlib.suppress(OSError, AttributeError):  # None stands for a worker that has failed
                pipe.send(("close", None))
        for process in vector.processes:
            process.join(max(deadline - time.monotonic(), 0))
    for process in vector.processes:
        if process.is_alive():
            process.kill()
        process.join()
    for pipe in vector.parent_pipes:
        if pipe is not None:
            pipe.close()


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
                f"{type(error).__name__}: {_line(error)}"
            ) from error
    try:
        return gymnasium.spec(name)
    except (gymnasium.error.VersionNotFound, gymnasium.error.DeprecatedEnv) as error:
        raise InputError(f"There is no environment `{id}`. {_line(error)}") from error
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
    text = _line(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if isinstance(error, ImportError | gymnasium.error.DependencyNotInstalled):
        if "box2d" in text.lower():
            return InputError(f"The environment `{id}` needs Box2D: pip install 'hvd_dqn[box2d]'")
        if isinstance(error, ModuleNotFoundError):
            return InputError(f"The environment `{id}` needs the package `{error.name}`, which is not installed.")
        return InputError(f"The environment `{id}` needs a package that is not installed: {text}")
    if unknown and unknown[1] in kwargs:
        return InputError(f"The environment `{id}` takes no argument `{unknown[1]}`. Received: --env.kwargs {kwargs}.")
    return InputError(f"The environment `{id}` cannot be made with arguments {kwargs}: {type(error).__name__}: {text}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


class Identity(gymnasium.Env[Any, Any]):
    """A learning check of seconds: the right action is the number of the state, and the next state is random.

    After Stable-Baselines3's IdentityEnv. The best return is `length`; random actions get `length / n`. Episodes end by
    termination.
    """

    def __init__(self, n: int = 4, length: int = 10) -> None:
        self.observation_space = spaces.Discrete(n)
        self.action_space = spaces.Discrete(n)
        self._n = n
        self._length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        self._state = int(self.np_random.integers(self._n))
        return self._state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        reward = float(action == self._state)
        self._steps += 1
        self._state = int(self.np_random.integers(self._n))
        return self._state, reward, self._steps >= self._length, False, {}


if "Identity-v0" not in gymnasium.registry:
    gymnasium.register("Identity-v0", entry_point="hvd_dqn.envs:Identity")
