"""Every setting with its meaning, unit, default, limits and source."""

import hashlib
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, meaning: str, *, source: str, unit: str = "", **limits: Any) -> Any:
    """One setting. The unit and the source become part of its help text; `limits` are pydantic's (`ge`, `le`, ...)."""
    description = f"{meaning}{f', in {unit}' if unit else ''}. Source: {source}"
    return Field(
        default,
        description=description,
        json_schema_extra={"meaning": meaning, "unit": unit, "source": source},
        **limits,
    )


OURS = "chosen by us"
NATURE = "Mnih et al. 2015, Extended Data Table 1"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Env(Section):
    """The environment and its preprocessing."""

    id: str = setting("CartPole-v1", "Gymnasium id; `module:EnvId-v0` imports `module` first", source="Gymnasium")
    kwargs: dict[str, int | float | bool | str] = setting(
        {}, "keyword arguments for the environment", source="Gymnasium"
    )
    envs_per_rank: int = setting(
        8,
        "copies of the environment on each rank; under strong scaling the copies of all ranks together",
        source=OURS,
        ge=1,
    )
    vectorization: Literal["auto", "sync", "async"] = setting(
        "auto",
        "step the copies in this process (sync) or in one process each (async); auto takes the environment's own vector class "
        "for several copies where it has one, else sync",
        source="Gymnasium",
    )
    frame_stack: int = setting(
        1, "last observations stacked into one", unit="observations", source=f"{NATURE} (there 4)", ge=1
    )
    reward_scale: float = setting(1.0, "factor on the rewards that are learned from", source=OURS, gt=0)
    reward_clip: float | None = setting(
        None, "learn from rewards clipped to [-x, x], after scaling", source=f"{NATURE} (there 1)", gt=0
    )
    normalize_observation: bool = setting(
        False,
        "shift and scale observations by running mean and deviation over all ranks",
        source="OpenAI Baselines, VecNormalize",
    )
    restart_failed_envs: int = setting(
        0,
        "how often a rank makes all copies it trains with anew after one raised, died or returned a value that is not finite",
        source=OURS,
        ge=0,
    )


class Agent(Section):
    """What is learned: the network and its target."""

    network: str = setting("mlp", "`mlp`, `cnn`, or `module:function` returning a Keras model", source=f"cnn: {NATURE}")
    hidden: tuple[int, ...] = setting(
        (256, 256), "widths of the hidden layers", unit="neurons", source="Stable-Baselines3 zoo"
    )
    dueling: bool = setting(False, "separate value and advantage streams", source="Wang et al. 2016, arXiv:1511.06581")
    double: bool = setting(
        True, "choose the bootstrap action by the online network", source="van Hasselt et al. 2016, arXiv:1509.06461"
    )
    n_step: int = setting(
        1, "rewards summed before bootstrapping", unit="steps", source="Sutton & Barto 2018, ch. 7", ge=1
    )
    gamma: float = setting(0.99, "discount per step", source=NATURE, ge=0, le=1)
    loss: Literal["huber", "squared"] = setting(
        "huber", "loss of the temporal-difference error", source=f"{NATURE} (error clipping)"
    )
    epsilon_start: float = setting(1.0, "first probability of a random action", source=NATURE, ge=0, le=1)
    epsilon_end: float = setting(0.05, "last probability of a random action", source="Stable-Baselines3", ge=0, le=1)
    epsilon_steps: int = setting(
        10_000,
        "when the way from first to last ends, which begins at 0; until learn_start the first holds",
        unit="total steps",
        source=OURS,
        ge=0,
    )
    epsilon_zeta: float | None = setting(
        None,
        "hold a random action for n steps with a probability proportional to n**-x, so that epsilon is that of beginning one; "
        "none holds it for one step",
        source="Dabney et al. 2021, arXiv:2006.01782 (there 2)",
        gt=1,
    )
    epsilon_ladder: float = setting(
        0.0,
        "exponent that spreads epsilon over the environments; 0 gives all the same",
        source="Horgan et al. 2018 (there 7)",
        ge=0,
    )


class Replay(Section):
    """The memory of past transitions, in equal parts on all ranks."""

    capacity: int = setting(
        100_000, "transitions kept by all ranks together", unit="total steps", source="Stable-Baselines3 zoo", ge=1
    )


class Learner(Section):
    """How the network is fitted."""

    batch_size: int = setting(
        64,
        "transitions per update on each rank; under strong scaling those of all ranks together",
        source="Stable-Baselines3 zoo",
        ge=1,
    )
    samples_per_insert: float = setting(
        8.0, "transitions trained on per environment step, over all ranks", source=f"{NATURE} (32 per 4 steps)", gt=0
    )
    learn_start: int = setting(
        1_000, "collected before the first update", unit="total steps", source="Stable-Baselines3 zoo", ge=1
    )
    train_period: int = setting(64, "between phases of updates", unit="total steps", source=OURS, ge=1)
    target_period: int = setting(
        10_000,
        "between copies into the target network",
        unit="total steps",
        source=f"{NATURE}, there in parameter updates",
        ge=1,
    )
    learning_rate: float = setting(
        1e-3, "Adam's rate for one rank's batch", source="Kingma & Ba 2015, arXiv:1412.6980", gt=0
    )
    learning_rate_end: float = setting(
        1.0,
        "last learning rate as a fraction of the first, reached linearly at the end of the run",
        source=OURS,
        ge=0,
        le=1,
    )
    adam_epsilon: float = setting(1e-7, "Adam's denominator floor", source="Keras", gt=0)
    max_gradient_norm: float | None = setting(
        10.0, "global norm to which the averaged gradient is clipped", source="Stable-Baselines3", gt=0
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", "what a loss or gradient that is not finite does: stop the job, or skip that update", source=OURS
    )
    xla: bool | None = setting(
        None,
        "compile a phase with XLA, where ranks do not talk inside it; none does so for small networks in long runs",
        source=OURS,
    )
    overlap: bool = setting(
        False,
        "step the environments while a phase learns, with the weights from before it: pays where a rank has a "
        "second core",
        source=OURS,
    )


class Ranks(Section):
    """How the work is shared out and kept in step."""

    scaling: Literal["weak", "strong"] = setting(
        "weak", "keep environments and batch per rank (weak) or divide them among ranks (strong)", source="Horovod"
    )
    learning_rate_scaling: Literal["none", "sqrt", "linear"] = setting(
        "none",
        "how the learning rate grows with the global batch",
        source="sqrt: Krizhevsky 2014, arXiv:1404.5997; linear: Goyal et al. 2017, arXiv:1706.02677",
    )
    warmup_steps: int = setting(
        0,
        "way from the unscaled to the scaled learning rate after learn_start",
        unit="total steps",
        source="Goyal et al. 2017",
        ge=0,
    )
    sync: Literal["gradients", "parameters"] = setting(
        "gradients", "average gradients in every update, or parameters and optimizer slots after every phase",
        source="Horovod; McMahan et al. 2017, arXiv:1602.05629",
    )  # fmt: skip
    compression: Literal["none", "fp16"] = setting("none", "of gradients on the wire", source="Horovod")
    backward_passes_per_step: int = setting(
        1, "minibatches whose mean gradient each rank takes into one averaged update", source="Horovod", ge=1
    )
    drift_check_period: int = setting(
        10_000, "between comparisons of the weights of all ranks", unit="total steps", source=OURS, ge=1
    )
    vote_period: int = setting(
        500,
        "between votes on stopping, which any rank's SIGTERM, SIGINT or SIGUSR1 wins; a multiple of train_period is taken",
        unit="total steps",
        source=OURS,
        ge=1,
    )
    silence_seconds: float | None = setting(
        60.0,
        "end the job when a rank has not been heard for this long; none watches nobody",
        unit="s",
        source=OURS,
        ge=1,
    )
    stall_seconds: float = setting(
        1800.0, "end the job when a rank has finished no step for this long", unit="s", source=OURS, ge=1
    )


class Evaluation(Section):
    """Measuring the policy without exploration."""

    period: int = setting(5_000, "between evaluations", unit="total steps", source=OURS, ge=1)
    episodes: int = setting(20, "in each evaluation, over all ranks", unit="episodes", source=OURS, ge=1)
    final_episodes: int = setting(
        100, "in the evaluation that ends the run", unit="episodes", source="Stable-Baselines3 zoo", ge=1
    )
    max_episode_steps: int = setting(
        27_000, "longest evaluation episode", unit="steps", source="Mnih et al. 2015 (30 minutes of play)", ge=1
    )
    epsilon: float = setting(
        0.0, "probability of a random action", source="Stable-Baselines3 (Mnih et al. 2015: 0.05)", ge=0, le=1
    )
    target_return: float | None = setting(
        None, "stop when an evaluation reaches this mean return and one of `final_episodes` confirms it", source=OURS
    )


class Report(Section):
    """What is written during the run."""

    period: int = setting(1_000, "between rows of metrics.csv", unit="total steps", source=OURS, ge=1)


class Checkpoint(Section):
    """What is kept to go on from."""

    period: int = setting(25_000, "between checkpoints", unit="total steps", source=OURS, ge=1)
    keep: int = setting(
        3, "newest checkpoints kept; the weights of the best evaluation besides", unit="checkpoints", source=OURS, ge=1
    )
    save_replay: bool = setting(
        True, "keep the replay too, so that a resumed run goes on exactly; without it, it is filled anew", source=OURS
    )
    compress: bool = setting(False, "compress the replay by zlib, level 1", source=OURS)
    on_failure: Literal["stop", "continue"] = setting(
        "stop", "what a checkpoint that cannot be written does: stop the job, or go on without it", source=OURS
    )


class Config(Section):
    """One whole run."""

    total_steps: int = setting(
        50_000, "length of the run, over all environments of all ranks", unit="total steps", source=OURS, ge=1
    )
    seed: int = setting(0, "of every random stream", source=OURS, ge=0)
    env: Env = Env()
    agent: Agent = Agent()
    replay: Replay = Replay()
    learner: Learner = Learner()
    ranks: Ranks = Ranks()
    evaluation: Evaluation = Evaluation()
    report: Report = Report()
    checkpoint: Checkpoint = Checkpoint()

    def digest(self) -> str:
        """A short fingerprint, equal on ranks that were started with equal settings."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def setting_names() -> dict[str, Any]:
    """Every setting by its dotted name, as pydantic's FieldInfo."""
    names: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.default, Section):
            names |= {f"{name}.{inner}": info for inner, info in type(field.default).model_fields.items()}
        else:
            names[name] = field
    return names
