"""`hvd-dqn presets`: lists the presets."""

import math
from collections.abc import Sequence

from hvd_dqn.commands.options import NoOptions, parse
from hvd_dqn.config import Config
from hvd_dqn.config_files import load_preset, presets
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World


def run(arguments: Sequence[str], world: World) -> None:
    """Prints the leading comment of each preset, its source and expected result, and on how many ranks it runs."""
    in_step(world, lambda: parse(NoOptions, arguments, "hvd-dqn presets"))
    for name, text in presets().items():
        print(name)
        for line in text.splitlines():
            if not line.startswith("#"):
                break
            print(f"    {line.removeprefix('#').strip()}")
        print(f"    {sizes(load_preset(name))}")


def sizes(config: Config) -> str:
    """On how many ranks these settings can be trained, in words."""
    envs, batch = config.env.envs_per_rank, config.learner.batch_size
    divisors = [str(n) for n in range(1, envs + 1) if math.gcd(envs, batch) % n == 0]
    warm_up = config.learner.learn_start // (envs * config.agent.n_step)
    return (
        f"Ranks: any number with --ranks.scaling weak, above {warm_up} with a longer warm-up; "
        f"{', '.join(divisors[:-1])} or {divisors[-1]} with strong."
    )
