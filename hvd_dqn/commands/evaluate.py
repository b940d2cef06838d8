"""`hvd-dqn evaluate`: plays episodes with a trained agent."""

import json
from collections.abc import Sequence

from hvd_dqn.commands.loading import loading
from hvd_dqn.commands.options import EvaluateOptions, parse
from hvd_dqn.errors import InputError, tell
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.world import World
from hvd_dqn.storage.checkpoint import Checkpoints, Snapshot
from hvd_dqn.storage.run_directory import Run


def run(arguments: Sequence[str], world: World) -> None:
    options = in_step(world, lambda: parse(EvaluateOptions, arguments, "hvd-dqn evaluate"))
    directory = Run(options.run_dir)
    checkpoints = Checkpoints(directory.path, world)
    config = world.gather(in_step(world, lambda: directory.config() if world.rank == 0 else None))[0]
    snapshot = in_step(
        world, lambda: _chosen_weights(checkpoints, directory, options.best) if world.rank == 0 else None
    )
    snapshot = world.gather(snapshot)[0]

    with loading():
        from hvd_dqn import api

    evaluation = config.evaluation.model_copy(update={"episodes": options.episodes, "epsilon": options.epsilon})
    row = api.evaluate(config.model_copy(update={"evaluation": evaluation, "seed": options.seed}), world, snapshot)
    if options.as_json:
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
