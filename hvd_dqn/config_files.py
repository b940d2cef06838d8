"""Presets and files of settings, laid over the defaults; what is wrong in them said in one line."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hvd_dqn.config import Config, setting_names
from hvd_dqn.errors import InputError, nearest


def presets() -> dict[str, str]:
    """The text of each preset by name, its source and expected result in the leading comment."""
    folder = resources.files("hvd_dqn") / "presets"
    return {
        file.name.removesuffix(".yaml"): file.read_text() for file in sorted(folder.iterdir(), key=lambda f: f.name)
    }


def load_preset(name: str) -> Config:
    known = presets()
    if name not in known:
        raise InputError(f"There is no preset {name!r}.{nearest(name, known)} Presets: {', '.join(known)}.")
    return parse(known[name], f"preset {name}")


def load_file(path: Path, base: Config | None = None) -> Config:
    try:
        return parse(path.read_text(), str(path), base)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Cannot read the settings in {path}: {error}. Expected: a YAML file like a run's config.yaml."
        ) from None


def parse(text: str, origin: str, base: Config | None = None) -> Config:
    """Lays the YAML `text` over `base` or the defaults; `origin` names it in errors."""
    try:
        return Config.model_validate(_laid_over((base or Config()).model_dump(), yaml.safe_load(text) or {}))
    except ValidationError as error:
        raise InputError(f"{origin}: {explain(error)}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise InputError(f"{origin} is not YAML: {' '.join(str(error).split())}") from None


def configure(base: Config, settings: Mapping[str, Any]) -> Config:
    """`base` with `settings` laid over it, by nested names ({"env": {"id": ...}}) or dotted ones ({"env.id": ...})."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = {**place.get(last, {}), **value} if isinstance(value, Mapping) else value
    try:
        return Config.model_validate(_laid_over(base.model_dump(), tree))
    except ValidationError as error:
        raise InputError(explain(error)) from None


def _laid_over(base: dict[str, Any], top: Any) -> Any:
    if not isinstance(top, dict):
        return top  # pydantic says what is wrong with it
    deeper = {name: _laid_over(base[name], value) for name, value in top.items() if isinstance(base.get(name), dict)}
    return base | top | {name: value for name, value in deeper.items() if name != "kwargs"}


def explain(error: ValidationError) -> str:
    """The first complaint of pydantic as one line that names the setting, what came, and the nearest valid name."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"There is no setting `{name}`.{nearest(name, setting_names())}"
    return f"`{name}`: {first['msg']}. Received: {first['input']!r}."
