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
    """Measures updates of three networks, with and without sampling."""


@dataclass
class LoopOptions(JsonOptions):
    """Measures whole training: cartpole-zoo, cartpole-16 or pixels."""

    case: tyro.conf.Positional[str] = ""
    """The settings: those of Stable-Baselines3's zoo for CartPole, 16 environments of it, or images."""
    total_steps: int | None = None
    """Summed over ranks; by default some seconds of training."""
    batch: int | None = None
    """Transitions per update on each rank; by default the case's."""
    envs: int | None = None
    """Environments on each rank; by default the case's."""
    sync: Literal["gradients", "parameters"] = "gradients"
    """What the ranks average."""
    overlap: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Step the environments while phases learn."""
    gate: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Before the measurement, print `ready` and wait for a line, so that several processes can begin together."""


@dataclass
class AllreduceOptions(JsonOptions):
    """Measures Horovod's all-reduce with messages of five sizes."""


@dataclass
class ScalingOptions(JsonOptions):
    """Measures jobs of several ranks against as many independent processes; starts all of them itself."""

    case: str = "cartpole-16"
    """As of `hvd-dqn bench loop`."""
    ranks: str = "1,2,4,8"
    """Numbers of ranks."""
    scaling: Literal["weak", "strong", "both"] = "both"
    """Keep batch and environments per rank, or divide them among ranks."""
    sync: Literal["gradients", "parameters", "both"] = "both"
    """What the ranks average."""
    total_steps: int | None = None
    """Per rank, under strong scaling summed over ranks; by default some seconds of training."""
    rounds: int = 5
    """How often each is measured, in turns."""


@dataclass
class ProjectOptions(JsonOptions):
    """Projects the efficiency of many ranks from measurements of few, and checks the projection on measured jobs."""

    case: str = "cartpole-16"
    """As of `hvd-dqn bench loop`."""
    ranks: int = 512
    """The most ranks to compute for."""
    sync: Literal["gradients", "parameters"] = "gradients"
    """What the ranks average."""
    files: tuple[Path, ...] = ()
    """What `bench loop`, `allreduce` and `scaling` printed with --json; without files, all is measured now."""
    latency: float | None = None
    """Of another interconnect than this machine's: microseconds per hop."""
    bandwidth: float | None = None
    """Of another interconnect than this machine's: gigabytes per second."""
    rounds: int = 3
    """How often each is measured, if no files are given."""


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
    kind, bench = BENCHMARKS[name]
    options = vars(in_step(world, lambda: parse(kind, arguments[1:], f"hvd-dqn bench {name}")))
    as_json = options.pop("json")
    result, render = bench(world, **options)
    if as_json:
        print(json.dumps(result))
        return
    from rich import print as show

    show(render(result))


Measured = tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]  # a result, and what renders it


def _bench_learner(world: World) -> Measured:
    from hvd_dqn.bench.learner import measure_learner, render_learner

    return measure_learner(world), render_learner


def _bench_loop(world: World, *, gate: bool, **options: Any) -> Measured:
    from hvd_dqn.bench.loop import measure_loop, render_loop

    if gate and world.size > 1:
        raise InputError("--gate is for independent processes: ranks of one job wait for each other anyway.")

    def ready() -> None:
        if gate:
            print("ready", flush=True)
            sys.stdin.readline()

    return measure_loop(world, **options, ready=ready), render_loop


def _bench_allreduce(world: World) -> Measured:
    from hvd_dqn.bench.allreduce import measure_allreduce, render_allreduce

    return measure_allreduce(world), render_allreduce


def _bench_scaling(world: World, *, ranks: str, scaling: str, sync: str, **options: Any) -> Measured:
    from hvd_dqn.bench.scaling import measure_scaling, render_scaling

    result = measure_scaling(
        ranks=_numbers("--ranks", ranks),
        scalings=("weak", "strong") if scaling == "both" else (scaling,),
        syncs=("gradients", "parameters") if sync == "both" else (sync,),
        say=tell,
        **options,
    )
    return result, render_scaling


def _bench_project(world: World, **options: Any) -> Measured:
    from hvd_dqn.bench.project import project_efficiency, render_projection

    return project_efficiency(**options, say=tell), render_projection


def _numbers(name: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise InputError(f"{name} takes numbers with commas between, such as 1,2,4. Received: {text}.")
    return [int(word) for word in words]


BENCHMARKS: dict[str, tuple[Any, Callable[..., Measured]]] = {  # options, and what takes them by their names
    "learner": (LearnerOptions, _bench_learner),
    "loop": (LoopOptions, _bench_loop),
    "allreduce": (AllreduceOptions, _bench_allreduce),
    "scaling": (ScalingOptions, _bench_scaling),
    "project": (ProjectOptions, _bench_project),
}
