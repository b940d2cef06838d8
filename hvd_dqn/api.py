"""The Python API: train, evaluate, and load the policy of a run.

>>> import hvd_dqn
>>> result = hvd_dqn.train("identity", seed=1, run_dir="runs/mine")
>>> result.outcome, result.return_mean  # of 10 steps the best return is 10
('finished', 10.0)
>>> policy = hvd_dqn.load_policy("runs/mine")
>>> policy.act(3), policy.act([0, 2])  # in this environment the right action is the state itself
(3, array([0, 2]))

`train`, `evaluate` and `load_policy` work in this process alone, also in a notebook, and need neither MPI nor Horovod.
They print nothing, install no signal handlers and never end the process. They raise `InputError` for wrong input and
`RunError` if a training fails, both from `hvd_dqn.errors`. A launcher starts several ranks:
`horovodrun -np 4 hvd-dqn train ...`.

TensorFlow fixes its number of threads at the first training in a process, NumPy when it is first imported. The
environment variables `TF_NUM_INTRAOP_THREADS` and `OMP_NUM_THREADS` take precedence.

`hvd_dqn.training.Trainer` yields every record of a training, for example to a tuner.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from hvd_dqn.agent.policy import Policy
from hvd_dqn.config import Config
from hvd_dqn.config_files import configure, load_file, load_preset, presets
from hvd_dqn.errors import InputError
from hvd_dqn.job import (
    Evaluation,
    Result,
    evaluate_in_world,
    evaluation_settings,
    policy_of_run,
    train_in_world,
    warn,
    weights_of_run,
)
from hvd_dqn.ranks.placement import launched_ranks, thread_defaults
from hvd_dqn.ranks.world import Solo
from hvd_dqn.storage.run_directory import Run, name_of_env, new_or_given

T = TypeVar("T")


def train(
    preset_or_config: str | Path | Config | None = None,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    start_from: str | Path | None = None,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Result:
    """Trains to the end of the run, in this process alone.

    `preset_or_config` is the name of a preset, the path of a YAML file, or a `Config`; without it `env.id` must be
    given. `settings` override it, by nested names, `env={"id": "Acrobot-v1"}`, or by dotted names,
    `**{"env.id": "Acrobot-v1"}`. `seed=3` and `total_steps` belong to no section.

    The run is saved in `run_dir`, by default runs/NAME-DATE-TIME. `resume` continues from its newest checkpoint with
    the run's own settings; no preset is needed then. `start_from` is the directory of another run. The new run starts
    with that run's weights and observation statistics: those of its best evaluation, else its newest. `progress` prints
    what the command prints.

    `stop` is called every `ranks.vote_period` total steps and in every step of an evaluation. Once it returns True, the
    run is saved and the outcome is "stopped". Ctrl-C (a notebook's interrupt) does the same and then raises
    KeyboardInterrupt. A second Ctrl-C raises it at once, while the training still saves in its thread: called in the
    main thread, this function trains in another one.

    Raises InputError for wrong input, before training starts, and RunError if the run cannot continue.
    """
    with thread_defaults():
        if launched_ranks() > 1:
            raise InputError(
                f"hvd_dqn.train trains in one process, and a launcher started {launched_ranks()}: "
                "start several ranks with `hvd-dqn train` instead."
            )
        name, config = _settings(preset_or_config, run_dir, resume, settings)
        source = None if start_from is None else Path(start_from)
        with new_or_given(run_dir, name) as path:
            return _interruptible(
                lambda asked: train_in_world(
                    config, name, Run(path), Solo(), lambda: asked() or bool(stop()),
                    resume=resume, start_from=source, progress=progress,
                )
            )  # fmt: skip


def evaluate(
    run_dir: str | Path, *, episodes: int = 100, seed: int = 1, epsilon: float = 0.0, best: bool = False
) -> Evaluation:
    """Plays `episodes` with the newest weights of a run, or with those of its best evaluation.

    Each action is random with probability `epsilon`. Gives the same numbers as `hvd-dqn evaluate` on any number of
    ranks. Raises InputError if there is no such run, or no readable checkpoint of it.
    """
    with thread_defaults():
        run = Run(Path(run_dir))
        config = evaluation_settings(run.config(), episodes, seed, epsilon)
        return evaluate_in_world(config, Solo(), weights_of_run(run, Solo(), best=best, say=warn))


def load_policy(run_dir: str | Path, best: bool = True, *, seed: int | None = None) -> Policy:
    """The policy of a run's best evaluation. With `best=False`, or if there was no evaluation: its newest policy.

    `seed` seeds its random actions. Makes one copy of the environment to read its spaces, and closes it. Raises
    InputError if there is no such run, no readable checkpoint of it, or no such environment.
    """
    with thread_defaults():
        return policy_of_run(Run(Path(run_dir)), best=best, seed=seed)


def _settings(
    source: str | Path | Config | None, run_dir: str | Path | None, resume: bool, settings: dict[str, Any]
) -> tuple[str, Config]:
    """The run's name and its settings."""
    if resume and run_dir is None:
        raise InputError("--resume needs --run-dir DIR, the run to continue.")
    is_file = isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml")))
    if isinstance(source, Config):
        name, base = "run", source
    elif is_file:
        name, base = Path(str(source)).stem, load_file(Path(str(source)))
    elif resume and run_dir is not None and (source is None or isinstance(source, str)):
        name, base = Run(Path(run_dir)).resumed(source)
    elif isinstance(source, str):
        name, base = source, load_preset(source)
    elif source is None and (env_id := _env_id(settings)):
        name, base = name_of_env(env_id), Config()
    else:
        raise InputError(
            f"What shall be trained? Expected: a preset ({', '.join(presets())}), the path of a YAML file, a Config, "
            f"or env.id. Received: {source!r}."
        )
    if resume and run_dir is not None:
        name = Run(Path(run_dir)).name(otherwise=name)
    return name, configure(base, settings)


def _env_id(settings: Mapping[str, Any]) -> str | None:
    section = settings.get("env")
    return settings.get("env.id") or (section.get("id") if isinstance(section, Mapping) else None)


def _interruptible(work: Callable[[Callable[[], bool]], T]) -> T:
    """Does `work` so that Ctrl-C never interrupts a step. `work` gets a function that tells whether Ctrl-C was pressed.

    Python raises KeyboardInterrupt in the main thread only, at any point. So the work runs in another thread.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        return work(asked.is_set)
    thread = ThreadPoolExecutor(1, "hvd_dqn.train")
    result = thread.submit(work, asked.is_set)
    try:
        return result.result()
    except KeyboardInterrupt:
        asked.set()
        result.result()
        raise
    finally:
        thread.shutdown(wait=result.done())  # after a second Ctrl-C, do not wait
