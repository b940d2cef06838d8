"""The command line of the benchmarks: `hvd-dqn bench NAME`."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hvd_dqn.commands.options import JsonOptions, parse
from hvd_dqn.errors import InputError, nearest, tell
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World


@dataclass
class LearnerOptions(JsonOptions):
    """Measures updates of three networks, with sampling and without."""


@dataclass
class LoopOptions(JsonOptions):
    """Measures whole training: cartpole-zoo, cartpole-16 or pixels."""

    case: tyro.conf.Positional[str] = ""
    """The settings: those of Stable-Baselines3's zoo for CartPole, 16 environments of it, or images."""
    total_steps: int | None = None
    """Of all ranks; by default some seconds of training."""
    batch: int | None = None
    """Transitions per update on each rank; by default the case's."""
    envs: int | None = None
    """Environments on each rank; by default the case's."""
    sync: Literal["gradients", "parameters"] = "gradients"
    """What the ranks average."""
    overlap: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Step the environments while phases learn."""
    gate: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Before the measurement, print `ready` and wait for a line: for whoever starts several at once."""


@dataclass
class AllreduceOptions(JsonOptions):
    """Measures what Horovod's all-reduce adds to MPI's, for five sizes."""


@dataclass
class ScalingOptions(JsonOptions):
    """Measures jobs of several ranks against as many processes that do not talk; starts all of them itself."""

    case: str = "cartpole-16"
    """As of `hvd-dqn bench loop`."""
    ranks: str = "1,2,4,8"
    """Numbers of ranks."""
    scaling: Literal["weak", "strong", "both"] = "both"
    """Keep batch and environments per rank, or divide them among ranks."""
    sync: Literal["gradients", "parameters", "both"] = "both"
    """What the ranks average."""
    total_steps: int | None = None
    """Of each rank, under strong scaling of all ranks together; by default some seconds of training."""
    rounds: int = 5
    """How often each is measured, in turns."""


@dataclass
class ProjectOptions(JsonOptions):
    """Computes what many ranks would reach from what few take, and checks that against measured jobs."""

    case: str = "cartpole-16"
    """As of `hvd-dqn bench loop`."""
    ranks: int = 512
    """The most ranks to compute for."""
    sync: Literal["gradients", "parameters"] = "gradients"
    """What the ranks average."""
    files: tuple[Path, ...] = ()
    """Results of `bench loop`, `allreduce` and `scaling` with --json; without, all is measured now."""
    latency: float | None = None
    """Of another network than this machine's, per hop, in microseconds."""
    bandwidth: float | None = None
    """Of another network than this machine's, in gigabytes per second."""
    rounds: int = 3
    """How often each is measured, where there are no files."""


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
    if options.json:
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
        raise InputError("--gate is for processes that run alone: ranks of one job wait for each other anyway.")

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
        _numbers("--ranks", options.ranks),
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


def _numbers(name: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise InputError(f"{name} takes numbers with commas between, such as 1,2,4. Received: {text}.")
    return [int(word) for word in words]


BENCHMARKS: dict[str, tuple[Any, Callable[[Any, World], Measured]]] = {
    "learner": (LearnerOptions, _bench_learner),
    "loop": (LoopOptions, _bench_loop),
    "allreduce": (AllreduceOptions, _bench_allreduce),
    "scaling": (ScalingOptions, _bench_scaling),
    "project": (ProjectOptions, _bench_project),
}
