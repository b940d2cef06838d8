"""The command line of the benchmarks: `hvd-dqn bench NAME`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hvd_dqn.commands.options import JsonOptions, parse
from hvd_dqn.config import Counts, setting
from hvd_dqn.errors import InputError, nearest
from hvd_dqn.loading import load_with_tensorflow
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World


class LearnerOptions(JsonOptions):
    """Measures updates of three networks, with and without sampling."""


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
    """Measures Horovod's all-reduce with messages of five sizes."""


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
        for each, kind in BENCHMARKS.items():
            print(f"hvd-dqn bench {each:10}  {kind.__doc__}")
        return
    if name not in BENCHMARKS:
        raise InputError(
            f"There is no benchmark {name!r}.{nearest(name, BENCHMARKS)} Benchmarks: {', '.join(BENCHMARKS)}."
        )
    options = dict(in_step(world, lambda: parse(BENCHMARKS[name], arguments[1:], f"hvd-dqn bench {name}")))
    as_json = options.pop("as_json")
    benchmark = in_step(world, lambda: load_with_tensorflow(f"hvd_dqn.bench.{name}"))
    result = benchmark.measure(world, **options)
    if as_json:
        print(json.dumps(result))
        return
    from rich import print as show

    show(benchmark.render(result))


# Modules of hvd_dqn.bench: `measure` takes the world and the options by name, `render` shows its result to people.
BENCHMARKS: dict[str, type[JsonOptions]] = {
    "learner": LearnerOptions,
    "loop": LoopOptions,
    "allreduce": AllreduceOptions,
    "scaling": ScalingOptions,
    "project": ProjectOptions,
}
