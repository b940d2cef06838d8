"""The command line of the benchmarks: `hvd-dqn bench NAME`."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from hvd_dqn.commands.options import JsonOptions, parse
from hvd_dqn.config import Counts, setting
from hvd_dqn.errors import InputError, nearest, tell
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World


class LearnerOptions(JsonOptions):
    """Measures updates of three networks, with sampling and without."""


class LoopOptions(JsonOptions):
    """Measures whole training: cartpole-zoo, cartpole-16 or pixels."""

    without_dashes = "case"
    case: str = setting(
        "", "the settings: those of Stable-Baselines3's zoo for CartPole, 16 environments of it, or images"
    )
    total_steps: int | None = setting(None, "total steps of all ranks; none takes some seconds of training", ge=1)
    batch: int | None = setting(None, "minibatch of each rank; none takes the case's", unit="transitions", ge=1)
    envs: int | None = setting(None, "environments on each rank; none takes the case's", ge=1)
    sync: Literal["gradients", "parameters"] = setting("gradients", "what is averaged over ranks")
    overlap: bool = setting(False, "step the environments while a phase of updates runs")
    gate: bool = setting(
        False, "before measuring, print `ready` and wait for a line; for programs that start several at once"
    )


class AllreduceOptions(JsonOptions):
    """Measures what Horovod's all-reduce adds to MPI's, for five sizes."""


class ScalingOptions(JsonOptions):
    """Measures jobs of several ranks against as many independent processes; starts all of them itself."""

    case: str = setting("cartpole-16", "a case of `hvd-dqn bench loop`")
    ranks: Counts = setting((1, 2, 4, 8), "numbers of ranks")
    scaling: Literal["weak", "strong", "both"] = setting(
        "both", "keep minibatch and environments per rank, or divide them among ranks"
    )
    sync: Literal["gradients", "parameters", "both"] = setting("both", "what is averaged over ranks")
    total_steps: int | None = setting(
        None,
        "total steps of each rank, or of all ranks together under strong scaling; none takes some seconds of training",
        ge=1,
    )
    rounds: int = setting(5, "how many times each job is measured, in turns", ge=1)


class ProjectOptions(JsonOptions):
    """Predicts the speed of many ranks from measurements of a few, and checks the prediction against measured jobs."""

    case: str = setting("cartpole-16", "a case of `hvd-dqn bench loop`")
    ranks: int = setting(512, "the largest number of ranks to predict for", ge=2)
    sync: Literal["gradients", "parameters"] = setting("gradients", "what is averaged over ranks")
    files: tuple[Path, ...] = setting(
        (), "results of `bench loop`, `allreduce` and `scaling` with --json; if there are none, all is measured now"
    )
    latency: float | None = setting(
        None, "latency of another network than this machine's, per hop", unit="microseconds", gt=0
    )
    bandwidth: float | None = setting(
        None, "bandwidth of another network than this machine's", unit="gigabytes per second", gt=0
    )
    rounds: int = setting(3, "how many times each job is measured, if there are no files", ge=1)


def run(arguments: Sequence[str], world: World) -> None:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        for each, (kind, _) in BENCHMARKS.items():
            print(f"hvd-dqn bench {each:10}  {kind.__doc__}")
        return
    if name not in BENCHMARKS:
        raise InputError(
            f"There is no benchmark {name!r}.{nearest(name, BENCHMARKS)} Benchmarks: {', '.join(BENCHMARKS)}."
        )
    kind, measure = BENCHMARKS[name]
    options = in_step(world, lambda: parse(kind, arguments[1:], f"hvd-dqn bench {name}"))
    result, render = measure(options, world)
    if options.as_json:
        print(json.dumps(result))
        return
    from rich import print as show

    show(render(result))


Measured = tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]  # a result, and what makes a table of it


def _bench_learner(options: LearnerOptions, world: World) -> Measured:
    from hvd_dqn.bench import learner as benchmark

    return benchmark.learner(world), benchmark.table


def _bench_loop(options: LoopOptions, world: World) -> Measured:
    from hvd_dqn.bench import loop as benchmark

    if options.gate and world.size > 1:
        raise InputError("--gate is for processes that run alone: the ranks of one job wait for each other without it.")

    def ready() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    result = benchmark.loop(
        world,
        options.case,
        total_steps=options.total_steps,
        batch=options.batch,
        envs=options.envs,
        sync=options.sync,
        overlap=options.overlap,
        ready=ready if options.gate else lambda: None,
    )
    return result, benchmark.table


def _bench_allreduce(options: AllreduceOptions, world: World) -> Measured:
    from hvd_dqn.bench import allreduce as benchmark

    return benchmark.allreduce(world), benchmark.table


def _bench_scaling(options: ScalingOptions, world: World) -> Measured:
    from hvd_dqn.bench import scaling as benchmark

    result = benchmark.scaling(
        options.case,
        list(options.ranks),
        scalings=("weak", "strong") if options.scaling == "both" else (options.scaling,),
        syncs=("gradients", "parameters") if options.sync == "both" else (options.sync,),
        total_steps=options.total_steps,
        rounds=options.rounds,
        say=tell,
    )
    return result, benchmark.table


def _bench_project(options: ProjectOptions, world: World) -> Measured:
    from hvd_dqn.bench import project as benchmark

    result = benchmark.project(
        options.case,
        options.ranks,
        sync=options.sync,
        files=options.files,
        latency=options.latency,
        bandwidth=options.bandwidth,
        rounds=options.rounds,
        say=tell,
    )
    return result, benchmark.table


BENCHMARKS: dict[str, tuple[type[JsonOptions], Callable[[Any, World], Measured]]] = {
    "learner": (LearnerOptions, _bench_learner),
    "loop": (LoopOptions, _bench_loop),
    "allreduce": (AllreduceOptions, _bench_allreduce),
    "scaling": (ScalingOptions, _bench_scaling),
    "project": (ProjectOptions, _bench_project),
}
