"""`hvd-dqn presets`: lists the presets."""

from collections.abc import Sequence

from hvd_dqn.commands.options import NoOptions, parse
from hvd_dqn.config_files import presets
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World


def run(arguments: Sequence[str], world: World) -> None:
    """Prints the leading comment of each preset: its source and expected result."""
    in_step(world, lambda: parse(NoOptions, arguments, "hvd-dqn presets"))
    for name, text in presets().items():
        print(name)
        for line in text.splitlines():
            if not line.startswith("#"):
                break
            print(f"    {line.removeprefix('#').strip()}")
