"""`hvd-dqn plot`: draws learning curves."""

from collections.abc import Sequence

from hvd_dqn.commands.options import PlotOptions, parse
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World


def run(arguments: Sequence[str], world: World) -> None:
    options = in_step(world, lambda: parse(PlotOptions, arguments, "hvd-dqn plot"))
    in_step(world, lambda: _plot(options) if world.rank == 0 else None)


def _plot(options: PlotOptions) -> None:
    from hvd_dqn.reporting import plots

    if not options.run_dirs:
        raise InputError("Which runs shall be drawn? Name at least one run directory.")
    plots.plot(options.run_dirs, options.output)
    print(options.output)
