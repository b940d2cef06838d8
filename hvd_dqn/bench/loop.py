"""Measures whole training: environment steps and updates per second of the real loop."""

import contextlib
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from hvd_dqn.bench.jobs import READY
from hvd_dqn.bench.results import provenance, rate, result_table
from hvd_dqn.config import Config
from hvd_dqn.errors import InputError, nearest
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World
from hvd_dqn.storage.checkpoint import Checkpoints
from hvd_dqn.training.trainer import Trainer
from hvd_dqn.training.worker import Worker

PHASES = 4  # measured at least
PARTS = ("act", "env", "sample", "update", "communicate", "idle")  # of the time that the ledger records


class TrainingCase(NamedTuple):
    """The settings of one training on one rank."""

    settings: dict[str, dict[str, Any]]
    total_steps: int


TRAINING_CASES = {
    # Stable-Baselines3's zoo, dqn.yml: 128 updates of 64 every 256 steps are 32 samples per insert. It copies its
    # target every 10 environment steps, never inside a phase. That amounts to one copy per phase.
    "cartpole-zoo": TrainingCase(
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
    # An update per 4 steps: 4 after each step of the 16 environments. Compiled, as in long runs.
    "cartpole-16": TrainingCase(
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
    "pixels": TrainingCase(
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


def case_config(
    name: str, ranks: int, *, total_steps: int | None = None, batch: int | None = None, envs: int | None = None,
    sync: str = "gradients", overlap: bool = False,
) -> Config:  # fmt: skip
    """The settings of a case for `ranks` ranks. Each does the work of a single one: learning periods grow with `ranks`.

    Votes and drift checks keep their periods in total steps, as in every run. `batch` and `envs` are per rank. Another
    batch keeps the samples per insert. The period between phases changes, so that a phase has as many updates as
    before, unless the period would be shorter than one step of each environment.
    """
    if name not in TRAINING_CASES:
        raise InputError(
            f"There is no case {name!r}.{nearest(name, TRAINING_CASES)} Cases: {', '.join(TRAINING_CASES)}."
        )
    case = TRAINING_CASES[name]
    given = {section: dict(values) for section, values in case.settings.items()}
    learner, env = given["learner"], given["env"]
    batch = learner["batch_size"] if batch is None else batch
    envs = env["envs_per_rank"] if envs is None else envs
    period = learner["train_period"] * batch // learner["batch_size"]
    step = math.ceil(max(period, envs) / envs) * envs  # of one rank, from phase to phase
    if learner.get("xla") and learner["samples_per_insert"] * step % batch:
        raise InputError(
            f"{name} is compiled for one number of updates per phase, which --batch and --envs must not change: keep them "
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


def measure(
    world: World, case: str, *, total_steps: int | None = None, batch: int | None = None, envs: int | None = None,
    sync: str = "gradients", overlap: bool = False, gate: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Trains, and measures from the end of the second phase, when all graphs are traced. All ranks call it.

    This includes votes and drift checks, but neither evaluations nor checkpoints. `total_steps` are summed over ranks.
    With a `gate` it prints that it is ready, and waits for a line before it measures.
    """
    if gate and world.size > 1:
        raise InputError("--gate is for independent processes: the ranks of one job wait for each other without it.")
    config = in_step(
        world,
        lambda: case_config(
            case, world.size, total_steps=total_steps, batch=batch, envs=envs, sync=sync, overlap=overlap
        ),
    )
    watch = Stopwatch(gate)
    trainer = in_step(world, lambda: Trainer(config, world, learned=watch.learned))
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(trainer):
        with contextlib.closing(trainer.train(Checkpoints(Path(folder), world))) as records:
            for record in records:
                if record.kind == "report" and record.row["total_steps"] >= config.total_steps:
                    break  # before the evaluation that ends a run
        measured = watch.result(trainer.worker)
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
    """Measures training from the end of its second phase to the end of its last one."""

    def __init__(self, gate: bool) -> None:
        self._gate = gate
        self._ends: list[float] = []  # of phases
        self._marks: list[tuple[int, int, dict[str, float]]] = []  # at both ends: total steps, updates, seconds spent
        self._phases = 0

    def learned(self, worker: Worker) -> None:
        """Call it after each phase."""
        self._phases += 1
        if self._phases == 2 and self._gate:
            print(READY, flush=True)
            sys.stdin.readline()
        if self._phases >= 2:
            self._ends.append(time.perf_counter())
            mark = (worker.plan.total_steps_after(worker.learned_at), worker.updates, worker.ledger.spent)
            self._marks = [*self._marks[:1], mark]

    def result(self, worker: Worker) -> dict[str, Any]:
        """Rates summed over ranks, the mean rank's seconds in each part, and the spread of its phases. A collective."""
        (first_steps, first_updates, spent_before), (steps, updates, spent) = self._marks
        phases = np.diff(self._ends)
        parts = {name: spent[name] - spent_before[name] for name in PARTS}
        # Split as in a report, but over the measured phases only: waiting while other ranks trace does not count.
        allreduce = parts["communicate"] + parts["idle"]
        seconds, negative_least = worker.world.max(np.array([self._ends[-1] - self._ends[0], -allreduce])).tolist()
        parts |= {"communicate": -negative_least, "idle": allreduce + negative_least}
        time_spent = worker.world.sum(np.array(list(parts.values()))) / worker.world.size
        total_steps, taken = steps - first_steps, updates - first_updates
        variables = worker.learner.online.variables
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
                # Of the chief's phases; meaningful for one rank alone, whose phases wait for no other.
                "least": float(phases.min()),
                "deviation": float(phases.std()),
                "message_bytes": int(sum(4 * np.prod(variable.shape) for variable in variables)),
            },
        }


def render(result: dict[str, Any]) -> Table:
    (row,) = result["results"]
    table = result_table(
        result, "one run: rates of all ranks together, and parts of a rank's time", "", row["case"], left=1
    )
    table.add_row("steps/s", rate(row["steps_per_second"]))
    table.add_row("updates/s", rate(row["updates_per_second"]))
    spent = {**row["time"], "rest": row["seconds"] - sum(row["time"].values())}
    for part, seconds in spent.items():
        table.add_row(part, f"{100 * seconds / row['seconds']:.0f} %")
    return table
