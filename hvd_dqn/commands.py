"""The commands: reads the command line, starts the world, and shows what the rooms below report."""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hvd_dqn import __version__
from hvd_dqn.checkpoint import Checkpoints, Snapshot
from hvd_dqn.config import Config
from hvd_dqn.config_files import presets
from hvd_dqn.connect import connect
from hvd_dqn.distributed import Solo, World
from hvd_dqn.errors import InputError, JobError, RunError, nearest, tell
from hvd_dqn.lockstep import in_step
from hvd_dqn.options import EvaluateOptions, JsonOptions, NoOptions, PlotOptions, TrainOptions, parse, read_settings
from hvd_dqn.placement import is_elastic
from hvd_dqn.run import Run, default_path
from hvd_dqn.signals import StopRequest

# sysexits.h's EX_TEMPFAIL: come again. Batch systems requeue on it.
STOPPED = 75
stop_request = StopRequest()

USAGE = """\
usage: hvd-dqn COMMAND ...

  train PRESET | --config FILE  [--section.setting VALUE ...] [--run-dir DIR] [--resume] [--elastic] [--timeline FILE]
  evaluate RUN_DIR              [--episodes 100] [--seed S] [--epsilon E] [--best] [--json]
  plot RUN_DIR...               [-o FILE.png]
  bench learner | allreduce     [--json]
  bench loop CASE               [--total-steps N] [--batch B] [--envs E] [--sync gradients | parameters] [--overlap] [--json]
  bench scaling                 [--case CASE] [--ranks 1,2,4,8] [--scaling weak | strong | both] [--rounds 5] [--json]
  bench project                 [--case CASE] [--ranks 512] [--files FILE ...] [--json]
  doctor                        [--json]
  presets

Started by horovodrun, mpirun or srun, the same command is one rank of many.
`hvd-dqn COMMAND --help` explains a command; `hvd-dqn train --help` lists every setting.
"""


def run_command() -> None:
    """Carries out what the command line says. Ends with SystemExit where the exit code is not 0."""
    world: World | None = None
    try:
        if sys.argv[1:2] == ["train"]:
            # Before the seconds that the world takes to start. An elastic job's launcher ends single ranks by SIGTERM.
            stop_request.install(for_all="--elastic" not in sys.argv)
        if any(word.partition("=")[0] == "--timeline" for word in sys.argv):
            os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"  # which Horovod has to know before it starts
        with loading():
            world = connect()
        argv = sys.argv[1:]
        # Results are the chief's to print.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if world.rank else sys.stdout):
            command = in_step(world, lambda: find_command(argv))
            command(argv[1:], world)
    except InputError as error:
        if world is None or world.rank == 0 or is_elastic():
            tell(str(error))
        sys.exit(2)
    except JobError as error:
        assert world is not None
        if world.rank == 0 or is_elastic():  # there any rank may fail alone, or have become the chief
            tell(str(error))
        sys.exit(1)
    except (RunError, KeyboardInterrupt) as error:
        (world or Solo()).abort(str(error) or "interrupted")


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Nobody looks for garbage in what is imported meanwhile, for it stays.

    TensorFlow then takes 1.1 s instead of 1.5, and the end of the process 0.7 s less.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def find_command(argv: Sequence[str]) -> Callable[[Sequence[str], World], None]:
    name = argv[0] if argv else "--help"
    if name not in COMMANDS:
        raise InputError(f"There is no command {name!r}.{nearest(name, COMMANDS)} See `hvd-dqn --help`.")
    return COMMANDS[name]


def train(arguments: Sequence[str], world: World) -> None:
    options, name, config = in_step(world, lambda: read_settings(arguments))
    _check_elastic(options, config)
    in_step(world, lambda: _check_timeline(options, world))

    with loading():
        from hvd_dqn import job  # imports TensorFlow, which bad input should not have to wait for

    if options.elastic:
        assert options.run_dir is not None
        stopped = job.train_elastically(config, name, Run(options.run_dir), stop_request, resume=options.resume)
    else:
        digests = world.gather(config.digest())
        if len(set(digests)) > 1:
            odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise InputError(f"The ranks were started with different settings: ranks {odd} differ from rank 0.")
        run = Run(Path(world.gather(str(options.run_dir or default_path(name)))[0]))
        with world.timeline(options.timeline) if options.timeline else contextlib.nullcontext():
            stopped = job.train(config, name, run, world, stop_request, resume=options.resume)
        world.barrier()  # nobody's files are half-written when the launcher sees the first rank end
    if stopped:
        stop_request.ignore()
        sys.exit(STOPPED)


def _check_elastic(options: TrainOptions, config: Config) -> None:
    if options.elastic != is_elastic():
        raise InputError(
            "--elastic and horovodrun's --host-discovery-script belong together. Received: "
            + ("only --elastic." if options.elastic else "only the script: add --elastic to the training.")
        )
    if options.elastic and config.ranks.scaling == "strong":
        raise InputError(
            "--elastic needs --ranks.scaling weak: under strong scaling a lost rank takes its share of environments with it."
        )
    if options.elastic and not options.run_dir:
        raise InputError(
            "--elastic needs --run-dir DIR, which all hosts share: any rank may become the one that writes."
        )


def _check_timeline(options: TrainOptions, world: World) -> None:
    if options.timeline is None:
        return
    if world.size == 1 or options.elastic:
        raise InputError("--timeline is for two ranks or more that stay together: one alone has nobody to wait for.")
    try:
        if world.rank == 0:
            options.timeline.open("a").close()
    except OSError as error:
        raise InputError(f"--timeline {options.timeline} cannot be written: {error.strerror}.") from None


def evaluate(arguments: Sequence[str], world: World) -> None:
    options = in_step(world, lambda: parse(EvaluateOptions, arguments, "hvd-dqn evaluate"))
    if options.episodes < 1 or not 0 <= options.epsilon <= 1 or options.seed < 0:
        raise InputError(
            "--episodes must be at least 1, --seed at least 0 and --epsilon between 0 and 1. "
            f"Received: {options.episodes}, {options.seed}, {options.epsilon}."
        )
    run = Run(options.run_dir)
    checkpoints = Checkpoints(run.path, world)
    config = world.gather(in_step(world, lambda: run.config() if world.rank == 0 else None))[0]
    snapshot = in_step(world, lambda: _chosen_weights(checkpoints, run, options.best) if world.rank == 0 else None)
    snapshot = world.gather(snapshot)[0]

    with loading():
        from hvd_dqn import job

    evaluation = config.evaluation.model_copy(update={"episodes": options.episodes, "epsilon": options.epsilon})
    row = job.evaluate(config.model_copy(update={"evaluation": evaluation, "seed": options.seed}), world, snapshot)
    if options.json:
        print(json.dumps(row))
    else:
        print(
            f"return {row['return_mean']:.2f} ± {row['return_std']:.2f} (min {row['return_min']:g}, max "
            f"{row['return_max']:g}), length {row['length_mean']:.1f}, over {row['episodes']} episodes, "
            f"epsilon {options.epsilon:g}, with the weights after {row['total_steps']:,} total steps"
        )


def _chosen_weights(checkpoints: Checkpoints, run: Run, best: bool) -> Snapshot:
    snapshot = checkpoints.weights(None, tell)
    if best and snapshot is not None and snapshot.state["best"]:
        snapshot = checkpoints.weights(snapshot.state["best"][1], tell)
    if snapshot is None:
        raise InputError(f"There is nothing to evaluate in {run.path}: it has no usable checkpoint.")
    return snapshot


def plot(arguments: Sequence[str], world: World) -> None:
    options = in_step(world, lambda: parse(PlotOptions, arguments, "hvd-dqn plot"))
    in_step(world, lambda: _plot(options) if world.rank == 0 else None)


def _plot(options: PlotOptions) -> None:
    from hvd_dqn import plots

    if not options.run_dirs:
        raise InputError("Which runs shall be drawn? Name at least one run directory.")
    plots.plot(options.run_dirs, options.output)
    print(options.output)


def bench(arguments: Sequence[str], world: World) -> None:
    from hvd_dqn import bench_commands

    bench_commands.bench(arguments, world)


def doctor(arguments: Sequence[str], world: World) -> None:
    from rich import print as show

    with loading():
        from hvd_dqn import doctor as clinic

    options = in_step(world, lambda: parse(JsonOptions, arguments, "hvd-dqn doctor"))
    result = clinic.examine(world)
    print(json.dumps(result)) if options.json else show(clinic.render(result))


def list_presets(arguments: Sequence[str], world: World) -> None:
    """Prints the leading comment of each preset: its source and expected result."""
    in_step(world, lambda: parse(NoOptions, arguments, "hvd-dqn presets"))
    for name, text in presets().items():
        print(name)
        for line in text.splitlines():
            if not line.startswith("#"):
                break
            print(f"    {line.removeprefix('#').strip()}")


COMMANDS: dict[str, Callable[[Sequence[str], World], Any]] = {
    "train": train,
    "evaluate": evaluate,
    "plot": plot,
    "bench": bench,
    "doctor": doctor,
    "presets": list_presets,
    "--help": lambda arguments, world: print(USAGE, end=""),
    "-h": lambda arguments, world: print(USAGE, end=""),
    "--version": lambda arguments, world: print(f"hvd-dqn {__version__}"),
}
