"""What each command takes: read from the command line, and for a training laid over a file or a preset."""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from hvd_dqn.config import Config, setting_names
from hvd_dqn.config_files import load_file, load_preset, presets
from hvd_dqn.errors import InputError, nearest
from hvd_dqn.storage.run_directory import Run

T = TypeVar("T")


@dataclass
class TrainOptions:
    """Trains an agent. PRESET names the settings to start from (see `hvd-dqn presets`)."""

    config: Path | None = None
    """A YAML file of settings, such as a run's config.yaml; it lies over the preset."""
    run_dir: Path | None = None
    """Where the run is kept; by default runs/PRESET-DATE-TIME."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on from the newest checkpoint in --run-dir."""
    start_from: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Start from the weights of another run: of its best evaluation, else its newest."""
    elastic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on without ranks that die, and with those that join; under horovodrun's --host-discovery-script."""
    timeline: Path | None = None
    """Where to write when each rank was ready for each collective, and how long it took; for chrome://tracing."""
    settings: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=Config)


@dataclass
class EvaluateOptions:
    """Plays episodes with a trained agent."""

    run_dir: tyro.conf.Positional[Path]
    """A directory that `hvd-dqn train` made."""
    episodes: int = 100
    """Episodes over all ranks."""
    seed: int = 1
    """Of the episodes."""
    epsilon: float = 0.0
    """Probability of a random action."""
    best: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the checkpoint with the best evaluation instead of the newest."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object."""


@dataclass
class PlotOptions:
    """Draws learning curves over total steps and over wall time."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories that `hvd-dqn train` made; runs on equally many ranks become one curve."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("curve.png")
    """The picture."""


@dataclass
class NoOptions:
    """Lists the presets: where their settings come from, and what to expect."""


@dataclass
class JsonOptions:
    """Looks at every rank: what it runs on, what is wrong and its cure, how long all-reduces take."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object."""


def parse(kind: type[T], arguments: Sequence[str], prog: str, default: T | None = None) -> T:
    """Reads `arguments` into a `kind`. Raises InputError with one line where they do not fit."""
    options, unknown = parse_known(kind, arguments, prog=prog, default=default)
    if unknown:
        known = [f"--{name}" for name in setting_names()] if kind is TrainOptions else []
        raise InputError(f"There is no option {unknown[0]!r}.{nearest(unknown[0], known)} See `{prog} --help`.")
    return options


def parse_known(kind: type[T], arguments: Sequence[str], **options: Any) -> tuple[T, list[str]]:
    """The same with what `kind` does not know, instead of complaining of it."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=arguments, return_unknown_args=True, use_underscores=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help, printed
        raise InputError(one_line(complaint.getvalue())) from None


def one_line(box: str) -> str:
    """The reason inside one of tyro's boxes, in the words of `Config`'s own errors."""
    text = " ".join(re.sub(r"^[│╭╰].*?[─╮╯]$|[│╭╮╰╯]", " ", box, flags=re.MULTILINE).split("─────")[0].split())
    pydantic = re.search(
        r"Error parsing (\S+): \d+ validation error for \w+ (\S+) (.*?) \[type=.*?, input_value=(.*?), input_type", text
    )
    if pydantic:
        section, name, reason, value = pydantic.groups()
        return f"`{section.removeprefix('settings.')}.{name}`: {reason}. Received: {value}."
    return text


def read_settings(arguments: Sequence[str]) -> tuple[TrainOptions, str, Config]:
    """The options, the name of the preset or file, and the settings: command line over file over preset over defaults."""
    preset = arguments[0] if arguments and not arguments[0].startswith("-") else None
    rest = list(arguments[1:] if preset else arguments)
    prog = f"hvd-dqn train {preset or 'PRESET'}"
    base = load_preset(preset) if preset else Config()
    # The file must be known before the settings on the command line can be laid over it.
    where, _ = parse_known(_Where, rest, prog=prog, add_help=False)
    name = preset or "run"
    if where.config:
        base, name = load_file(where.config, base), preset or where.config.stem
    elif where.resume and where.run_dir:
        name, base = _made_by(Run(where.run_dir), preset)
    elif not preset and not {"-h", "--help"} & set(rest):
        raise InputError(f"What shall be trained? Name a preset ({', '.join(presets())}) or a --config FILE.")
    options = parse(TrainOptions, rest, prog, TrainOptions(settings=base))
    if options.resume and not options.run_dir:
        raise InputError("--resume needs --run-dir DIR, the run to go on with.")
    return options, name, options.settings


@dataclass
class _Where:
    config: Path | None = None
    run_dir: Path | None = None
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def _made_by(run: Run, preset: str | None) -> tuple[str, Config]:
    """The name and the settings of the run that is to go on."""
    if not run.exists:
        raise InputError(f"There is nothing to resume in {run.path}: it holds no run. Start it without --resume.")
    made_by = str(run.about().get("preset"))
    if preset is not None and preset != made_by:
        raise InputError(f"{run.path} is a run of {made_by}, not of {preset}. Leave the preset out or name that one.")
    return made_by, run.config()
