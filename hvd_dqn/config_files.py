"""Reads settings from presets, YAML files, the command line and Python, all in one way. Errors are one line."""

import difflib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from hvd_dqn.config import Config, Section, Values, sections, setting_names
from hvd_dqn.errors import InputError, nearest
from hvd_dqn.values import expected, read_yaml

V = TypeVar("V", bound=Values)
RENAMED = {"learner.replay_ratio": "learner.samples_per_insert"}
# Names of our settings in other libraries.
ELSEWHERE = {
    "lr": "learner.learning_rate",
    "learning_starts": "learner.learn_start",
    "train_freq": "learner.train_period",
    "train_frequency": "learner.train_period",
    "gradient_steps": "learner.samples_per_insert",
    "replay_ratio": "learner.samples_per_insert",
    "buffer_size": "replay.capacity",
    "memory_size": "replay.capacity",
    "replay_size": "replay.capacity",
    "target_update_interval": "learner.target_period",
    "target_network_frequency": "learner.target_period",
    "exploration_fraction": "agent.epsilon_steps",
    "exploration_final_eps": "agent.epsilon_end",
    "exploration_initial_eps": "agent.epsilon_start",
    "net_arch": "agent.hidden",
    "policy": "agent.network",
    "max_grad_norm": "learner.max_gradient_norm",
    "num_envs": "env.envs_per_rank",
    "n_envs": "env.envs_per_rank",
    "env_id": "env.id",
    "total_timesteps": "total_steps",
    "timesteps": "total_steps",
    "steps": "total_steps",
    "eval_freq": "evaluation.period",
    "save_freq": "checkpoint.period",
}


def presets() -> dict[str, str]:
    """The text of each preset by name. The leading comment tells its source and expected result."""
    folder = resources.files("hvd_dqn") / "presets"
    return {
        file.name.removesuffix(".yaml"): file.read_text() for file in sorted(folder.iterdir(), key=lambda f: f.name)
    }


def load_preset(name: str) -> Config:
    known = presets()
    if name not in known:
        raise InputError(f"There is no preset {name!r}.{nearest(name, known)} Presets: {', '.join(known)}.")
    return from_yaml(known[name], f"preset {name}")


def load_file(path: Path, base: Config | None = None) -> Config:
    """The settings of a YAML file, which override `base` or the defaults."""
    try:
        return from_yaml(path.read_text(), str(path), base)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Cannot read the settings in {path}: {error}. Expected: a YAML file like a run's config.yaml."
        ) from None


def from_yaml(text: str, origin: str, base: Config | None = None) -> Config:
    """The settings of a YAML text, which override `base` or the defaults; errors call the text `origin`."""
    try:
        settings = read_yaml(text)
        if settings is None or settings == {}:
            raise InputError("There are no settings in it. Write at least one, such as `env: {id: CartPole-v1}`.")
        return configure(base or Config(), settings)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that does not exist is a ValueError
        raise InputError(f"{origin} is not YAML: {' '.join(str(error).split())}") from None


def configure(base: Config, settings: Mapping[str, Any]) -> Config:
    """`base` with other `settings`, by nested names (`{"env": {"id": ...}}`), dotted ones (`{"env.id": ...}`) or both.

    Values may be text as on the command line: `"1e6"`, `"64,64"`. Raises InputError, in one line, for the first error.
    """
    values = base.model_dump()
    for name, value in _by_dotted_name(settings).items():
        section, _, inner = name.rpartition(".")
        (values[section] if section else values)[inner] = value
    return validated(Config, values)


def _by_dotted_name(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        raise InputError(f"Expected settings, such as `env: {{id: CartPole-v1}}`. Received: {_shown(settings)}.")
    dotted: dict[str, Any] = {}
    for name, value in settings.items():
        inside = _inside(name, value) if name in sections() else {str(name): value}
        for full_name, each in inside.items():
            if full_name not in setting_names():
                raise InputError(f"There is no setting `{full_name}`.{advice(full_name)}")
            if full_name in dotted:
                raise InputError(f"`{full_name}` is given twice. Keep one of them.")
            dotted[full_name] = each
    return dotted


def _inside(section: str, values: Any) -> dict[str, Any]:
    """The settings given in a section, by dotted names. An empty section changes nothing."""
    if isinstance(values, Section):
        values = values.model_dump()
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        name, field = next(iter(sections()[section].model_fields.items()))
        example = values if isinstance(values, str) and field.annotation is str else field.default
        raise InputError(
            f"`{section}` is a section: write its settings by name, such as `{section}: {{{name}: {example}}}`. "
            f"Received: {_shown(values)}."
        )
    return {f"{section}.{name}": value for name, value in values.items()}


def advice(name: str, spell: Callable[[str], str] = str) -> str:
    """What to add to a message about an unknown setting; `spell` writes names as the message must show them."""
    if name in RENAMED:
        return f" Its name is now `{spell(RENAMED[name])}`: write that instead."
    meant = [f"`{spell(known)}`" for known in _meant(name)]
    return f" Did you mean {' or '.join([', '.join(meant[:-1])] * (len(meant) > 1) + meant[-1:])}?" if meant else ""


def _meant(name: str) -> list[str]:
    """The settings that `name` may mean: by another library's name, by the end of a dotted name, or by similarity."""
    leaf = name.rpartition(".")[2]
    if name in sections():
        return [next(known for known in setting_names() if known.startswith(f"{name}."))]
    if leaf in ELSEWHERE:
        return [ELSEWHERE[leaf]]
    ending = [known for known in setting_names() if known.rpartition(".")[2] == leaf]
    if ending:
        return ending
    leaves = {known.rpartition(".")[2]: known for known in setting_names()}
    close = difflib.get_close_matches(name, [*(() if "." in name else sections()), *setting_names()], n=1, cutoff=0.5)
    return close or [leaves[each] for each in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5)]


def validated(kind: type[V], values: Mapping[str, Any], spell: Callable[[str], str] = str) -> V:
    """`values` as a `kind`. Raises InputError for the first value that does not fit; `spell` writes its name."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(_explained(kind, error, spell)) from None


def _explained(kind: type[Values], error: ValidationError, spell: Callable[[str], str]) -> str:
    first = error.errors()[0]
    names = [str(part) for part in first["loc"]]
    fields = setting_names() if kind is Config else {f.alias or name: f for name, f in kind.model_fields.items()}
    name = next((n for n in (".".join(names[:2]), names[0]) if n in fields), ".".join(names))
    if first["type"] == "missing":
        return f"`{spell(name)}` is missing."
    if isinstance(reason := first.get("ctx", {}).get("error"), InputError):
        return f"`{spell(name)}`: {reason}"
    field, received = fields[name], first["input"]
    yes = " (YAML reads yes, no, on and off as true and false)" if isinstance(received, bool) else ""
    text = expected(field.annotation, field.metadata)
    choices = [choice.strip("`") for choice in text.replace(" or ", ", ").split(", ")] if "`" in text else []
    meant = nearest(received, choices) if isinstance(received, str) else ""
    return f"`{spell(name)}` must be {text}. Received: {_shown(received)}{yes}.{meant}"


def _shown(value: Any) -> str:
    """`value` in one line, shortened if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
