"""What every rank does in each cycle. It follows from the settings and the number of ranks alone, so ranks agree."""

import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from hvd_dqn.agent.schedules import epsilon_ladder, linear
from hvd_dqn.config import Config, Section
from hvd_dqn.errors import InputError


class Plan:
    """Decides everything that all ranks must decide alike.

    In each cycle (0, 1, ...) every rank takes one step in each of its environments: `steps_per_cycle` total steps. An
    event with a period of p total steps happens in the cycle whose total steps reach or pass a multiple of p.

    What one rank can do, any number can. For that three things grow where they must, and `describe` says so: the
    warm-up to `n_step` steps of each environment, the rings to what an n-step transition needs, and the run to
    `learner.min_updates`. A batch may be larger than what was collected, because draws are with replacement.

    A run is resumed at `resumed_at` total steps. `empty` tells which replays are empty then: none, those of all ranks,
    or those of ranks that joined. They are filled before the next update. `learns_from` matters if the run stopped
    while filling a replay: the total steps at which it would have learned. Raises InputError if settings do not fit.
    """

    def __init__(
        self,
        config: Config,
        size: int,
        resumed_at: int = 0,
        empty: Literal["no", "all", "joined"] = "no",
        learns_from: int = 0,
    ) -> None:
        self.config = config
        self.size = size
        self.resumed_at = resumed_at
        self.envs_per_rank = self._share(config.env.envs_per_rank, "env.envs_per_rank")
        self.batch_per_rank = self._share(config.learner.batch_size, "learner.batch_size")
        self.passes = config.ranks.backward_passes_per_step
        self.envs = size * self.envs_per_rank
        self.steps_per_cycle = self.envs
        self.global_batch = size * self.batch_per_rank * self.passes
        self.first_cycle = math.ceil(resumed_at / self.steps_per_cycle)
        # A ring must hold an n-step transition with its stack, an episode's last observation and the write head.
        least_slots = 2 * (config.agent.n_step + config.env.frame_stack + 2)
        self._check_settings(least_slots)
        self.learn_start = max(config.learner.learn_start, self.envs * config.agent.n_step)
        self.slots_per_env = max(config.replay.capacity // self.envs, least_slots)
        phase = config.learner.train_period
        self._vote_period = math.ceil(config.ranks.vote_period / phase) * phase
        # An update trains on `global_batch` transitions, and a step must add `samples_per_insert` of them.
        self._updates_per_step = (
            Fraction(config.learner.samples_per_insert).limit_denominator(10**6) / self.global_batch
        )
        self.total_steps = max(config.total_steps, self._total_steps_for(config.learner.min_updates))
        self.cycles = math.ceil(self.total_steps / self.steps_per_cycle)
        # A rank that joins learns as soon as its replay holds one batch. The others wait no longer than that.
        batch = self.envs * max(config.agent.n_step, math.ceil(self.batch_per_rank / self.envs_per_rank))
        filled = resumed_at + {"no": 0, "all": self.learn_start, "joined": batch}[empty]
        self.learns_from = max(filled, learns_from)

    def _share(self, amount: int, name: str) -> int:
        if self.config.ranks.scaling == "weak":
            return amount
        if amount % self.size:
            raise InputError(
                f"Strong scaling divides `{name}` among the ranks, so it must be a multiple of the number of ranks. "
                f"Received: {amount} on {_ranks(self.size)}. Choose --{name} {math.ceil(amount / self.size) * self.size}."
            )
        return amount // self.size

    def _check_settings(self, least_slots: int) -> None:
        """Refuses what no number of ranks can do."""
        config = self.config
        learner, ranks, agent, envs = config.learner, config.ranks, config.agent, config.env.envs_per_rank
        if learner.learn_start < envs * agent.n_step:
            raise InputError(
                f"Before the first update, every environment must have taken n_step = {agent.n_step} steps. Received: "
                f"--learner.learn_start {learner.learn_start} with {envs} environments. "
                f"Raise it to at least {envs * agent.n_step}."
            )
        if config.replay.capacity < learner.learn_start:
            raise InputError(
                "The replay must hold what the warm-up collects. Received: "
                f"--replay.capacity {config.replay.capacity}, --learner.learn_start {learner.learn_start}. "
                "Raise the first or lower the second."
            )
        if config.replay.capacity // envs < least_slots:
            raise InputError(
                f"Each of the {envs} environments needs room for at least {least_slots} transitions. Received: "
                f"--replay.capacity {config.replay.capacity}. Raise it to at least {least_slots * envs}."
            )
        if ranks.sync == "parameters" and ranks.compression == "fp16":
            raise InputError(
                "--ranks.compression is for gradients, and --ranks.sync parameters sends none. Received: fp16. "
                "Leave --ranks.compression at none, or average gradients."
            )
        if agent.dueling and ":" in agent.network:
            raise InputError(
                f"--agent.dueling is for the networks of this program, and the layers of {agent.network} are its own. "
                "Leave it out, and build the two streams in your model."
            )
        if ranks.silence_seconds is None and self._is_set("stall_seconds"):
            raise InputError(
                "--ranks.stall-seconds needs the watchdog, which --ranks.silence-seconds none turns off. "
                f"Received: {ranks.stall_seconds:g}. Leave it out, or give --ranks.silence-seconds a number."
            )

    def _total_steps_for(self, least: int) -> int:
        """The total steps in which this many updates are taken, or as many as one rank would take in the run if less."""
        learner = self.config.learner
        of_one_rank = self._updates_per_step * self.global_batch / (learner.batch_size * self.passes)
        last_phase = self.config.total_steps // learner.train_period * learner.train_period
        updates = min(least, int(max(last_phase - learner.learn_start, 0) * of_one_rank))
        steps = self.learn_start + math.ceil(updates / self._updates_per_step) if updates else 0
        return math.ceil(steps / learner.train_period) * learner.train_period

    def total_steps_after(self, cycle: int) -> int:
        return (cycle + 1) * self.steps_per_cycle

    def _passes_multiple(self, cycle: int, period: int) -> bool:
        before = self.total_steps_after(cycle - 1)
        if cycle == self.first_cycle:  # a run of another number of ranks may have stopped within this cycle
            before = min(before, self.resumed_at)
        return self.total_steps_after(cycle) // period > before // period

    def _updates_by(self, total_steps: int) -> int:
        # Integers: this runs twice per cycle, and a product of fractions takes ten times as long.
        rate = self._updates_per_step
        return max(total_steps - self.learn_start, 0) * rate.numerator // rate.denominator

    def updates_after(self, cycle: int) -> int:
        """The number of updates from the start of the run to the end of this cycle."""
        period = self.config.learner.train_period
        last_multiple = self.total_steps_after(cycle) // period * period
        last_phase = math.ceil(last_multiple / self.steps_per_cycle) * self.steps_per_cycle
        return self._updates_by(last_phase)

    def updates_at(self, cycle: int) -> int:
        """K, the number of updates in this cycle's phase; 0 if it has none, for example while a replay is filled."""
        if self.total_steps_after(cycle) < self.learns_from:
            return 0
        return self.updates_after(cycle) - self.updates_after(cycle - 1)

    @property
    def most_updates(self) -> int:
        """No phase has more updates."""
        between = math.ceil(self.config.learner.train_period / self.steps_per_cycle) * self.steps_per_cycle
        return math.ceil(between * self._updates_per_step)

    def finishes_phase_at(self, cycle: int) -> bool:
        """Whether the current phase ends in this cycle. With `overlap` it runs until its results are needed."""
        return (
            not self.config.learner.overlap
            or self.checks_drift_at(cycle)
            or self.reports_at(cycle)
            or self.evaluates_at(cycle)
            or self.checkpoints_at(cycle)
        )

    def ends_warm_up_at(self, cycle: int) -> bool:
        """Whether what the run has collected reaches `learn_start` in this cycle, also if it was resumed before."""
        return self.total_steps_after(cycle - 1) < self.learn_start <= self.total_steps_after(cycle)

    def learns_at(self, cycle: int) -> bool:
        return self.updates_at(cycle) > 0

    def target_copies_at(self, cycle: int) -> np.ndarray:
        """[K] bool: whether the target network is copied after each update of this cycle's phase."""
        update = np.arange(self.updates_after(cycle - 1), self.updates_after(cycle) + 1)
        # Integers avoid rounding errors in long runs: copies = floor(update / (target_period * updates_per_step)).
        period = self.config.learner.target_period * self._updates_per_step
        copies = update * period.denominator // period.numerator
        return copies[1:] > copies[:-1]

    def epsilon_at(self, cycle: int) -> float:
        agent = self.config.agent
        if self.total_steps_after(cycle) <= self.learn_start:
            return agent.epsilon_start
        return linear(self.total_steps_after(cycle - 1), agent.epsilon_start, agent.epsilon_end, agent.epsilon_steps)

    def epsilons_at(self, cycle: int, rank: int) -> np.ndarray:
        """[envs_per_rank]: the probability of a random action in each environment of this rank."""
        first = rank * self.envs_per_rank
        return epsilon_ladder(
            self.epsilon_at(cycle), self.config.agent.epsilon_ladder, first, self.envs_per_rank, self.envs
        )

    @property
    def learning_rate_factor(self) -> float:
        """The factor by which the learning rate grows with the global batch."""
        grown = self.global_batch / self.config.learner.batch_size
        return {"none": 1.0, "sqrt": math.sqrt(grown), "linear": grown}[self.config.ranks.learning_rate_scaling]

    def learning_rate_at(self, cycle: int) -> float:
        learner = self.config.learner
        steps = self.total_steps_after(cycle)
        factor = linear(steps - self.learn_start, 1.0, self.learning_rate_factor, self.config.ranks.warmup_steps)
        return learner.learning_rate * factor * linear(steps, 1.0, learner.learning_rate_end, self.total_steps)

    def importance_at(self, cycle: int) -> float:
        """The exponent beta of importance weights."""
        replay, steps = self.config.replay, self.total_steps_after(cycle)
        return linear(steps, replay.importance_start, replay.importance_end, self.config.total_steps)

    def evaluates_at(self, cycle: int) -> bool:
        return self._passes_multiple(cycle, self.config.evaluation.period)

    def saves_before_evaluation_at(self, cycle: int) -> bool:
        """Whether a resumable checkpoint is made before this cycle's evaluation, from which it can be repeated.

        Before the first one, in which new code fails most often, and before the last, which would lose the most. In
        between the checkpoints of `checkpoint.period` must do: each may write a replay of many gigabytes.
        """
        return (
            self.total_steps_after(cycle - 1) < self.config.evaluation.period
            or cycle == self.cycles - 1
            or self.checkpoints_at(cycle)
        )

    def reports_at(self, cycle: int) -> bool:
        return self._passes_multiple(cycle, self.config.report.period) or cycle == self.cycles - 1

    def checkpoints_at(self, cycle: int) -> bool:
        return self._passes_multiple(cycle, self.config.checkpoint.period)

    def votes_at(self, cycle: int) -> bool:
        """Whether ranks vote. They do so only when a phase begins, because they communicate then anyway."""
        return self._passes_multiple(cycle, self._vote_period)

    def checks_drift_at(self, cycle: int) -> bool:
        return self._passes_multiple(cycle, self.config.ranks.drift_check_period)

    def describe(self) -> dict[str, str]:
        """What the settings mean on this many ranks, for display."""
        config, learner = self.config, self.config.learner
        updates, phases = self.updates_to_come()
        between = float(learner.target_period * self._updates_per_step)
        rows = {
            "environment": f"{config.env.id}, {_ranks(self.size)} x {self.envs_per_rank}"
            f" = {_count(self.envs, 'copy', 'copies')}",
            "total steps": f"{self.total_steps:,} in {_count(self.cycles, 'cycle')} of {self.steps_per_cycle:,}",
            "global batch": f"{_ranks(self.size)} x {self.batch_per_rank:,}"
            + (f" x {self.passes} minibatches" if self.passes > 1 else "")
            + f" = {self.global_batch:,} ({config.ranks.scaling} scaling)",
            "learning rate": self._describe_learning_rate(),
            "samples per insert": f"{learner.samples_per_insert:,g} transitions trained on per step",
            "updates": f"{updates:,}"
            + (f" in about {_count(phases, 'phase')} of {updates / phases:,.0f}" if phases else "")
            + ("" if updates else ": the run ends before learning begins"),
            "target network": "a copy after every " + (f"{_short(between)} updates" if between > 1 else "update"),
            "averaging": f"of {config.ranks.sync}" if self.size > 1 else "none, on one rank",
            "replay": f"{self.slots_per_env * self.envs_per_rank:,} transitions per rank",
        }
        if grown := self.grown():
            rows["grown"] = "; ".join(grown)
        if idle := self.without_effect():
            rows["without effect"] = "; ".join(idle)
        return rows

    def grown(self) -> list[str]:
        """What is larger than the settings say, because so many ranks need it."""
        config, n_step, told = self.config, self.config.agent.n_step, []
        if self.learn_start > config.learner.learn_start:
            told.append(
                f"the warm-up takes {self.learn_start:,} total steps instead of {config.learner.learn_start:,}, "
                f"{n_step} of each of the {self.envs:,} environments"
            )
        if self.slots_per_env > config.replay.capacity // self.envs:
            told.append(
                f"the replay holds {self.slots_per_env * self.envs:,} transitions instead of {config.replay.capacity:,}, "
                f"{self.slots_per_env} of each environment"
            )
        if self.total_steps > config.total_steps:
            told.append(
                f"the run takes {self.total_steps:,} total steps instead of {config.total_steps:,}, "
                f"for {config.learner.min_updates:,} updates"
            )
        return told

    def without_effect(self) -> list[str]:
        """The settings that are not at their defaults and change nothing on this number of ranks, each with the reason."""
        config, ranks, idle = self.config, self.config.ranks, []
        if ranks.warmup_steps and self.learning_rate_factor == 1:
            idle.append("--ranks.warmup-steps, since the learning rate does not grow here")
        if ":" in config.agent.network and config.agent.hidden != _default(config.agent, "hidden"):
            idle.append(f"--agent.hidden, since the layers of {config.agent.network} are its own")
        if config.checkpoint.compress and not config.checkpoint.save_replay:
            idle.append("--checkpoint.compress, since it is for the replay, which is not saved")
        alone = [name for name in ("compression", "silence_seconds", "stall_seconds") if self._is_set(name)]
        if self.size == 1 and alone:
            names = [f"--ranks.{name.replace('_', '-')}" for name in alone]
            idle.append(f"{' and '.join(names)}, since there is one rank")
        return idle

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self.config.ranks, name) != _default(self.config.ranks, name))

    def updates_to_come(self) -> tuple[int, int]:
        """The updates from here to the end of the run, and about how many phases they come in."""
        # Computed without a loop: a long run has millions of cycles.
        first = max(self.first_cycle, math.ceil(self.learns_from / self.steps_per_cycle) - 1, 0)
        updates = max(self.updates_after(self.cycles - 1) - self.updates_after(first - 1), 0)
        steps = self.total_steps_after(self.cycles - 1) - max(self.total_steps_after(first - 1), self.learn_start)
        return updates, min(updates, max(steps, 0) // max(self.config.learner.train_period, self.steps_per_cycle))

    @property
    def steps_per_phase(self) -> int:
        """Total steps from one phase to the next, at most."""
        return math.ceil(self.config.learner.train_period / self.steps_per_cycle) * self.steps_per_cycle

    @property
    def updates_per_phase(self) -> int:
        """The most updates of a phase."""
        return math.ceil(self.steps_per_phase * self._updates_per_step)

    def _describe_learning_rate(self) -> str:
        learner, ranks, factor = self.config.learner, self.config.ranks, self.learning_rate_factor
        if ranks.learning_rate_scaling == "none":
            return f"{learner.learning_rate:.3g} (not scaled)"
        warm_up = f", after a warm-up of {ranks.warmup_steps:,} total steps" if ranks.warmup_steps else ""
        return (
            f"{learner.learning_rate * factor:.3g} = {learner.learning_rate:.3g} x {factor:.3g} "
            f"({ranks.learning_rate_scaling} scaling{warm_up})"
        )


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def _ranks(size: int) -> str:
    return _count(size, "rank")


def _default(section: Section, name: str) -> Any:
    return type(section).model_fields[name].default


def _short(number: float) -> str:
    """Three digits if there are decimals, else all digits with separators."""
    return f"{number:.3g}" if number < 100 and number != int(number) else f"{number:,.0f}"
