"""What every rank does in each cycle. It follows from the settings and the number of ranks alone, so ranks agree."""

import math
from fractions import Fraction
from typing import Literal

import numpy as np

from hvd_dqn.agent.schedules import epsilon_ladder, linear
from hvd_dqn.config import Config
from hvd_dqn.errors import InputError


class Plan:
    """Decides everything that all ranks must decide alike.

    In each cycle (0, 1, ...) every rank takes one step in each of its environments: `steps_per_cycle` total steps. An
    event with a period of p total steps happens in the cycle whose total steps reach or pass a multiple of p.

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
        self.cycles = math.ceil(config.total_steps / self.steps_per_cycle)
        self.slots_per_env = config.replay.capacity // self.envs
        phase = config.learner.train_period
        self._vote_period = math.ceil(config.ranks.vote_period / phase) * phase
        # An update trains on `global_batch` transitions, and a step must add `samples_per_insert` of them.
        self._updates_per_step = (
            Fraction(config.learner.samples_per_insert).limit_denominator(10**6) / self.global_batch
        )
        # Not checked if ranks join a run that already learns: its warm-up is over.
        if resumed_at < config.learner.learn_start or empty == "all":
            self._check_warm_up()
        self._check_capacity()
        # A rank that joins learns as soon as its replay holds one batch. The others wait no longer than that.
        batch = self.envs * max(config.agent.n_step, math.ceil(self.batch_per_rank / self.envs_per_rank))
        filled = resumed_at + {"no": 0, "all": config.learner.learn_start, "joined": batch}[empty]
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

    def _check_warm_up(self) -> None:
        learner, n_step = self.config.learner, self.config.agent.n_step
        if learner.learn_start < self.global_batch // self.passes:
            raise InputError(
                "The first update would sample more transitions than the warm-up collects. "
                f"Received: --learner.learn_start {learner.learn_start}, global batch {self.global_batch // self.passes} "
                f"({_ranks(self.size)} x {self.batch_per_rank}). Raise --learner.learn_start or lower --learner.batch_size."
            )
        if learner.learn_start < self.envs * n_step:
            raise InputError(
                f"Before the first update, every environment must have taken n_step = {n_step} steps. Received: "
                f"--learner.learn_start {learner.learn_start} with {self.envs} environments. "
                f"Raise it to at least {self.envs * n_step}."
            )
        if self.config.replay.capacity < learner.learn_start:
            raise InputError(
                "The replay must hold what the warm-up collects. Received: "
                f"--replay.capacity {self.config.replay.capacity}, --learner.learn_start {learner.learn_start}. "
                "Raise the first or lower the second."
            )

    def _check_capacity(self) -> None:
        n_step, stack = self.config.agent.n_step, self.config.env.frame_stack
        # A ring must hold an n-step transition with its stack, an episode's last observation and the write head.
        if self.slots_per_env < (least := 2 * (n_step + stack + 2)):
            raise InputError(
                f"Each of the {self.envs} environments needs room for at least {least} transitions. Received: "
                f"--replay.capacity {self.config.replay.capacity}. Raise it to at least {least * self.envs}."
            )

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
        return max(total_steps - self.config.learner.learn_start, 0) * rate.numerator // rate.denominator

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
        return self.total_steps_after(cycle - 1) < self.config.learner.learn_start <= self.total_steps_after(cycle)

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
        if self.total_steps_after(cycle) <= self.config.learner.learn_start:
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
        factor = linear(steps - learner.learn_start, 1.0, self.learning_rate_factor, self.config.ranks.warmup_steps)
        return learner.learning_rate * factor * linear(steps, 1.0, learner.learning_rate_end, self.config.total_steps)

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
        # Computed without a loop: a long run has millions of cycles.
        first = max(self.first_cycle, math.ceil(self.learns_from / self.steps_per_cycle) - 1, 0)
        updates = max(self.updates_after(self.cycles - 1) - self.updates_after(first - 1), 0)
        steps = self.total_steps_after(self.cycles - 1) - max(self.total_steps_after(first - 1), learner.learn_start)
        phases = min(updates, max(steps, 0) // max(learner.train_period, self.steps_per_cycle))
        between = float(learner.target_period * self._updates_per_step)
        return {
            "environment": f"{config.env.id}, {_ranks(self.size)} x {self.envs_per_rank}"
            f" = {_count(self.envs, 'copy', 'copies')}",
            "total steps": f"{config.total_steps:,} in {_count(self.cycles, 'cycle')} of {self.steps_per_cycle:,}",
            "global batch": f"{_ranks(self.size)} x {self.batch_per_rank:,}"
            + (f" x {self.passes} minibatches" if self.passes > 1 else "")
            + f" = {self.global_batch:,} ({config.ranks.scaling} scaling)",
            "learning rate": self._describe_learning_rate(),
            "samples per insert": f"{learner.samples_per_insert:,g} transitions trained on per step",
            "updates": f"{updates:,}"
            + (f" in about {_count(phases, 'phase')} of {updates / phases:,.0f}" if phases else ""),
            "target network": "a copy after every " + (f"{_short(between)} updates" if between > 1 else "update"),
            "averaging": f"of {config.ranks.sync}" if self.size > 1 else "none, on one rank",
            "replay": f"{self.slots_per_env * self.envs_per_rank:,} transitions per rank",
        }

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


def _short(number: float) -> str:
    """Three digits if there are decimals, else all digits with separators."""
    return f"{number:.3g}" if number < 100 and number != int(number) else f"{number:,.0f}"
