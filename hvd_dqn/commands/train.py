"""`hvd-dqn train`: trains an agent with one process or many ranks."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from hvd_dqn.commands.options import TrainOptions, read_settings
from hvd_dqn.config import Config, Ranks
from hvd_dqn.errors import InputError
from hvd_dqn.loading import load_with_tensorflow
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.placement import is_elastic
from hvd_dqn.ranks.signals import StopRequest
from hvd_dqn.ranks.world import World
from hvd_dqn.storage.run_directory import Run, new_or_given

# sysexits.h's EX_TEMPFAIL: try again. Batch systems requeue on it.
STOPPED = 75
stop_request = StopRequest()


def run(arguments: Sequence[str], world: World) -> None:
    options, name, config = in_step(world, lambda: read_settings(arguments))
    _check_alike(options, config, world)  # first: if only some ranks stopped here, the others would wait for ever
    _check_elastic(options, config)
    in_step(world, lambda: _check_timeline(options, world))

    in_step(world, lambda: load_with_tensorflow("hvd_dqn.job"))  # bad input is reported before
    from hvd_dqn import job

    if options.elastic:
        assert options.run_dir is not None
        result = job.train_elastically(
            config, name, Run(options.run_dir), stop_request, resume=options.resume, start_from=options.start_from
        )
    else:
        with contextlib.ExitStack() as stack:

            def of_chief() -> str:
                return "" if world.rank else str(stack.enter_context(new_or_given(options.run_dir, name)))

            directory = Run(Path(world.gather(in_step(world, of_chief))[0]))
            if options.timeline:
                stack.enter_context(world.timeline(options.timeline))
            result = job.train_in_world(
                config, name, directory, world, stop_request, resume=options.resume, start_from=options.start_from
            )
        world.barrier()  # the launcher may kill the others once a rank ends: let all finish writing
    if result.outcome == "stopped":
        stop_request.ignore()
        sys.exit(STOPPED)


def _check_alike(options: TrainOptions, config: Config, world: World) -> None:
    """Raises InputError, on all ranks, if they were started differently: collectives would differ. A collective."""
    mine = config.digest(), options.resume, options.elastic, str(options.start_from), options.timeline is not None
    everyone = world.gather(mine)
    odd = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if odd:
        raise InputError(f"The ranks were started with different settings: ranks {odd} differ from rank 0.")


def _check_elastic(options: TrainOptions, config: Config) -> None:
    if options.elastic != is_elastic():
        raise InputError(
            "--elastic and horovodrun's --host-discovery-script belong together. Received: "
            + ("only --elastic." if options.elastic else "only the script: add --elastic to the training.")
        )
    if options.elastic and config.ranks.scaling == "strong":
        raise InputError(
            "--elastic needs --ranks.scaling weak: under strong scaling, a lost rank takes its share of environments with it."
        )
    watching = [name for name in ("silence_seconds", "stall_seconds") if getattr(config.ranks, name) != _default(name)]
    if options.elastic and watching:
        raise InputError(
            f"--ranks.{watching[0].replace('_', '-')} is for the watchdog, which an --elastic job does not have: Horovod "
            "itself notices lost ranks and goes on without them. Leave it out."
        )
    if options.elastic and not options.run_dir:
        raise InputError(
            "--elastic needs --run-dir DIR, on a file system that all hosts share: any rank may become the one that writes."
        )


def _default(name: str) -> object:
    return Ranks.model_fields[name].default


def _check_timeline(options: TrainOptions, world: World) -> None:
    if options.timeline is None:
        return
    if world.size == 1 or options.elastic:
        raise InputError(
            "--timeline is for two ranks or more without --elastic: it shows how ranks wait for each other."
        )
    try:
        if world.rank == 0:
            options.timeline.open("a").close()
    except OSError as error:
        raise InputError(f"--timeline {options.timeline} cannot be written: {error.strerror}.") from None
