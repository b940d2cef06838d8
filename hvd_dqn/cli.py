"""The console script: sets threads, connects the ranks, runs one command and turns errors into exit codes."""

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hvd_dqn import __version__
from hvd_dqn.errors import InputError, JobError, LibraryError, RunError, nearest, tell
from hvd_dqn.loading import load_tensorflow, loading
from hvd_dqn.ranks.limits import check_libraries_fit
from hvd_dqn.ranks.placement import (
    is_elastic,
    launched_rank,
    launched_ranks,
    local_rank,
    local_size,
    set_thread_defaults,
)

if TYPE_CHECKING:  # it imports NumPy, whose number of threads must be set first
    from hvd_dqn.ranks.world import World

# Seconds. Once a rank has ended mpirun ends the others, so those that say nothing wait for the one that tells why.
PATIENCE = 20.0
COMMANDS = ("train", "plan", "evaluate", "plot", "bench", "doctor", "presets")  # modules of hvd_dqn.commands

USAGE = """\
usage: hvd-dqn COMMAND ...

  train PRESET | --config FILE | --env.id ID
                                [--section.setting VALUE ...] [--run-dir DIR] [--resume] [--from RUN_DIR]
                                [--elastic] [--timeline FILE]
  plan PRESET | ...             [--ranks 64] [--ranks-per-node N] [--check] [--json] and all that `train` takes
  evaluate RUN_DIR              [--episodes 100] [--seed S] [--epsilon E] [--best] [--json]
  plot RUN_DIR...               [-o FILE.png]
  bench learner | allreduce     [--json]
  bench loop CASE               [--total-steps N] [--batch B] [--envs E] [--sync gradients | parameters] [--overlap] [--json]
  bench scaling                 [--case CASE] [--ranks 1,2,4,8] [--scaling weak | strong | both] [--rounds 5] [--json]
  bench project                 [--case CASE] [--ranks 512] [--files FILE ...] [--json]
  doctor                        [--env ID | --config FILE] [--env.setting VALUE ...] [--json]
  presets

Started by horovodrun, mpirun or srun, the same command is one rank of many.
`hvd-dqn COMMAND --help` explains a command; `hvd-dqn train --help` lists every setting.
"""


def main() -> None:
    """Runs one command. Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped on request after a checkpoint."""
    set_thread_defaults()
    # Console scripts lack this entry. It finds the user's own `module:EnvId` and `module:function`.
    sys.path.insert(0, os.getcwd())
    run_command(sys.argv[1:])


def run_command(argv: Sequence[str]) -> None:
    """Runs the command in `argv`, given without the program's name. Raises SystemExit if the exit code is not 0."""
    world: World | None = None
    try:
        with loading():
            from hvd_dqn.commands.train import stop_request
            from hvd_dqn.ranks.connect import connect
            from hvd_dqn.ranks.lockstep import in_step
            from hvd_dqn.ranks.world import Solo
        if argv[:1] == ["train"]:
            # Early, because connecting takes seconds. An elastic job's launcher ends single ranks with SIGTERM.
            stop_request.install(for_all="--elastic" not in argv)
        if any(word.partition("=")[0] == "--timeline" for word in argv):
            os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"  # Horovod reads this when it starts
        _check_size(argv)
        if argv and argv[0] in ("train", "evaluate", "bench", "doctor"):  # those that load TensorFlow
            check_libraries_fit(local_size())
        with loading():
            # A plan is made on a login node as well as inside a job, and starts nothing.
            world = Solo() if argv[:1] == ["plan"] else connect(examines=argv[:1] == ["doctor"])
        # Only the chief prints results.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if world.rank else sys.stdout):
            command = in_step(world, lambda: find_command(argv[0] if argv else "--help"))
            command(argv[1:], world)
    except InputError as error:
        # Before they are connected, the ranks of a host say the same, and those of other hosts may not.
        if local_rank() == 0 if world is None else world.rank == 0 or is_elastic():
            tell(str(error))
            if isinstance(error, LibraryError) and argv[:1] == ["doctor"]:
                from hvd_dqn.commands.host import show_host

                show_host("--json" in argv)
        elif world is None:
            time.sleep(PATIENCE)
        sys.exit(2)
    except JobError as error:
        assert world is not None
        if world.rank == 0 or is_elastic():  # elastic: any rank may fail alone, or may have become the chief
            tell(str(error))
        sys.exit(1)
    except (RunError, KeyboardInterrupt) as error:
        (world or Solo()).abort(str(error) or "interrupted")


def _check_size(argv: Sequence[str]) -> None:
    """Refuses a training that so many ranks cannot carry out before they are connected, which takes many seconds."""
    if argv[:1] != ["train"] or is_elastic() or launched_ranks() == 1:
        return
    from hvd_dqn.commands.plan import check_size

    try:
        check_size(argv[1:], launched_ranks())
    except InputError:
        if launched_rank() == 0:
            raise
        time.sleep(PATIENCE)
        sys.exit(2)


def find_command(name: str) -> "Callable[[Sequence[str], World], None]":
    if name == "doctor":  # the others import it after they have read their options
        load_tensorflow()
    if name in COMMANDS:
        with loading():
            run: Callable[[Sequence[str], World], None] = importlib.import_module(f"hvd_dqn.commands.{name}").run
        return run
    if name in ("-h", "--help"):
        return lambda arguments, world: print(USAGE, end="")
    if name == "--version":
        return lambda arguments, world: print(f"hvd-dqn {__version__}")
    raise InputError(f"There is no command {name!r}.{nearest(name, COMMANDS)} See `hvd-dqn --help`.")
