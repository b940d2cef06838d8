"""`hvd-dqn evaluate`: plays episodes with a trained agent."""

import json
from collections.abc import Sequence

from hvd_dqn.commands.options import EvaluateOptions, parse
from hvd_dqn.errors import tell
from hvd_dqn.loading import load_with_tensorflow
from hvd_dqn.printing import few_printed_lines
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World
from hvd_dqn.storage.run_directory import Run


def run(arguments: Sequence[str], world: World) -> None:
    options = in_step(world, lambda: parse(EvaluateOptions, arguments, "hvd-dqn evaluate"))
    directory = Run(options.run_dir)
    # Bad input should not have to wait for TensorFlow, which the job imports.
    config = world.gather(in_step(world, lambda: directory.config() if world.rank == 0 else None))[0]
    in_step(world, lambda: load_with_tensorflow("hvd_dqn.job"))
    from hvd_dqn import job

    config = in_step(world, lambda: job.evaluation_settings(config, options.episodes, options.seed, options.epsilon))
    snapshot = job.weights_of_run(directory, world, best=options.best, say=tell)
    with few_printed_lines():
        result = job.evaluate_in_world(config, world, snapshot)
    if options.as_json:
        print(json.dumps(result._asdict()))
    else:
        print(
            f"return {result.return_mean:.4g} ± {result.return_std:.3g} (min {result.return_min:g}, max "
            f"{result.return_max:g}), length {result.length_mean:.1f}, over {result.episodes} episodes, "
            f"epsilon {options.epsilon:g}, with the weights after {result.total_steps:,} total steps"
        )
