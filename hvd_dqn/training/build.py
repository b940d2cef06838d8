"""Makes the parts of an agent from the settings."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hvd_dqn.agent.learner import Learner
from hvd_dqn.agent.networks import Network, build_network
from hvd_dqn.agent.objectives import Categorical, Dqn, Munchausen, Objective, Quantile
from hvd_dqn.agent.policy import Policy
from hvd_dqn.agent.preprocess import NoStatistics, Preprocess, RunningStatistics
from hvd_dqn.agent.prioritized import PrioritizedReplay
from hvd_dqn.agent.replay import Replay
from hvd_dqn.agent.rewards import Rewards, StoredRewards
from hvd_dqn.config import Config
from hvd_dqn.envs.actions import ActionSettings
from hvd_dqn.envs.environments import Environments
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.placement import compute_alone, compute_concurrently
from hvd_dqn.ranks.world import World
from hvd_dqn.storage.arrays import UNREADABLE
from hvd_dqn.storage.checkpoint import Snapshot
from hvd_dqn.training.evaluation import Evaluator
from hvd_dqn.training.ledger import COUNTED

# Multiplications per minibatch from which a second thread pays for an MLP. Batch 64: at 256-256 (4 million) an update
# takes 327 us with one thread and 633 with two, at 512-512 (17) 1,039 and 1,167, at 1024-1024 (68) 4,656 and 3,870.
SHARED_PRODUCTS = 32_000_000
MOST_COPIES = 32  # for evaluation, on each rank: a thousand worker processes would be too many


def make_environments(
    config: Config, world: World, copies: int, vectorization: str, *, evaluates: bool = False
) -> Environments:
    """`copies` environments of this rank, for training or for evaluations."""
    env = config.env
    stores_rewards = env.normalize_reward  # as they come: see `hvd_dqn.envs.environments`
    envs = Environments(
        env.id,
        copies,
        kwargs=env.kwargs,
        wrappers=env.wrappers,
        max_episode_steps=env.max_episode_steps,
        vectorization=vectorization,
        frame_stack=env.frame_stack,
        observation_scale=env.observation_scale,
        normalize_observation=env.normalize_observation,
        reward_scale=1.0 if stores_rewards else env.reward_scale,
        reward_clip=None if stores_rewards else env.reward_clip,
        first_index=world.rank * copies,
        rank=world.rank,
        restarts=env.restart_failed_envs,
        holds=env.on_nonfinite == "hold",
        evaluates=evaluates,
        actions=ActionSettings(env.action_bins, config.agent.factored, env.action_mask == "auto"),
    )
    try:
        envs.find_masks()
    except InputError:
        envs.close()
        raise
    return envs


def make_one(config: Config, world: World) -> Environments:
    """One copy, to read its spaces or to act in."""
    return make_environments(config, world, 1, "native" if config.env.vectorization == "native" else "sync")


def make_rewards(config: Config, copies: int) -> Rewards | StoredRewards:
    env = config.env
    if not env.normalize_reward:
        return StoredRewards()
    return Rewards(copies, config.agent.gamma, scale=env.reward_scale, clip=env.reward_clip)


def make_statistics(config: Config, envs: Environments) -> RunningStatistics | NoStatistics:
    if not config.env.normalize_observation:
        return NoStatistics()
    layout = envs.frames.layout
    if not any(part.normalized for part in layout.parts):
        raise InputError(
            "--env.normalize_observation is for observations of real numbers, and for integers of more than one byte. "
            f"Received: {layout.describe()} from {config.env.id}. Turn it off."
        )
    return RunningStatistics(layout)


def make_preprocess(config: Config, envs: Environments) -> Preprocess:
    env, layout = config.env, envs.frames.layout
    if env.observation_scale is not None and all(part.divisor is None for part in layout.parts):
        raise InputError(
            "--env.observation_scale divides integers that are not normalised, and here are none. Received: "
            f"{layout.describe()} from {env.id}. Leave it out; real numbers are scaled by --env.normalize_observation "
            "or a wrapper."
        )
    default = type(env).model_fields["clip_observation"].default
    if env.clip_observation != default and not env.normalize_observation:
        raise InputError(
            "--env.clip_observation is in deviations, so it needs --env.normalize_observation true. "
            f"Received: {env.clip_observation:g}. Turn that on, or leave it at {default:g}."
        )
    if env.on_nonfinite == "hold" and all(part.dtype.kind != "f" for part in layout.parts):
        raise InputError(
            f"--env.on_nonfinite hold is for observations of real numbers. Received: {layout.describe()} from {env.id}, "
            "always finite. Leave it at stop."
        )
    return Preprocess(layout, env.clip_observation)


# Settings that only some objectives have.
OBJECTIVES_OF = {"loss": ("dqn", "munchausen"), "atoms": ("c51",), "support": ("c51",), "quantiles": ("quantile",)}


def make_objective(config: Config, envs: Environments) -> Objective:
    agent = config.agent
    for name, objectives in OBJECTIVES_OF.items():
        if agent.objective not in objectives and getattr(agent, name) != type(agent).model_fields[name].default:
            raise InputError(
                f"--agent.{name} has no effect with --agent.objective {agent.objective}: it is for {' and '.join(objectives)}. "
                f"Received: {getattr(agent, name)}. Leave it out."
            )
    if agent.objective == "dqn":
        return Dqn(double=agent.double, loss=agent.loss, sizes=envs.choices.sizes)
    if envs.choices.factored:
        raise InputError(
            f"--agent.objective {agent.objective} needs one choice among all actions, but those of {config.env.id} are "
            f"factored: {envs.action_map}. Choose --agent.objective dqn, or --agent.factored false with few --env.action_bins."
        )
    if agent.objective == "munchausen":
        return Munchausen(loss=agent.loss)
    if agent.objective == "quantile":
        return Quantile(double=agent.double, quantiles=agent.quantiles)
    low, high = agent.support
    if not low < high:
        raise InputError(f"--agent.support is a lowest and a highest return, like -10,10. Received: {low:g},{high:g}.")
    return Categorical(double=agent.double, support=np.linspace(low, high, agent.atoms).tolist())


def make_replay(config: Config, envs: Environments, slots: int, rng: np.random.Generator) -> Replay | PrioritizedReplay:
    """Rings of `slots` for each of the environments."""
    named: dict[str, Any] = {
        "frame_stack": config.env.frame_stack,
        "n_step": config.agent.n_step,
        "gamma": config.agent.gamma,
        "action_shape": envs.choices.shape,
        "mask_width": envs.actions if envs.masked else 0,
    }
    frames, exponent = envs.frames, config.replay.priority_exponent
    if exponent == 0:
        for name in ("importance_start", "importance_end"):
            if getattr(config.replay, name) != type(config.replay).model_fields[name].default:
                raise InputError(f"--replay.{name} has no effect without --replay.priority_exponent. Leave it out.")
        return Replay(slots, envs.copies, frames.shape, frames.dtype, rng, **named)
    return PrioritizedReplay(slots, envs.copies, frames.shape, frames.dtype, rng, exponent=exponent, **named)


def replay_memory(config: Config, envs: Environments, slots: int) -> int:
    """The bytes of that replay."""
    kind = PrioritizedReplay if config.replay.priority_exponent else Replay
    mask_width = envs.actions if envs.masked else 0
    return kind.memory_needed(slots, envs.copies, envs.frames.shape, envs.frames.dtype, envs.choices.shape, mask_width)


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


def counted(config: Config) -> tuple[str, ...]:
    """The columns of metrics.csv that only some settings have."""
    env = config.env
    columns = {"held_readings": env.on_nonfinite == "hold", "env_restarts": env.restart_failed_envs > 0}
    return tuple(name for name in COUNTED if columns[name])


def start_from(
    learner: Learner,
    preprocess: Preprocess,
    statistics: RunningStatistics | NoStatistics,
    rewards: Rewards | StoredRewards,
    snapshot: Snapshot,
) -> None:
    """Loads both networks and the statistics of another run. The optimizer starts from zero.

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
    restore_weights(learner, preprocess, statistics, rewards, snapshot._replace(arrays=own | taken))


def restore_weights(
    learner: Learner,
    preprocess: Preprocess,
    statistics: RunningStatistics | NoStatistics,
    rewards: Rewards | StoredRewards,
    snapshot: Snapshot,
) -> None:
    """Raises InputError if the checkpoint was made by a network of another shape."""
    try:
        learner.load_state(snapshot.arrays)
        statistics.load_state(snapshot.state["normalizer"])
        rewards.load_state(snapshot.state["rewards"])
        preprocess.set_statistics(statistics.mean, statistics.scale)
    except UNREADABLE as error:
        raise InputError(f"The checkpoint {snapshot.path} does not fit these settings: {error}.") from None


def trained_network(config: Config, envs: Environments, world: World, snapshot: Snapshot) -> Network:
    """The network of a checkpoint, with its preprocessing.

    Without target network and optimizer. Raises InputError if the checkpoint was made by a network of another shape.
    """
    preprocess = make_preprocess(config, envs)
    _choose_threads(config, envs, preprocess, world)
    network = make_network(config, envs, preprocess, make_objective(config, envs), np.random.default_rng(config.seed))
    try:
        statistics = read_statistics(config, envs, snapshot)
        preprocess.set_statistics(statistics.mean, statistics.scale)
        load_variables(network.variables, weights_of("online", snapshot))
    except UNREADABLE as error:
        raise InputError(f"The checkpoint {snapshot.path} does not fit these settings: {error}.") from None
    network.refresh()
    return network


def read_statistics(config: Config, envs: Environments, snapshot: Snapshot) -> RunningStatistics | NoStatistics:
    """The observation statistics of a checkpoint. Raises one of `UNREADABLE` if it was made without."""
    statistics = make_statistics(config, envs)
    statistics.load_state(snapshot.state["normalizer"])
    return statistics


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
    mode = {"async": "async", "native": "native"}.get(config.env.vectorization, "sync")
    # A vector class takes one seed for all its copies, and every episode has its own seed.
    envs = make_environments(config, world, 1 if mode == "native" else copies, mode, evaluates=True)
    try:
        envs.try_out()
    except InputError:
        envs.close()
        raise
    return Evaluator(
        envs,
        make_policy(envs, values),
        world,
        epsilon=settings.epsilon,
        seed=config.seed,
        max_length=settings.max_episode_steps,
        stop=stop,
    )
