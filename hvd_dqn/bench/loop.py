"""How fast whole training is: environment steps and updates per second of the real loop, at settings that others can copy."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from hvd_dqn.bench.results import made_table, provenance, rate
from hvd_dqn.config import Config
from hvd_dqn.errors import InputError, nearest
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World
from hvd_dqn.storage.checkpoint import Checkpoints
from hvd_dqn.training.trainer import Trainer
from hvd_dqn.training.worker import Agent

PHASES = 4  # the least that is measured
PARTS = ("act", "env", "sample", "update", "communicate", "idle")  # of the ledger's


class Case(NamedTuple):
    """The settings of one training; the periods and `total_steps` are one rank's."""

    settings: dict[str, dict[str, Any]]
    total_steps: int


CASES = {
    # Stable-Baselines3's zoo, dqn.yml: 128 updates of 64 every 256 steps are 32 samples per insert. Its target is copied
    # every 10 steps, which is while it steps and never inside a phase: once for each phase.
    "cartpole-zoo": Case(
        {
            "env": {"id": "CartPole-v1", "envs_per_rank": 1},
            "agent": {"hidden": (256, 256), "double": False, "epsilon_end": 0.04, "epsilon_steps": 8_000},
            "replay": {"capacity": 100_000},
            "learner": {
                "batch_size": 64, "samples_per_insert": 32, "learn_start": 1_000, "train_period": 256, "target_period": 256,
                "learning_rate": 2.3e-3,
            },
        },
        total_steps=20_000,
    ),
    # An update per 4 steps: 4 after each step of the 16 environments. Compiled, as it is in runs that are worth waiting for.
    "cartpole-16": Case(
        {
            "env": {"id": "CartPole-v1", "envs_per_rank": 16},
            "agent": {"hidden": (64, 64), "double": False},
            "replay": {"capacity": 100_000},
            "learner": {
                "batch_size": 64, "samples_per_insert": 16, "learn_start": 1_024, "train_period": 16, "target_period": 512,
                "xla": True,
            },
        },
        total_steps=60_000,
    ),
    # 16 * 32 / (4 * 16): the same number of updates per step, of 32 images.
    "pixels": Case(
        {
            "env": {"id": "hvd_dqn.envs.pixels:Pixels-v0", "envs_per_rank": 16, "frame_stack": 4},
            "agent": {"network": "cnn", "hidden": (512,), "double": False},
            "replay": {"capacity": 10_000},  # 10,000 * 84 * 84 B = 71 MB
            "learner": {
                "batch_size": 32, "samples_per_insert": 8, "learn_start": 512, "train_period": 16, "target_period": 1_024,
                "learning_rate": 1e-4,
            },
        },
        total_steps=2_000,
    ),
}  # fmt: skip


def settings(
    name: str, ranks: int, *, total_steps: int | None = None, batch: int | None = None, envs: int | None = None,
    sync: str = "gradients", overlap: bool = False,
) -> Config:  # fmt: skip
    """The case's settings for so many ranks, each of which learns as one alone would: the periods of that grow with their
    number. Votes and drift checks come as often as in every run, after so many total steps.

    `batch` and `envs` are each rank's. With another batch the samples per insert stay, and the period between phases changes
    so that the number of updates in one stays too, where a period of less than a step of each environment does not forbid it.
    """
    if name not in CASES:
        raise InputError(f"There is no case {name!r}.{nearest(name, CASES)} Cases: {', '.join(CASES)}.")
    case = CASES[name]
    given = {section: dict(values) for section, values in case.settings.items()}
    learner, env = given["learner"], given["env"]
    batch = learner["batch_size"] if batch is None else batch
    envs = env["envs_per_rank"] if envs is None else envs
    if batch < 1 or envs < 1:
        raise InputError(f"--batch and --envs must be at least 1. Received: {batch} and {envs}.")
    period = learner["train_period"] * batch // learner["batch_size"]
    step = math.ceil(max(period, envs) / envs) * envs  # of one rank, from phase to phase
    if learner.get("xla") and learner["samples_per_insert"] * step % batch:
        raise InputError(
            f"{name} is compiled for each number of updates in a phase, and must always make as many. Take --batch and --envs "
            f"in the proportion of {learner['batch_size']} to {env['envs_per_rank']}. Received: {batch} and {envs}."
        )
    start = max(learner["learn_start"], batch, envs)
    learner |= {"batch_size": batch, "learn_start": ranks * start, "train_period": ranks * step}
    learner["target_period"] *= ranks
    learner["overlap"] = overlap
    env["envs_per_rank"] = envs
    given["agent"]["epsilon_steps"] = ranks * given["agent"].get("epsilon_steps", 10_000)
    given["replay"]["capacity"] = ranks * max(given["replay"]["capacity"], start, 100 * envs)
    # The first phase may be a shorter one: the graphs are traced, and compiled, by the end of the second.
    least = ranks * (start + (2 + PHASES) * step)
    if total_steps is None:
        total_steps = max(ranks * case.total_steps, least)
    if total_steps < least:
        raise InputError(
            f"--total-steps must be at least {least:,}, so that {PHASES} phases are measured. Received: {total_steps:,}."
        )
    never = 10 * total_steps
    return Config.model_validate(
        {
            **given,
            "total_steps": total_steps,
            "ranks": {"sync": sync},
            "report": {"period": ranks * 1_000},
            "evaluation": {"period": never, "episodes": 1, "final_episodes": 1},
            "checkpoint": {"period": never, "save_replay": False},
        }
    )


def loop(
    world: World, case: str, *, total_steps: int | None = None, batch: int | None = None, envs: int | None = None,
    sync: str = "gradients", overlap: bool = False, ready: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Trains, and measures from the end of the second phase on, when all graphs are made. All ranks call it.

    Votes and drift checks are part of it, as they are of every run; evaluations and checkpoints are not. `total_steps` are
    those of all ranks. `ready` is called before the measurement begins.
    """
    config = in_step(
        world,
        lambda: settings(case, world.size, total_steps=total_steps, batch=batch, envs=envs, sync=sync, overlap=overlap),
    )
    watch = Stopwatch(ready)
    trainer = in_step(world, lambda: Trainer(config, world, learned=watch.learned))
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(trainer):
        with contextlib.closing(trainer.train(Checkpoints(Path(folder), world))) as records:
            for record in records:
                if record.kind == "report" and record.row["total_steps"] >= config.total_steps:
                    break  # before the evaluation that ends a run
        measured = watch.result(trainer.agent)
    learner = config.learner
    row = {
        "case": case,
        "sync": sync,
        "overlap": overlap,
        "batch": learner.batch_size,
        "envs": config.env.envs_per_rank,
        **measured,
    }
    return {"benchmark": "loop", **provenance(), "ranks": world.size, "results": [row]}


class Stopwatch:
    """Measures a training from the end of its second phase to the end of its last."""

    def __init__(self, ready: Callable[[], None]) -> None:
        self._ready = ready
        self._ends: list[float] = []  # of phases
        self._marks: list[tuple[int, int, dict[str, float]]] = []  # at both ends: total steps, updates, seconds spent
        self._phases = 0

    def learned(self, agent: Agent) -> None:
        """To be called after each phase."""
        self._phases += 1
        if self._phases == 2:
            self._ready()
        if self._phases >= 2:
            self._ends.append(time.perf_counter())
            mark = (agent.plan.total_steps_after(agent.learned_at), agent.updates, agent.ledger.spent)
            self._marks = [*self._marks[:1], mark]

    def result(self, agent: Agent) -> dict[str, Any]:
        """Rates of all ranks together, the seconds of the mean rank in each part, and how its phases vary. A collective."""
        (first_steps, first_updates, spent_before), (steps, updates, spent) = self._marks
        phases = np.diff(self._ends)
        parts = {name: spent[name] - spent_before[name] for name in PARTS}
        # Split as a report does, but over what is measured: what was waited while others traced is not part of it.
        exchange = parts["communicate"] + parts["idle"]
        seconds, least = agent.world.max(np.array([self._ends[-1] - self._ends[0], -exchange])).tolist()
        parts |= {"communicate": -least, "idle": exchange + least}
        time_spent = agent.world.sum(np.array(list(parts.values()))) / agent.world.size
        total_steps, taken = steps - first_steps, updates - first_updates
        variables = agent.learner.online.variables
        return {
            "steps_per_second": total_steps / seconds,
            "updates_per_second": taken / seconds,
            "total_steps": total_steps,
            "updates": taken,
            "seconds": seconds,
            "time": dict(zip(PARTS, time_spent.tolist(), strict=True)),
            "phase": {
                "count": len(phases),
                "updates": taken / len(phases),
                "seconds": float(phases.mean()),
                # Of the chief's phases: of use for a rank alone, whose phases wait for nobody.
                "least": float(phases.min()),
                "deviation": float(phases.std()),
                "message_bytes": int(sum(4 * np.prod(variable.shape) for variable in variables)),
            },
        }


def table(result: dict[str, Any]) -> Table:
    """The result of `loop` for people."""
    made = made_table(result, "one run; of all ranks together, and the parts of a rank's time")
    (row,) = result["results"]
    made.add_column("")
    made.add_column(row["case"], justify="right")
    made.add_row("steps/s", rate(row["steps_per_second"]))
    made.add_row("updates/s", rate(row["updates_per_second"]))
    spent = {**row["time"], "rest": row["seconds"] - sum(row["time"].values())}
    for part, seconds in spent.items():
        made.add_row(part, f"{100 * seconds / row['seconds']:.0f} %")
    return made
