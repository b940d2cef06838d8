"""Steps, saves and restores one rank's copies of a Gymnasium environment, and restarts them after failures.

What happens to observations and rewards between the environment and the network, in this order:

  observation  1. clean      a value that is not finite stops the run or, with env.on_nonfinite hold, becomes the last finite
                             value of the same element in this episode. In an episode's first observation it becomes the
                             running mean (0 without env.normalize_observation).
               2. store      in the replay, as a frame.
               3. normalise  (x - mean) / sqrt(variance + 1e-8), over all observations of all ranks so far. Rows that are not
                             valid count nowhere: the resets of vector classes that reset one step late, and failures.
               4. clip       to [-c, c], where c is env.clip_observation, in deviations.
  reward       1. clean      a value that is not finite stops the run, or makes the environments again.
               2. normalise  r / sqrt(variance + 1e-8), where the variance is that of the discounted returns
                             R = gamma * R + r of all steps of all ranks so far; R starts at 0 in each episode.
               3. scale      r * env.reward_scale
               4. clip       to [-c, c], where c is env.reward_clip.

Normalised rewards are stored as they came. Steps 2 to 4 follow when they are sampled (`hvd_dqn.agent.rewards`), so that all
rewards of a minibatch are divided by the same number. Without env.normalize_reward they are stored after step 4.
Returns and the rewards of evaluations are the environment's own.
"""

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from hvd_dqn.agent.choices import Choices
from hvd_dqn.agent.transition import Transition
from hvd_dqn.envs.actions import ActionMap, ActionSettings
from hvd_dqn.envs.cleaning import Readings
from hvd_dqn.envs.conformity import outside
from hvd_dqn.envs.frames import Frames, Misfit, rows_of
from hvd_dqn.envs.masking import Masks
from hvd_dqn.envs.registry import find_spec
from hvd_dqn.envs.restore import restorer_for
from hvd_dqn.envs.vector import Built, build, call, close_vector, is_native
from hvd_dqn.envs.wrappers import EnvFailure, one_line
from hvd_dqn.envs.wrapping import Wrapper, described
from hvd_dqn.errors import InputError, RunError, tell

# How long environments and their processes may take to close. After that they are abandoned or killed.
CLOSING_SECONDS = 5.0
# Streams of new seeds, derived from the seeds of the last reset.
RESTARTED, RESUMED = range(2)
# Steps between two looks for values outside the declared space, after as many with one each: one takes microseconds.
BOUNDS_PERIOD = 100
# Restarts that outrun steps end the job: so many restarts in less than so many steps of a copy do not help.
RESTARTS_IN_A_ROW, RESTART_STEPS = 10, 100


class Episodes(NamedTuple):
    """The n episodes that ended in one step, in the order of their environments."""

    returns: np.ndarray  # [n] float64: sums of the environment's own rewards, neither scaled nor clipped
    lengths: np.ndarray  # [n] int64: steps


class Environments:
    """E copies of one environment. Steps them, resets those whose episode ended, and stacks the agent's frames.

    A step yields single frames (for the replay); `observation` holds the last `frame_stack` of them. Returned arrays
    are never written again, and callers must not write them. `first_index` is the global index of the first copy;
    errors name it with `rank`. Raises InputError if the environment cannot be made, or if DQN cannot learn it.

    A copy fails if it raises, if its process ends, or if it returns a value that is not finite. After each of the first
    `restarts` failures all copies are closed, made again and reset with seeds derived from those of the last `reset`.
    After the next failure `step` and `reset` raise RunError with the copy's number and the environment's traceback. So they
    do after the last of `RESTARTS_IN_A_ROW` failures within `RESTART_STEPS` steps. With `holds` readings that are not
    finite are no failures: see this module. Rewards are.

    In an evaluation (`evaluates`) episodes begin only by `begin`. From the end of its episode until then a copy rests: it is
    not stepped, and returns what its episode began with.
    """

    observation_space: spaces.Space
    action_space: spaces.Space  # the environment's own
    action_map: ActionMap
    choices: Choices  # of the agent
    frames: Frames
    actions: int  # how many values choose an action: A, or the sum over all dimensions if they are factored
    observation: np.ndarray  # [E, *frames.observation_shape]: the current one
    mask: np.ndarray | None  # [E, S] bool: the actions that it allows; None if masks are not used
    returns: np.ndarray  # [E] float64: of the current episodes, as in Episodes
    restorable: bool  # whether `load_state` can restore unfinished episodes; False until `probe`
    restarted: int  # how often the copies were made again, also before a resume
    notes: list[str]  # how the copies came about, where a person should know it
    warnings: list[str]  # what a person should know, each once; whoever tells it takes it out
    readings: Readings
    step_limit: int | None  # after which an episode is truncated; None if there is none, or none is known

    def __init__(
        self,
        id: str,
        copies: int,
        *,
        kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[Wrapper] = (),
        max_episode_steps: int | None = None,
        vectorization: str = "auto",
        frame_stack: int = 1,
        observation_scale: float | None = None,
        normalize_observation: bool = False,
        reward_scale: float = 1.0,
        reward_clip: float | None = None,
        first_index: int = 0,
        rank: int = 0,
        restarts: int = 0,
        holds: bool = False,
        evaluates: bool = False,
        actions: ActionSettings | None = None,
    ) -> None:
        self.id = id
        self.copies = copies
        self._reward_scale = reward_scale
        self._reward_clip = reward_clip
        self._first_index = first_index
        self._rank = rank
        self._restarts = restarts
        self._evaluates = evaluates
        kwargs = dict(kwargs or {})
        if max_episode_steps is not None:
            if "max_episode_steps" in kwargs:
                raise InputError("--env.max_episode_steps is given again in --env.kwargs. Keep one of them.")
            kwargs["max_episode_steps"] = max_episode_steps
        self._settings = f"{id}, {copies} copies of {sorted(kwargs.items())} in stacks of {frame_stack}"
        self._settings += "".join(f", {described(wrapper)}" for wrapper in wrappers)
        self._uses_masks = (actions or ActionSettings()).mask
        self._masks: Masks | None = None
        self._knows_masks = False
        self._build_with: Callable[[int, str], Built] = lambda copies, vectorization: build(
            id, copies, kwargs, vectorization, first_index, wrappers, actions
        )
        self._vectorization = vectorization
        self.warnings = []
        self._seeks_outside = True  # until a value is found
        self._make()

        self.observation_space = self._vector.single_observation_space
        self.frames = Frames(
            self.observation_space, frame_stack, normalize=normalize_observation, scale=observation_scale
        )
        self.readings = Readings(self.frames.layout, holds, id, first_index, rank)
        self.action_space, self.choices = self.action_map.space, self.action_map.choices
        self.actions = self.choices.total
        self._first_action = int(self.action_space.start) if isinstance(self.action_space, spaces.Discrete) else 0
        if not isinstance(self.action_space, spaces.Discrete):
            self._settings += f" with {self.action_map}"

        self._take_vector()
        self._all = np.ones(copies, dtype=np.bool_)
        self._all.flags.writeable = False
        self.restorable = self._probed = False
        self.restarted = 0
        self._restarted_at: deque[int] = deque(maxlen=RESTARTS_IN_A_ROW)  # the steps
        self._unreported_restarts = 0
        limit = kwargs.get("max_episode_steps", find_spec(id).max_episode_steps)
        self.step_limit = limit if limit and limit > 0 else None  # Gymnasium takes -1 for none
        self._has_begun = False  # by `begin`, since the copies were made
        self._seeds = [0] * copies
        self._steps = 0
        self.mask = None
        self._start(np.zeros((copies, *self.frames.shape), self.frames.dtype))

    def _take_vector(self) -> None:
        # Such a class resets an environment one step after its episode ended.
        self._resets_late = AutoresetMode(self._vector.metadata["autoreset_mode"]) == AutoresetMode.NEXT_STEP
        self._native = is_native(self._vector)

    def _make(self) -> None:
        self._vector, self.action_map, self.notes = self._build_with(self.copies, self._vectorization)
        self._call = functools.partial(call, self._vector, self._first_index)
        self._restorer = restorer_for(self._vector, self._first_index)
        for name, holds in (("masked", self.masked), ("rests", self._evaluates)):
            if holds and not is_native(self._vector):
                self._call("set_attr", name, True)

    @property
    def masked(self) -> bool:
        """Whether masks are used; False until `find_masks`."""
        return self._masks is not None

    def take_unreported(self) -> np.ndarray:
        """[2] int64: readings that were held, and restarts, since the last call."""
        happened = self._unreported()
        self.readings.held = self._unreported_restarts = 0
        return happened

    def _unreported(self) -> np.ndarray:
        return np.array([self.readings.held, self._unreported_restarts], np.int64)

    def find_masks(self) -> None:
        """Finds out whether the environment gives action masks, with a reset of the first copy, and uses them then.

        Call it before `probe` and `reset`, which then starts as if there had been no such reset. All ranks find the same.
        An environment's own vector class that gives no masks, although a single copy does, is replaced. Raises InputError
        if a mask has another form than the environment's actions.
        """
        self._knows_masks = True
        if not self._uses_masks:
            return
        found: bool | str = False
        try:
            if self._native:
                found = self._finds_mask_alone()
            else:
                found = next(filter(None, self._call("call", "finds_mask", self._first_index)), False)
        except EnvFailure:
            close_vector(self._vector, CLOSING_SECONDS)
            self._make()
        if isinstance(found, str):
            raise InputError(
                f"`{self.id}` gives {found}. Expected: one of 0 and 1 for each action, for several dimensions a "
                "tuple of one mask each, or those masks concatenated. To learn without masks: --env.action_mask off."
            )
        if found:
            if self._native and "action_mask" not in self._call("reset", seed=1)[1]:
                close_vector(self._vector, CLOSING_SECONDS)
                self._vectorization = "sync"
                self._make()
                self._take_vector()
                self.notes.append(f"The vector class of `{self.id}` is not used: it gives no action masks.")
            if not self._native:
                self._call("set_attr", "masked", True)
            self._masks = Masks(self.action_map, self.copies, self._first_index, self._native)
            self._settings += ", masked"
            self.mask = np.ones((self.copies, self.choices.total), np.bool_)

    def _finds_mask_alone(self) -> bool | str:
        try:
            vector = self._build_with(1, "sync").vector
        except InputError:
            return False  # there is only the vector class
        try:
            return call(vector, self._first_index, "call", "finds_mask", self._first_index)[0]
        finally:
            close_vector(vector, CLOSING_SECONDS)

    def reset(self, seeds: Sequence[int]) -> None:
        """Starts an episode in every copy, from its own seed. A native vector class takes only the first seed."""
        assert len(seeds) == self.copies
        self._seeds = [int(seed) for seed in seeds]
        try:
            self._start(self._first_frames(self._seeds))
        except EnvFailure as failure:
            self._recover(failure, "at its reset")

    def begin(self, seeds: Sequence[int | None]) -> None:
        """Starts an episode in each copy that gets a seed; the others go on. Of native vector classes for one copy alone.

        If a copy fails and all are made again, `restarted` grows, and the episodes that were under way are lost.
        """
        begins = np.array([seed is not None for seed in seeds])
        first, self._has_begun = not self._has_begun, True
        self._seeds = [old if seed is None else int(seed) for seed, old in zip(seeds, self._seeds, strict=True)]
        try:
            if first or self._native:  # the others have never been reset
                other = next(seed for seed in seeds if seed is not None)
                self._start(self._first_frames([other if seed is None else seed for seed in seeds]))
                self.rest(~begins)
                return
            mask = self.mask
            frame = self._first_frames(list(seeds), begins)
            if mask is not None and self.mask is not None:
                self.mask = np.where(begins[:, None], self.mask, mask)
        except EnvFailure as failure:
            self._recover(failure, "at its reset")
            return
        before, observation, kept = self._frame, self.observation, ~begins
        returns, lengths = self.returns, self._lengths
        frame[kept] = before[kept]
        self._start(frame)
        self.observation = self.observation.copy()
        self.observation[kept] = observation[kept]
        self.returns[kept], self._lengths[kept] = returns[kept], lengths[kept]

    def rest(self, copies: np.ndarray) -> None:
        """Ends the episodes of these copies, [E] bool, before their time."""
        if not self._native:
            self._call("set_attr", "resting", copies.tolist())

    def _first_frames(self, seeds: Sequence[int | None], begins: np.ndarray | None = None) -> np.ndarray:
        """The frames at the beginning of the episodes of all copies or, if they are not native, of those in `begins`."""
        partly = {} if begins is None or self._native else {"options": {"reset_mask": begins}}
        raw, info = self._call("reset", seed=seeds[0] if self._native else seeds, **partly)
        frame = self._read(raw)
        if self._uses_masks and self._knows_masks and not self.masked and "action_mask" in info:
            raise RunError(
                f"{self.id} on rank {self._rank} gives an action mask at this reset, but gave none at its first one. "
                "Let it give masks always, or turn them off with --env.action_mask off."
            )
        if self._masks is not None:
            self.mask = self._masks.read(info, self._all if begins is None or self._native else begins)
        self.readings.check_first(frame, begins)
        return frame

    def _read(self, raw: Any, copies: np.ndarray | None = None) -> np.ndarray:
        """The frames of all copies or of these."""
        try:
            return self.frames.read(raw)
        except Misfit as misfit:
            copy = misfit.row if copies is None else int(copies[misfit.row])
            raise EnvFailure([self._first_index + copy], misfit.did, misfit.why) from None

    def _start(self, frame: np.ndarray) -> None:
        self._frame = frame  # [E, *frame]: the newest frame
        self.observation = self.frames.begin(frame)
        self.returns = np.zeros(self.copies, dtype=np.float64)
        self._lengths = np.zeros(self.copies, dtype=np.int64)
        self._ended: np.ndarray = np.zeros(self.copies, dtype=np.bool_)  # [E]: in the last step
        self._any_ended = False

    def step(self, action: np.ndarray) -> tuple[Transition, Episodes]:
        """Takes `action`, [E] or [E, D] integers from 0, in all copies.

        If one fails and all are made again, no row is valid, and the interrupted episodes are truncated.
        """
        self._steps += 1
        try:
            return self._step(action)
        except EnvFailure as failure:
            frame, mask, cut = self._frame, self.mask, self._lengths > 0
            self._recover(failure, f"in step {self._steps}")
        none = np.zeros(self.copies, np.bool_)
        reward = np.zeros(self.copies, np.float32)
        action = np.array(action, np.int64)
        return Transition(frame, action, reward, none, cut, self._frame, none, mask, self.mask), NO_EPISODES

    def _step(self, action: np.ndarray) -> tuple[Transition, Episodes]:
        raw, raw_reward, raw_terminated, raw_truncated, info = self._call("step", action + self._first_action)
        if self._seeks_outside and (self._steps < BOUNDS_PERIOD or self._steps % BOUNDS_PERIOD == 0):
            self._look_outside(raw)
        frame = self._read(raw)
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
        any_ended = np.count_nonzero(ended) > 0  # takes a fifth of the time of ended.any()
        mask = next_mask = None
        if self._masks is not None:
            mask = next_mask = self._masks.read(info, ~terminated if self._resets_late else self._all)
        next_frame = frame
        if any_ended and not self._resets_late:
            next_frame = self._with_final(frame, ended, info)
            if self._masks is not None and mask is not None:
                next_mask = self._masks.with_final(mask, terminated, truncated, info)
            self.readings.check_first(frame, ended, "observation at its reset")
        self.readings.check_rewards(reward)
        if self.readings.check(next_frame, self._frame, None if valid is self._all else ~valid, self._steps):
            frame[~ended] = next_frame[~ended]

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
            mask=self.mask,
            next_mask=next_mask,
        )
        self._frame, self.mask = frame, mask
        self.observation = self.frames.push(self.observation, frame, ~valid if self._resets_late else ended)
        self._ended, self._any_ended = ended, any_ended
        return transition, episodes

    def _look_outside(self, raw: Any) -> None:
        if found := outside(self.observation_space, raw):
            self._seeks_outside = False
            self.warnings.append(
                f"The {found} of {self.id}, in step {self._steps}: correct its observation_space. Preprocessing goes by it."
            )

    def try_out(self) -> None:
        """Raises InputError if the first copy breaks Gymnasium's interface or its own space, which no restart can mend.

        Takes a reset and a few steps. Call it before `reset`, which then starts as if there had been no trial.
        """
        if self._native:
            return
        try:
            faults = [fault for fault in self._call("call", "try_out", self._first_index) if fault]
        except EnvFailure:  # its process died: the run will name rank and step
            close_vector(self._vector, CLOSING_SECONDS)
            self._make()
            return
        if faults:
            did, why, cure = faults[0]
            raise InputError(f"The environment `{self.id}` {did}: {why}. {cure}")

    def probe(self) -> bool:
        """Finds out whether the copies are `restorable`, with about a hundred steps and some resets of the first copy.

        Call it before `reset`, which then starts as if there had been no probe. (An environment that keeps state over a
        seeded reset is not restorable, nor is one that fails here.) From then on, restorable copies record their steps.
        """
        self._probed = True
        try:
            self.restorable = self._restorer.probe()
            if self.restorable:
                self._restorer.record()
        except EnvFailure:
            self.restorable = False
            close_vector(self._vector, CLOSING_SECONDS)
            self._make()
        return self.restorable

    def state(self) -> dict[str, Any]:
        """The state of the copies: arrays and JSON values.

        If they are not `restorable`, it only determines the seeds of new episodes.
        """
        return {
            "settings": self._settings,
            "seeds": self._seeds,
            "steps": self._steps,
            "restarted": self.restarted,
            "unreported": self._unreported(),
            **{name: mine.copy() for name, mine in self._episodes().items()},
            **(self._restorer.state() if self.restorable else {}),
        }

    def _episodes(self) -> dict[str, np.ndarray]:
        return {
            "frame": self._frame,
            "observation": self.observation,
            "returns": self.returns,
            "lengths": self._lengths,
            "ended": self._ended,
            **({} if self.mask is None else {"mask": self.mask}),
        }

    def load_state(self, state: Mapping[str, Any]) -> np.ndarray:
        """Restores the copies, and returns [E] bool: which of them are restored.

        Their episodes continue exactly as the saved ones would have. The others (all, if the settings have changed)
        begin new episodes, with seeds derived from the saved ones and the number of steps.
        """
        if not self._probed:
            self.probe()
        self._seeds = [int(seed) for seed in state["seeds"]]
        self._steps, self.restarted = int(state["steps"]), int(state["restarted"])
        self.readings.held, self._unreported_restarts = map(int, state["unreported"])
        seeds = self._fresh_seeds(RESUMED, self._steps)
        try:
            self._start(self._first_frames(seeds))
            restored = np.zeros(self.copies, np.bool_)
            if self.restorable and state["settings"] == self._settings:
                restored = self._restore(state, seeds)
        except EnvFailure as failure:
            self._recover(failure, "while it was restored")
            return np.zeros(self.copies, np.bool_)
        return restored

    def _restore(self, state: Mapping[str, Any], seeds: list[int]) -> np.ndarray:
        restored = self._restorer.restore(
            state, lambda copy, observation: self._shows(state["frame"][copy], observation)
        )
        if not restored.all():
            self._start(self._first_frames(seeds, ~restored))
        for name, mine in self._episodes().items():
            mine[restored] = state[name][restored]
        self._any_ended = bool(self._ended.any())
        return restored

    def close(self) -> None:
        """Ends the environments and their processes; a second call does nothing."""
        close_vector(self._vector, CLOSING_SECONDS)

    def _with_final(self, frame: np.ndarray, ended: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        """`frame`, but for each ended episode its last frame instead of the first frame of the next episode."""
        if "final_obs" not in info:
            raise RunError(
                f"The vector class of {self.id} must return the last observation of an episode as info['final_obs']. "
                f"Received: {sorted(info)}. Step the copies one by one with --env.vectorization sync."
            )
        final, copies = info["final_obs"], np.flatnonzero(ended)
        next_frame = frame.copy()
        # A dictionary or tuple of arrays [E, ...], or [E] objects, None where no episode ended.
        last = rows_of(final, copies) if isinstance(final, Mapping | tuple) else [final[i] for i in copies]
        next_frame[ended] = self._read(last, copies)
        return next_frame

    def _shows(self, frame: np.ndarray, observation: Any) -> bool:
        """Whether this observation was stored as `frame`. Readings that were held cannot be compared."""
        shown = self._read([observation])
        self.readings.copy_held(shown, frame[None])
        return shown.tobytes() == frame.tobytes()

    def _numbers(self) -> range:
        return range(self._first_index, self._first_index + self.copies)

    def _fresh_seeds(self, *key: int) -> list[int]:
        stream = np.random.SeedSequence(self._seeds, spawn_key=key)
        return (stream.generate_state(self.copies) % 2**31).tolist()

    def _recover(self, failure: EnvFailure, when: str) -> None:
        """Makes all copies again and starts their episodes. Raises RunError if no restart is left."""
        self._has_begun = False
        while True:
            which = ", ".join(map(str, failure.numbers))
            if failure.numbers == self._numbers() and self.copies > 2:
                which = f"{failure.numbers[0]} to {failure.numbers[-1]}"
            where = f"rank {self._rank}{', in an evaluation,' if self._evaluates else ''}"
            told = f"Environment {which} ({self.id}) on {where} {failure.did} {when}: {failure.why}"
            trace = f"\n{failure.trace}" if failure.trace else ""
            close_vector(self._vector, CLOSING_SECONDS)
            if failure.cure:
                raise RunError(f"{told}. {failure.cure}") from failure
            if self.restarted >= self._restarts:
                raise RunError(
                    f"{told}. Fix it, or let ranks make their environments again after a failure: "
                    f"--env.restart_failed_envs.{trace}"
                ) from failure
            self._restarted_at.append(self._steps)
            within = self._steps - self._restarted_at[0]
            if len(self._restarted_at) == RESTARTS_IN_A_ROW and within < RESTART_STEPS:
                raise RunError(
                    f"{told}. That was failure {RESTARTS_IN_A_ROW} within {within} steps, so making it again does not help: "
                    f"fix it.{trace}"
                ) from failure
            self.restarted += 1
            self._unreported_restarts += 1
            left = self._restarts - self.restarted
            tell(f"{told}. All copies of this rank are made again; restarts left: {left}.{trace}")
            try:
                self._make()
                if self.restorable:
                    self._restorer.record()
                self._start(self._first_frames(self._fresh_seeds(RESTARTED, self.restarted)))
                return
            except EnvFailure as again:
                failure = again
            except InputError as error:
                failure = EnvFailure(self._numbers(), "could not be made again", one_line(error))


NO_EPISODES = Episodes(np.empty(0, np.float64), np.empty(0, np.int64))
