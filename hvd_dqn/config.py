"""Every setting with its meaning, unit, default, limits and source."""

import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from hvd_dqn.values import Call, plain, read_value


def setting(default: Any, meaning: str, *, unit: str = "", source: str = "", **limits: Any) -> Any:
    """One setting. `limits` are pydantic's (`ge`, `le`, ...). --help and the settings table show all arguments."""
    return Field(default, json_schema_extra={"meaning": meaning, "unit": unit, "source": source}, **limits)


OURS = "chosen by us"
NATURE = "Mnih et al. 2015, Extended Data Table 1"
Counts = tuple[Annotated[int, Field(ge=1)], ...]


class Values(BaseModel):
    """Immutable named values. Text is read by the type that is expected, so `1e6` can be a whole number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, written: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return read_value(written, cls.model_fields[info.field_name].annotation)


class Section(Values):
    """A group of settings."""


class Env(Section):
    """The environment and its preprocessing."""

    id: str = setting(
        "CartPole-v1", "Gymnasium id of the environment; `module:EnvId-v0` imports `module` first", source="Gymnasium"
    )
    kwargs: dict[str, Any] = setting(
        {}, "keyword arguments with which the environment is made; any value of YAML", source="Gymnasium"
    )
    wrappers: tuple[Call, ...] = setting(
        (),
        "wrappers around every copy, in training, evaluation and wherever else it is made, the first innermost; a class "
        "without a module is one of gymnasium.wrappers",
        source="Gymnasium",
    )
    max_episode_steps: int | None = setting(
        None,
        "an episode is truncated after this many, instead of the environment's own time limit; none keeps that",
        unit="steps",
        source="Gymnasium",
        ge=1,
    )
    envs_per_rank: int = setting(
        8,
        "copies of the environment on each rank; under strong scaling, on all ranks together",
        source=OURS,
        ge=1,
    )
    vectorization: Literal["auto", "sync", "async", "native"] = setting(
        "auto",
        "how the copies are stepped: `sync` in this process, `async` in one process each, `native` by the environment's own "
        "vector class, in evaluation too; `auto` takes that class for several copies in training if it has the spaces of the "
        "environment itself, else `sync`",
        source="Gymnasium",
    )
    frame_stack: int = setting(
        1,
        "how many of the last observations are stacked into one",
        source=f"{NATURE} (there 4)",
        ge=1,
        le=1_000,
    )
    observation_scale: float | None = setting(
        None,
        "integer observations are divided by this; none divides them by the largest absolute value that their space "
        "declares (255 for most images). For packages that declare more than they use: MiniGrid declares 255 and has 10",
        source=OURS,
        gt=0,
    )
    reward_scale: float = setting(
        1.0, "rewards are multiplied by this before learning; reported returns are not", source=OURS, gt=0
    )
    reward_clip: float | None = setting(
        None,
        "rewards are clipped to [-x, x] before learning, after scaling; none does not clip",
        source=f"{NATURE} (there 1)",
        gt=0,
    )
    normalize_observation: bool = setting(
        False,
        "subtract the running mean from observations and divide by the running standard deviation, both over all ranks; not "
        "from states and numbers of one byte",
        source="OpenAI Baselines, VecNormalize",
    )
    clip_observation: float = setting(
        10.0,
        "normalised observations are clipped to [-x, x]; only with `normalize_observation`",
        unit="standard deviations",
        source="OpenAI Baselines, VecNormalize",
        gt=0,
    )
    normalize_reward: bool = setting(
        False,
        "divide rewards by the running standard deviation of the discounted return over all ranks, before they are scaled and "
        "clipped; reported returns are not divided",
        source="OpenAI Baselines, VecNormalize",
    )
    on_nonfinite: Literal["stop", "hold"] = setting(
        "stop",
        "if an observation holds NaN or infinity: `stop` (or make the environment again, see `restart_failed_envs`), or `hold` "
        "the last finite value of that element in its episode, at an episode's beginning the running mean (0 without "
        "`normalize_observation`); a reward that is not finite always stops",
        source=OURS,
    )
    action_bins: int | None = setting(
        None,
        "values to choose from in each dimension of continuous actions, which need this setting: equally distant, from the "
        "lowest to the highest, so that 2 is bang-bang control",
        unit="values",
        source="Seyde et al. 2023, arXiv:2210.12566 (there 2 and 3)",
        ge=2,
        le=10_000,
    )
    action_mask: Literal["auto", "off"] = setting(
        "auto",
        "`auto`: where the environment says which actions are allowed, in info['action_mask'] or by its method action_mask(), "
        "the others are neither explored, nor chosen, nor bootstrapped from; `off`: masks are ignored",
        source="Gymnasium",
    )
    restart_failed_envs: int = setting(
        0,
        "how many times a rank may make its training environments again, and how many times those of its evaluations, after "
        "one raised an error, died, or returned NaN or infinity; ten failures within a hundred steps always end the job",
        source=OURS,
        ge=0,
    )


class Agent(Section):
    """What is learned: the network, its target and its exploration."""

    network: str = setting(
        "mlp",
        "`mlp`, `cnn`, `minatar` (one small convolution, for images of a few cells), or `module:function`, a function that "
        "returns a Keras model",
        source=f"cnn: {NATURE}; minatar: Young & Tian 2019, arXiv:1903.03176 (there with hidden 128)",
    )
    hidden: Counts = setting((256, 256), "widths of the hidden layers", unit="neurons", source="Stable-Baselines3 zoo")
    dueling: bool = setting(
        False,
        "estimate state value and advantages in two separate streams",
        source="Wang et al. 2016, arXiv:1511.06581",
    )
    factored: bool | None = setting(
        None,
        "for actions of several dimensions: a head for each dimension, and the value of an action is the mean of theirs; a "
        "Keras model then has an output for every choice of the first dimension, of the second, and so on; false: one choice "
        "among all combinations; none: factored from more than 128 combinations on",
        source="Seyde et al. 2023, arXiv:2210.12566; the 128: chosen by us",
    )
    objective: Literal["dqn", "munchausen", "c51", "quantile"] = setting(
        "dqn",
        "what the network learns of an action: its value (`dqn`; `munchausen`: with a bonus for likely actions and a soft "
        "maximum), probabilities of fixed returns (`c51`), or quantiles of its return (`quantile`)",
        source="Mnih et al. 2015; Vieillard et al. 2020, arXiv:2007.14430; Bellemare et al. 2017, arXiv:1707.06887; "
        "Dabney et al. 2018, arXiv:1710.10044",
    )
    atoms: int = setting(
        51,
        "how many equally distant returns have a probability; only with `objective` c51",
        source="Bellemare et al. 2017",
        ge=2,
    )
    support: tuple[float, ...] = setting(
        (-10.0, 10.0),
        "the lowest and the highest of these returns, as they are learned: scaled and clipped; only with `objective` c51",
        source="Bellemare et al. 2017, for clipped rewards",
        min_length=2,
        max_length=2,
    )
    quantiles: int = setting(
        200, "how many quantiles; only with `objective` quantile", source="Dabney et al. 2018, section 5.2", ge=1
    )
    double: bool = setting(
        True,
        "double DQN: the online network chooses the next action, and the target network values it; `munchausen` chooses none",
        source="van Hasselt et al. 2016, arXiv:1509.06461",
    )
    n_step: int = setting(
        1, "how many rewards are added up before bootstrapping", source="Sutton & Barto 2018, ch. 7", ge=1
    )
    gamma: float = setting(0.99, "discount factor per step", source=NATURE, ge=0, le=1)
    loss: Literal["huber", "squared"] = setting(
        "huber", "loss of the temporal-difference error", source=f"{NATURE} (error clipping)"
    )
    epsilon_start: float = setting(
        1.0, "probability of a random action at the start of the run", source=NATURE, ge=0, le=1
    )
    epsilon_end: float = setting(
        0.05, "probability of a random action after `epsilon_steps`", source="Stable-Baselines3", ge=0, le=1
    )
    epsilon_steps: int = setting(
        10_000,
        "epsilon falls linearly from `epsilon_start` to `epsilon_end` over this many, counted from the start of the run; "
        "before `learn_start` it stays at `epsilon_start`, and then drops to that line",
        unit="total steps",
        source=OURS,
        ge=0,
    )
    epsilon_zeta: float | None = setting(
        None,
        "ez-greedy exploration: a random action is repeated for n steps with a probability proportional to n**-x, where x "
        "is this setting; epsilon is the probability that a repetition begins; none: a random action lasts one step",
        source="Dabney et al. 2021, arXiv:2006.01782 (there 2)",
        gt=1,
    )
    epsilon_ladder: float = setting(
        0.0,
        "gives each environment its own epsilon: environment i of N uses epsilon**(1 + x * i / (N - 1)), where x is this "
        "setting; 0 gives all the same",
        source="Horgan et al. 2018 (there 7)",
        ge=0,
    )


class Replay(Section):
    """The memory of past transitions, in equal parts on all ranks."""

    capacity: int = setting(
        100_000,
        "how much the replay holds, over all ranks together",
        unit="transitions",
        source="Stable-Baselines3 zoo",
        ge=1,
    )
    priority_exponent: float = setting(
        0.0,
        "alpha: transitions are drawn with probabilities in proportion to priority**alpha; 0 draws all alike",
        source="Schaul et al. 2016, arXiv:1511.05952 (there 0.6); Hessel et al. 2018 (0.5)",
        ge=0,
        le=1,
    )
    importance_start: float = setting(
        0.4,
        "beta at the start: the loss of a transition is multiplied by (N * probability)**-beta, which at 1 undoes its more "
        "frequent drawing; only with `priority_exponent`",
        source="Schaul et al. 2016",
        ge=0,
        le=1,
    )
    importance_end: float = setting(
        1.0,
        "beta at the end of the run, to which it changes linearly; only with `priority_exponent`",
        source="Schaul et al. 2016",
        ge=0,
        le=1,
    )


class Learner(Section):
    """How the network is trained."""

    batch_size: int = setting(
        64,
        "minibatch of each rank; under strong scaling, of all ranks together",
        unit="transitions",
        source="Stable-Baselines3 zoo",
        ge=1,
    )
    samples_per_insert: float = setting(
        8.0,
        "transitions trained on for each environment step, over all ranks; divided by the global batch, it is what papers call "
        "replay ratio: updates for each step",
        source=f"{NATURE} (32 per 4 steps); the name: Cassirer et al. 2021, arXiv:2102.04736",
        ge=1e-6,
        le=1e6,
    )
    learn_start: int = setting(
        1_000, "how much is collected before the first update", unit="total steps", source="Stable-Baselines3 zoo", ge=1
    )
    min_updates: int = setting(
        0,
        "many ranks take few updates of large batches: a run of several goes on beyond `total_steps` until it has taken this "
        "many updates, or as many as one rank would take in `total_steps` if that is less",
        unit="updates",
        source=OURS,
        ge=0,
    )
    train_period: int = setting(64, "total steps between two phases of updates", unit="total steps", source=OURS, ge=1)
    target_period: int = setting(
        10_000,
        "total steps between two copies of the online network into the target network",
        unit="total steps",
        source=f"{NATURE}, there in parameter updates",
        ge=1,
    )
    learning_rate: float = setting(
        1e-3,
        "Adam's learning rate for the minibatch of one rank; `ranks.learning_rate_scaling` says how it grows with more ranks",
        source="Kingma & Ba 2015, arXiv:1412.6980",
        gt=0,
    )
    learning_rate_end: float = setting(
        1.0,
        "learning rate at the end of the run as a fraction of that at its start; it falls linearly",
        source=OURS,
        ge=0,
        le=1,
    )
    adam_epsilon: float = setting(1e-7, "Adam's epsilon, which is added to the denominator", source="Keras", gt=0)
    max_gradient_norm: float | None = setting(
        10.0,
        "the averaged gradient is clipped to this global norm; none does not clip",
        source="Stable-Baselines3",
        gt=0,
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", "if a loss or a gradient is NaN or infinite: `stop` the job, or `skip` that update", source=OURS
    )
    xla: bool | None = setting(
        None,
        "compile phases of updates with XLA, if ranks do not communicate inside a phase; none decides by itself: only small "
        "networks in long runs",
        source=OURS,
    )
    overlap: bool = setting(
        False,
        "step the environments while a phase of updates runs, with the weights from before it; helps if a rank has a second "
        "core",
        source=OURS,
    )


class Ranks(Section):
    """How the work is divided among ranks, and how they stay together."""

    scaling: Literal["weak", "strong"] = setting(
        "weak",
        "`weak`: every rank has `envs_per_rank` environments and a minibatch of `batch_size`; `strong`: all ranks together "
        "have them, in equal parts",
        source="Horovod",
    )
    learning_rate_scaling: Literal["none", "sqrt", "linear"] = setting(
        "none",
        "how the learning rate grows with the global batch: not at all, with its square root, or in proportion",
        source="sqrt: Krizhevsky 2014, arXiv:1404.5997; linear: Goyal et al. 2017, arXiv:1706.02677",
    )
    warmup_steps: int = setting(
        0,
        "after learning starts, the learning rate grows linearly from its unscaled to its scaled value over this time",
        unit="total steps",
        source="Goyal et al. 2017",
        ge=0,
    )
    sync: Literal["gradients", "parameters"] = setting(
        "gradients",
        "what is averaged over ranks: `gradients` in every update, or `parameters` and the optimizer's variables after every "
        "phase of updates",
        source="Horovod; McMahan et al. 2017, arXiv:1602.05629",
    )
    compression: Literal["none", "fp16"] = setting(
        "none", "how gradients are sent to other ranks: as they are, or as 16-bit floats", source="Horovod"
    )
    backward_passes_per_step: int = setting(
        1,
        "gradient accumulation: how many minibatches each rank averages into one update",
        source="Horovod",
        ge=1,
    )
    drift_check_period: int = setting(
        10_000,
        "total steps between two checks that all ranks have equal weights",
        unit="total steps",
        source=OURS,
        ge=1,
    )
    vote_period: int = setting(
        500,
        "all ranks stop, with a checkpoint, at the first vote after any rank received SIGTERM, SIGINT or SIGUSR1; this is the "
        "total steps between two votes, rounded up to a multiple of `train_period`",
        unit="total steps",
        source=OURS,
        ge=1,
    )
    silence_seconds: float | None = setting(
        60.0,
        "the job ends if nothing is heard from a rank for this long; none turns the watchdog off",
        unit="s",
        source=OURS,
        ge=1,
    )
    stall_seconds: float = setting(
        1800.0, "the job ends if no rank at all finishes a step for this long", unit="s", source=OURS, ge=1
    )


class Evaluation(Section):
    """How the policy is measured, without exploration."""

    period: int = setting(5_000, "total steps between two evaluations", unit="total steps", source=OURS, ge=1)
    episodes: int = setting(20, "length of each evaluation, over all ranks", unit="episodes", source=OURS, ge=1)
    final_episodes: int = setting(
        100,
        "length of the evaluation at the end of the run, over all ranks",
        unit="episodes",
        source="Stable-Baselines3 zoo",
        ge=1,
    )
    max_episode_steps: int = setting(
        27_000,
        "an evaluation episode is cut off after this many, and counts with its return so far",
        unit="steps",
        source="Mnih et al. 2015 (30 minutes of play)",
        ge=1,
    )
    epsilon: float = setting(
        0.0,
        "probability of a random action during evaluation",
        source="Stable-Baselines3 (Mnih et al. 2015: 0.05)",
        ge=0,
        le=1,
    )
    target_return: float | None = setting(
        None,
        "the run ends early when an evaluation reaches this mean return and a second one, of `final_episodes`, confirms it; "
        "none trains for all of `total_steps`",
        source=OURS,
    )


class Report(Section):
    """What is written during the run."""

    period: int = setting(1_000, "total steps between two rows of metrics.csv", unit="total steps", source=OURS, ge=1)


class Checkpoint(Section):
    """What is saved, so that a run can be resumed."""

    period: int = setting(25_000, "total steps between two checkpoints", unit="total steps", source=OURS, ge=1)
    keep: int = setting(
        3,
        "how many of the newest checkpoints are kept; the weights of the best evaluation are kept as well",
        source=OURS,
        ge=1,
    )
    save_replay: bool = setting(
        True,
        "save the replay too, so that a resumed run continues exactly; if false, a resumed run fills its replay again first",
        source=OURS,
    )
    compress: bool = setting(False, "compress the saved replay with zlib, level 1", source=OURS)
    on_failure: Literal["stop", "continue"] = setting(
        "stop", "if a checkpoint cannot be written: `stop` the job, or `continue` without that checkpoint", source=OURS
    )


class Config(Section):
    """All settings of a run."""

    total_steps: int = setting(
        50_000, "length of the run, over all environments of all ranks", unit="total steps", source=OURS, ge=1
    )
    seed: int = setting(0, "seed of all random numbers", source=OURS, ge=0)
    env: Env = Env()
    agent: Agent = Agent()
    replay: Replay = Replay()
    learner: Learner = Learner()
    ranks: Ranks = Ranks()
    evaluation: Evaluation = Evaluation()
    report: Report = Report()
    checkpoint: Checkpoint = Checkpoint()

    def digest(self) -> str:
        """A short hash. Ranks that were started with equal settings have equal hashes."""
        return hashlib.sha256(json.dumps(plain(self.model_dump()), sort_keys=True).encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        return yaml.safe_dump(plain(self.model_dump()), sort_keys=False)


def sections() -> dict[str, type[Section]]:
    """The sections of the settings by name."""
    return {
        name: type(field.default) for name, field in Config.model_fields.items() if isinstance(field.default, Section)
    }


def setting_names() -> dict[str, Any]:
    """Every setting by its dotted name, as pydantic's FieldInfo."""
    names = {name: field for name, field in Config.model_fields.items() if name not in sections()}
    for section, kind in sections().items():
        names |= {f"{section}.{name}": field for name, field in kind.model_fields.items()}
    return names
