"""Makes the parts of an agent from the settings."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hvd_dqn.agent.learner import Learner
from hvd_dqn.agent.networks import Network, build_network
from hvd_dqn.agent.objectives import Dqn, Objective
from hvd_dqn.agent.policy import Policy
from hvd_dqn.agent.preprocess import NoStatistics, Preprocess, RunningStatistics
from hvd_dqn.config import Config
from hvd_dqn.envs.actions import ActionSettings
from hvd_dqn.envs.environments import Environments
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.placement import compute_alone, compute_concurrently
from hvd_dqn.ranks.world import World
from hvd_dqn.storage.arrays import UNREADABLE
from hvd_dqn.storage.checkpoint import Snapshot
from hvd_dqn.training.evaluation import Evaluator

# Multiplications per minibatch from which a second thread pays for an MLP. Batch 64: at 256-256 (4 million) an update
# takes 327 us with one thread and 633 with two, at 512-512 (17) 1,039 and 1,167, at 1024-1024 (68) 4,656 and 3,870.
SHARED_PRODUCTS = 32_000_000
MOST_COPIES = 32  # for evaluation, on each rank: a thousand worker processes would be too many


def make_environments(config: Config, world: World, copies: int, vectorization: str, restarts: int = 0) -> Environments:
    env = config.env
    envs = Environments(
        env.id,
        copies,
        kwargs=env.kwargs,
        vectorization=vectorization,
        frame_stack=env.frame_stack,
        reward_scale=env.reward_scale,
        reward_clip=env.reward_clip,
        first_index=world.rank * copies,
        rank=world.rank,
        restarts=restarts,
        actions=ActionSettings(env.action_bins, config.agent.factored, env.action_mask == "auto"),
    )
    try:
        envs.find_masks()
    except InputError:
        envs.close()
        raise
    return envs


def make_statistics(config: Config, envs: Environments) -> RunningStatistics | NoStatistics:
    if not config.env.normalize_observation:
        return NoStatistics()
    frames = envs.frames
    if frames.categories is not None or frames.dtype != np.float32:
        received = f"{frames.categories} states" if frames.categories else frames.dtype
        raise InputError(
            f"--env.normalize_observation is for observations of real numbers. Received: {received} from {config.env.id}. "
            "Turn it off."
        )
    return RunningStatistics(frames.shape)


def make_preprocess(config: Config, envs: Environments) -> Preprocess:
    frames = envs.frames
    return Preprocess(
        frames.observation_shape, categories=frames.categories, normalizes=config.env.normalize_observation
    )


def make_objective(config: Config, envs: Environments) -> Objective:
    return Dqn(double=config.agent.double, loss=config.agent.loss, sizes=envs.choices.sizes)


def make_network(
    config: Config, envs: Environments, preprocess: Preprocess, objective: Objective, rng: np.random.Generator
) -> Network:
    agent = config.agent
    return build_network(
        agent.network,
        preprocess,
        envs.actions,
        objective,
        hidden=agent.hidden,
        dueling=agent.dueling,
        rng=rng,
        sizes=envs.choices.sizes,
    )


def _choose_threads(config: Config, envs: Environments, preprocess: Preprocess, world: World) -> None:
    learner = config.learner
    if config.agent.network == "mlp":
        widths = [math.prod(preprocess.input_shape), *config.agent.hidden, envs.actions]
        batch = learner.batch_size // (world.size if config.ranks.scaling == "strong" else 1)
        if batch * sum(a * b for a, b in itertools.pairwise(widths)) < SHARED_PRODUCTS:
            compute_alone()
    elif learner.overlap:  # an MLP acts in NumPy; other networks would wait for the whole phase
        compute_concurrently()


def make_learner(
    config: Config,
    envs: Environments,
    preprocess: Preprocess,
    world: World,
    rng: np.random.Generator,
    planned: int = 0,
) -> Learner:
    """The learner. `planned` is the number of updates that it will take."""
    learner, objective = config.learner, make_objective(config, envs)
    _choose_threads(config, envs, preprocess, world)
    return Learner(
        lambda: make_network(config, envs, preprocess, objective, rng),
        preprocess,
        objective,
        world,
        sync=config.ranks.sync,
        compression=config.ranks.compression,
        passes=config.ranks.backward_passes_per_step,
        adam_epsilon=learner.adam_epsilon,
        max_gradient_norm=learner.max_gradient_norm,
        xla=learner.xla,
        planned=planned,
        overlap=learner.overlap,
    )


def start_from(
    learner: Learner, preprocess: Preprocess, statistics: RunningStatistics | NoStatistics, snapshot: Snapshot
) -> None:
    """Loads both networks and the observation statistics of another run. The optimizer starts from zero.

    Raises InputError if that run's networks have other shapes.
    """
    own, taken = learner.state(), weights_of("online", snapshot) | weights_of("target", snapshot)
    expected = {name: array.shape for name, array in own.items() if name.startswith(("online/", "target/"))}
    received = {name: array.shape for name, array in taken.items()}
    if expected != received:
        different = next(name for name in (*expected, *received) if expected.get(name) != received.get(name))
        raise InputError(
            f"The weights of {snapshot.path} do not fit this network: expected {different} of shape "
            f"{expected.get(different)}, received {received.get(different)}. The observations, the actions and the "
            "layers must have the same shapes in both runs."
        )
    own = {name: array for name, array in own.items() if not name.startswith("acting/")}  # a copy of `online`
    restore_weights(learner, preprocess, statistics, snapshot._replace(arrays=own | taken))


def restore_weights(
    learner: Learner, preprocess: Preprocess, statistics: RunningStatistics | NoStatistics, snapshot: Snapshot
) -> None:
    """Raises InputError if the checkpoint was made by a network of another shape."""
    try:
        learner.load_state(snapshot.arrays)
        statistics.load_state(snapshot.state["normalizer"])
        preprocess.set_statistics(statistics.mean, statistics.scale)
    except UNREADABLE as error:
        raise InputError(f"The checkpoint {snapshot.path} does not fit these settings: {error}.") from None


def trained_network(config: Config, envs: Environments, world: World, snapshot: Snapshot) -> Network:
    """The network of a checkpoint, with its preprocessing.

    Without target network and optimizer. Raises InputError if the checkpoint was made by a network of another shape.
    """
    statistics, preprocess = make_statistics(config, envs), make_preprocess(config, envs)
    _choose_threads(config, envs, preprocess, world)
    network = make_network(config, envs, preprocess, make_objective(config, envs), np.random.default_rng(config.seed))
    try:
        statistics.load_state(snapshot.state["normalizer"])
        preprocess.set_statistics(statistics.mean, statistics.scale)
        load_variables(network.variables, weights_of("online", snapshot))
    except UNREADABLE as error:
        raise InputError(f"The checkpoint {snapshot.path} does not fit these settings: {error}.") from None
    network.refresh()
    return network


def weights_of(part: str, snapshot: Snapshot) -> dict[str, np.ndarray]:
    """The variables of the "online" or "target" network of a checkpoint, by their names in it: `online/0`, ..."""
    names = [name for name in snapshot.arrays if name.startswith(f"{part}/")]
    return {name: snapshot.arrays[name] for name in sorted(names, key=lambda name: int(name.rpartition("/")[2]))}


def load_variables(variables: Sequence[Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if the arrays do not fit, and then changes nothing."""
    expected, received = [tuple(variable.shape) for variable in variables], [array.shape for array in arrays.values()]
    if expected != received:
        raise ValueError(f"expected arrays of shapes {expected}, received {received}")
    for variable, array in zip(variables, arrays.values(), strict=True):
        variable.assign(array)


def make_policy(
    envs: Environments,
    values: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator | int | None = None,
) -> Policy:
    return Policy(values, envs.frames, envs.observation_space, envs.action_map, rng)


def make_evaluator(
    config: Config,
    world: World,
    values: Callable[[np.ndarray], np.ndarray],
    stop: Callable[[], bool] = lambda: False,
) -> Evaluator:
    """The evaluator of the policy with these `values`: [B, *observation_shape] -> [B, A]."""
    settings, copies = config.evaluation, min(-(-config.evaluation.episodes // world.size), MOST_COPIES)
    # Not the environment's own vector class: it takes one seed for all copies.
    mode = "async" if config.env.vectorization == "async" else "sync"
    envs = make_environments(config, world, copies, mode)
    return Evaluator(
        envs,
        make_policy(envs, values),
        world,
        epsilon=settings.epsilon,
        seed=config.seed,
        max_length=settings.max_episode_steps,
        stop=stop,
    )
