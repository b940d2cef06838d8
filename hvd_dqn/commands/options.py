"""The options of each command, read from the command line. Those of a training override a file or a preset."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, TypeVar, overload

from hvd_dqn.commands.words import asks_for_help, explain, fields_of, placed, show, spelled, split, unknown
from hvd_dqn.config import Config, Values, sections, setting, setting_names
from hvd_dqn.config_files import advice, configure, load_file, load_preset, presets, validated
from hvd_dqn.errors import InputError
from hvd_dqn.storage.run_directory import Run, name_of_env


class Options(Values):
    """The options of a command. Every boolean option is a flag."""

    without_dashes: ClassVar[str] = ""  # the name of the argument that is given first, without dashes


O = TypeVar("O", bound=Options)  # noqa: E741


class TrainOptions(Options):
    """Trains an agent. `hvd-dqn presets` lists the presets to start from."""

    config: Path | None = setting(None, "a YAML file of settings, such as a run's config.yaml; it lies over the preset")
    run_dir: Path | None = setting(None, "the directory of the run; by default runs/NAME-DATE-TIME")
    resume: bool = setting(False, "continue from the newest checkpoint in --run-dir")
    start_from: Path | None = setting(
        None,
        "start from the weights of the run in this directory: those of its best evaluation, else its newest",
        alias="from",
    )
    elastic: bool = setting(
        False,
        "continue without ranks that die, and with ranks that join; needs horovodrun's --host-discovery-script",
    )
    timeline: Path | None = setting(
        None,
        "write to this file when each rank was ready for each collective and how long it took; open it in chrome://tracing",
    )


class PlanOptions(TrainOptions):
    """Tells what a training on many ranks would do and take: batch, updates, memory, disk, time. Starts none of them.

    It measures one rank's share on this machine for some seconds and takes all options of `hvd-dqn train`.
    """

    ranks: int = setting(1, "how many ranks the job has", ge=1)
    ranks_per_node: int | None = setting(
        None,
        "how many of them share a node; none: one for each GPU of this machine or, without any, for each core",
        ge=1,
    )
    check: bool = setting(False, "only check that so many ranks can carry it out, which takes a second")
    latency: float | None = setting(
        None,
        "of the network, per hop; none: 2.9 within one node, else 30",
        unit="microseconds",
        source="2.9: measured; 30: chosen by us",
        gt=0,
    )
    bandwidth: float | None = setting(
        None,
        "of the network; none: 5.3 within one node, else 1.25",
        unit="gigabytes per second",
        source="5.3: measured; 1.25: chosen by us",
        gt=0,
    )
    as_json: bool = setting(False, "print one JSON object", alias="json")


T = TypeVar("T", bound=TrainOptions)


class EvaluateOptions(Options):
    """Plays episodes with a trained agent."""

    without_dashes = "run_dir"
    run_dir: Path = setting(..., "a directory that `hvd-dqn train` made")
    episodes: int = setting(100, "how many episodes are played, over all ranks", ge=1)
    seed: int = setting(1, "seed of the episodes", ge=0)
    epsilon: float = setting(0.0, "probability of a random action", ge=0, le=1)
    best: bool = setting(False, "take the weights of the best evaluation instead of the newest")
    as_json: bool = setting(False, "print one JSON object", alias="json")


class PlotOptions(Options):
    """Draws learning curves over total steps and over wall time."""

    without_dashes = "run_dirs"
    run_dirs: tuple[Path, ...] = setting(
        (), "directories that `hvd-dqn train` made; runs on equal numbers of ranks are drawn as one curve"
    )
    output: Path = setting(Path("curve.png"), "the picture")


class NoOptions(Options):
    """Lists the presets: where their settings come from, and what to expect."""


class JsonOptions(Options):
    """A command whose result can be JSON."""

    as_json: bool = setting(False, "print one JSON object", alias="json")


class DoctorOptions(JsonOptions):
    """Checks every rank: what it runs on, what is wrong and how to fix it, how long all-reduces take.

    With --env, or --config and settings, it checks an environment instead: Gymnasium's own checker, spaces, what the
    network will see, speed, and whether a run of it can be resumed exactly.
    """

    env: str | None = setting(None, "the id of an environment to check, as of --env.id")
    config: Path | None = setting(None, "a YAML file of settings, whose environment is checked")


def parse(kind: type[O], arguments: Sequence[str], prog: str) -> O:
    """Reads `arguments` into a `kind`. Raises InputError with one line if they do not fit."""
    known, first = fields_of(kind), kind.without_dashes
    if asks_for_help(arguments):
        defaults = {name: field.default for name, field in known.items()}
        show(
            f"usage: {prog}{f' {placed(first)}' if first else ''} [--option VALUE ...]",
            str(kind.__doc__),
            explain(known, defaults, first),
        )
    given, others = split(arguments, known, prog)
    if others:
        takes_several = first and known[first].annotation is not Path and known[first].annotation is not str
        if not first or first in given or (len(others) > 1 and not takes_several):
            raise InputError(unknown(others[-1], known, prog))
        given[first] = others if takes_several else others[0]
    return validated(kind, given, lambda name: placed(name) if name == first else spelled(name))


@overload
def read_settings(arguments: Sequence[str]) -> tuple[TrainOptions, str, Config]: ...


@overload
def read_settings(arguments: Sequence[str], kind: type[T]) -> tuple[T, str, Config]: ...


def read_settings(
    arguments: Sequence[str], kind: type[TrainOptions] = TrainOptions
) -> tuple[TrainOptions, str, Config]:
    """The options, the name of the run, and the settings: command line over file over preset over defaults.

    `kind` are the options of a command that takes a training's.
    """
    prog, options = "hvd-dqn train" if kind is TrainOptions else "hvd-dqn plan", fields_of(kind)
    if asks_for_help(arguments):
        _explain_train([word for word in arguments if word in presets()], kind, prog)
    given, others = split(arguments, {**options, **setting_names()}, prog, advice)
    if len(others) > 1:
        raise InputError(f"Name one preset. Received: {', '.join(others)}.")
    where = validated(kind, {name: value for name, value in given.items() if name in options}, spelled)
    settings = {name: value for name, value in given.items() if name not in options}
    name, base = _base(where, others[0] if others else None, settings.get("env.id"))
    if where.resume and not where.run_dir:
        raise InputError("--resume needs --run-dir DIR, the run to continue.")
    if where.resume and where.run_dir:
        name = Run(where.run_dir).name(otherwise=name)
    return where, name, configure(base, settings)


def read_doctor(arguments: Sequence[str]) -> tuple[DoctorOptions, Config | None]:
    """The options, and the settings of the environment to check, if one is named."""
    prog, options = "hvd-dqn doctor", fields_of(DoctorOptions)
    if asks_for_help(arguments):
        inside = {name: field for name, field in setting_names().items() if name.startswith("env.")}
        defaults = {name: field.default for name, field in inside.items()}
        show(
            f"usage: {prog} [--env ID | --config FILE] [--env.setting VALUE ...] [--option VALUE ...]",
            str(DoctorOptions.__doc__),
            explain(options, {name: field.default for name, field in options.items()}),
            f"SETTINGS of the environment\n{explain(inside, defaults)}",
        )
    given, others = split(arguments, {**options, **setting_names()}, prog, advice)
    if others:
        raise InputError(f"To check an environment, write --env {others[0]}. Received: {' '.join(others)}.")
    doctor = validated(DoctorOptions, {name: value for name, value in given.items() if name in options}, spelled)
    settings = {name: value for name, value in given.items() if name not in options}
    if doctor.env is not None:
        if "env.id" in settings:
            raise InputError("`--env` and `--env.id` are the same. Keep one of them.")
        settings["env.id"] = doctor.env
    if doctor.config is None and "env.id" not in settings:
        if settings:
            raise InputError("Which environment shall be checked? Add --env ID, or --config FILE.")
        return doctor, None
    return doctor, configure(load_file(doctor.config) if doctor.config else Config(), settings)


def _base(where: TrainOptions, preset: str | None, env_id: str | None) -> tuple[str, Config]:
    """The name of the run, and the settings that the command line overrides."""
    base = load_preset(preset) if preset else Config()
    if where.config:
        return preset or where.config.stem, load_file(where.config, base)
    if where.resume and where.run_dir:
        return Run(where.run_dir).resumed(preset)
    if preset:
        return preset, base
    if env_id:
        return name_of_env(env_id), base
    raise InputError(
        f"What shall be trained? Name a preset ({', '.join(presets())}), a --config FILE or an environment, --env.id ID."
    )


def _explain_train(named: Sequence[str], kind: type[TrainOptions], prog: str) -> None:
    """Shows every setting, with the values of the `named` preset instead of the defaults."""
    config = load_preset(named[0]) if named else Config()
    options, settings, values = fields_of(kind), setting_names(), config.model_dump()
    whole = {name: field for name, field in settings.items() if "." not in name}
    groups = []
    for section, group in sections().items():
        inside = {name: field for name, field in settings.items() if name.startswith(f"{section}.")}
        defaults = {f"{section}.{name}": value for name, value in values[section].items()}
        groups.append(f"SETTINGS of `{section}`\n{group.__doc__}\n{explain(inside, defaults)}")
    show(
        f"usage: {prog} PRESET | --config FILE | --env.id ID\n"
        f"       {' ' * len(prog)} [--section.setting VALUE ...] [--option VALUE ...]",
        f"{kind.__doc__}\n"
        "The command line wins over the file, the file over the preset, and the preset\nover the defaults.",
        "OPTIONS\n" + explain(options, {name: f.default for name, f in options.items()}),
        "SETTINGS of the whole run\n" + explain(whole, values),
        *groups,
    )
