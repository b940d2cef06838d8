"""Writes and reads a run directory: the settings of a run and facts about it."""

import contextlib
import datetime
import itertools
import json
import shlex
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from hvd_dqn.config import Config, setting_names
from hvd_dqn.config_files import load_file
from hvd_dqn.errors import InputError
from hvd_dqn.loading import versions
from hvd_dqn.storage.arrays import write

# Settings that may not change in a run, because its replay holds what the environment returned under them.
TASK = (
    "env.id",
    "env.kwargs",
    "env.wrappers",
    "env.max_episode_steps",
    "env.observation_scale",
    "env.action_bins",
    "env.action_mask",
    "env.frame_stack",
    "env.reward_scale",
    "env.reward_clip",
    "env.normalize_observation",
    "env.clip_observation",
    "env.normalize_reward",
)
# Settings that may not change in a run, because its weights have the shapes that follow from them.
NETWORK = (
    *("agent.network", "agent.hidden", "agent.dueling", "agent.factored"),
    *("agent.objective", "agent.atoms", "agent.support", "agent.quantiles"),
)


class Run:
    """The directory of one run, with config.yaml (its settings) and run.json (facts about the job)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").exists()

    def create(self, config: Config, about: dict[str, Any], again: bool = False) -> None:
        """Makes the directory. Raises InputError if it cannot be written, or holds a run and not `again`."""
        if self.exists and not (again and self.about().get("ended") == "running"):
            raise InputError(
                f"{self.path} already holds a run. Continue it with --resume, or choose another --run-dir."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write(self.path / "config.yaml", config.to_yaml().encode())
            self._save(
                about | {"ended": "running", "started": now(), "command": shlex.join(sys.argv), "versions": versions()}
            )
        except OSError as error:
            raise _not_writable(self.path, error.strerror) from None

    def resume(self, config: Config, about: dict[str, Any], total_steps: int) -> None:
        """Records that the run is resumed, possibly with changed settings."""
        resume = {
            "total_steps": total_steps,
            "at": now(),
            "command": shlex.join(sys.argv),
            "size": about["size"],
            "changed": {
                name: {"from": old, "to": new} for name, (old, new) in differing(self.config(), config).items()
            },
        }
        resumes = [*self.about().get("resumes", []), resume]
        write(self.path / "config.yaml", config.to_yaml().encode())
        self.note(**about, resumes=resumes, ended="running")

    def config(self) -> Config:
        if not self.exists:
            raise InputError(
                f"{self.path} is no run: it has no run.json. Expected: a directory that `hvd-dqn train` made."
            )
        return load_file(self.path / "config.yaml")

    def resumed(self, preset: str | None) -> tuple[str, Config]:
        """The name and the settings of this run, to resume it. `preset` is the preset that the user named, if any."""
        if not self.exists:
            raise InputError(f"There is nothing to resume in {self.path}: it holds no run. Start it without --resume.")
        made_by = str(self.about().get("preset"))
        if preset is not None and preset != made_by:
            raise InputError(f"{self.path} is a run of {made_by}, not of {preset}. Name {made_by} or no preset.")
        return made_by, self.config()

    def name(self, otherwise: str) -> str:
        """The name of this run when it began, which a resume does not change; `otherwise` if there is no run yet."""
        return str(self.about().get("preset")) if self.exists else otherwise

    def about(self) -> dict[str, Any]:
        try:
            about = json.loads((self.path / "run.json").read_text())
            if not isinstance(about, dict):
                raise ValueError("its run.json holds no object")
            return about
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is no run: {error}. Expected: a directory that `hvd-dqn train` made."
            ) from None

    def note(self, **facts: Any) -> None:
        """Adds facts to run.json, for example how the run ended."""
        self._save(self.about() | facts)

    def _save(self, about: dict[str, Any]) -> None:
        write(self.path / "run.json", (json.dumps(about, indent=1, default=str) + "\n").encode())


def name_of_env(env_id: str) -> str:
    """The name of a run of this environment, if neither a preset nor a file names it."""
    return env_id.rpartition(":")[2].replace("/", "-")


def default_path(name: str) -> Path:
    """Makes and returns a new directory, runs/NAME-DATE-TIME, with a number appended if that exists already.

    It is made here so that two jobs that start in the same second have one each. Raises InputError if it cannot be made.
    """
    path = first = Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    numbers = itertools.count(2)
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not path.parent.is_dir():  # a link that leads nowhere
                raise _not_writable(path, "runs is no directory") from None
            path = first.with_name(f"{first.name}-{next(numbers)}")
        except OSError as error:
            raise _not_writable(path, error.strerror) from None


@contextlib.contextmanager
def new_or_given(directory: Path | str | None, name: str) -> Iterator[Path]:
    """`directory`, or a new one for a run of this name, which is removed again if nothing was written in it."""
    is_first = not Path("runs").exists()
    path = default_path(name) if directory is None else Path(directory)
    try:
        yield path
    finally:
        if directory is None:
            with contextlib.suppress(OSError):
                path.rmdir()
                if is_first:
                    path.parent.rmdir()


def _not_writable(path: Path, reason: str | None) -> InputError:
    return InputError(f"Cannot write the run directory {path}: {reason}. Choose another with --run-dir.")


def differing(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which the two differ, by dotted names: (old, new)."""
    both = {name: (attrgetter(name)(old), attrgetter(name)(new)) for name in setting_names()}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def check_same_task(run: Run, config: Config) -> None:
    """Raises InputError if a resume of `run` with these settings would learn another task or another network.

    The replay holds transitions of the old task, and the weights have the old layers' shapes.
    """
    for name, (old, new) in differing(run.config(), config).items():
        if name not in TASK + NETWORK:
            continue
        option = f"--{name.replace('_', '-')}"
        what = "learned another task" if name in TASK else "has another network"
        raise InputError(
            f"--resume continues {run.path} as it is, and with this setting it would be another one: it {what}. `{name}` "
            f"was {_shown(old)} and is {_shown(new)} now. Leave {option} out, or start a new run in another --run-dir."
        )


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
