"""Trains tasks with several seeds on one rank and on two, and prints the table of what they reached.

    python -m tests.learning.table [TASK ...] [--seeds 1 2 3] [--modes "1 rank" ...] [--again] [--out DIR]

What a run reached is kept in results/TASK.json, with its command and commit. A run that stands there with the same
command is not repeated, unless --again is given; so this goes on where it was broken off. One-rank runs go in pairs,
since each needs one core. DIR holds the runs themselves.
"""

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from hvd_dqn.bench.results import cpu, revision
from hvd_dqn.ranks.placement import cores
from hvd_dqn.storage.run_directory import Run
from tests.ranks import ROOT, run

HERE = Path(__file__).parent
MODES = {"1 rank": (1, "weak"), "2 ranks, weak": (2, "weak"), "2 ranks, strong": (2, "strong")}
PRESETS = ("cartpole", "acrobot", "mountaincar", "lunarlander")
# The words of `hvd-dqn train`, relative to the project's root.
TASKS = {preset: [preset] for preset in PRESETS} | {
    "minigrid-empty": ["--config", "tests/learning/minigrid.yaml"],
    "minigrid-doorkey": ["--config", "tests/learning/minigrid.yaml", "--env.id", "MiniGrid-DoorKey-5x5-v0"],
    "taxi": ["--config", "tests/learning/taxi.yaml"],
    "taxi-without-masks": ["--config", "tests/learning/taxi.yaml", "--env.action_mask", "off"],
    "halfcheetah": ["--config", "tests/learning/halfcheetah.yaml"],
    "halfcheetah-joint": [
        *("--config", "tests/learning/halfcheetah.yaml", "--env.action_bins", "3", "--agent.factored", "false")
    ],
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
# Ranks that share a core must hand it over while they wait: Open MPI, told of a slot for each, believes each has its own.
YIELD = {"OMPI_MCA_mpi_yield_when_idle": "1"}
TIMEOUT = 14_400  # for eight ranks on two cores
_writing = Lock()


def train(task: str, ranks: int, scaling: str, seed: int, out: Path, more: Sequence[str] = ()) -> Run:
    """The finished run, found in `out` or made now; `commit` in its run.json is that of the code that made it.

    `more` are settings, which must be the same for all runs in `out`.
    """
    made = Run(out / f"{task}-{ranks}-{scaling}-{seed}")
    if not made.exists or "result" not in made.about():
        shutil.rmtree(made.path, ignore_errors=True)  # of a run that was broken off
        launcher, commit = ["horovodrun", "-np", str(ranks)] if ranks > 1 else [], revision()
        words = [*command(task, scaling, seed), *more, "--run-dir", str(made.path)]
        crowded = YIELD if ranks > cores() else {}
        done = run([*launcher, *words], timeout=TIMEOUT, **ONE_THREAD, **crowded)
        if done.returncode:
            raise RuntimeError(f"{words} on {ranks} ranks ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        made.note(commit=commit)
    return made


def command(task: str, scaling: str, seed: int) -> list[str]:
    return ["hvd-dqn", "train", *TASKS[task], "--seed", str(seed), "--ranks.scaling", scaling]


def trained(
    task: str, ranks: int, scaling: str, seeds: Sequence[int], out: Path, more: Sequence[str] = ()
) -> list[Run]:
    """A run for each seed, as many at once as there are cores for their ranks."""
    with ThreadPoolExecutor(max(1, cores() // ranks)) as pool:
        return list(pool.map(lambda seed: train(task, ranks, scaling, seed, out, more), seeds))


def reached(task: str, ranks: int, scaling: str, seed: int, out: Path, again: bool) -> dict[str, Any]:
    """What this run reached, as it is kept or after training it."""
    words = shlex.join(command(task, scaling, seed))
    if not again:
        for row in kept(task):
            if (row["ranks"], row["command"]) == (ranks, words):
                return row
    about = train(task, ranks, scaling, seed, out).about()
    result = about["result"]
    row = {
        "ranks": ranks,
        "command": words,
        "commit": about["commit"],
        "cpu": cpu(),
        "return_mean": result["return_mean"],
        "episodes": result["episodes"],
        "total_steps": result["total_steps"],
        "seconds": round(result["seconds"], 1),
        "best": about["best"],  # of the evaluations: mean return, total steps
    }
    with _writing:
        others = [other for other in kept(task) if (other["ranks"], other["command"]) != (ranks, words)]
        rows = sorted([*others, row], key=lambda each: (each["ranks"], each["command"]))
        _file(task).parent.mkdir(exist_ok=True)
        _file(task).write_text("[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n")
    return row


def kept(task: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(_file(task).read_text()) if _file(task).exists() else []
    return rows


def _file(task: str) -> Path:
    return HERE / "results" / f"{task}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--again", action="store_true", help="repeat runs whose results are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/table")
    options = parser.parse_args()
    if unknown := set(options.tasks) - set(TASKS):
        parser.error(f"there is no task {', '.join(unknown)}. Expected: {', '.join(TASKS)}")
    print(f"| task | ranks | {' | '.join(f'seed {seed}' for seed in options.seeds)} |")
    print(f"|---|---|{'---|' * len(options.seeds)}")
    for task in options.tasks or PRESETS:
        for mode in options.modes:
            ranks, scaling = MODES[mode]
            with ThreadPoolExecutor(max(1, cores() // ranks)) as pool:
                jobs = [
                    pool.submit(reached, task, ranks, scaling, seed, options.out, options.again)
                    for seed in options.seeds
                ]
                rows = [job.result() for job in jobs]
            cells = [f"{row['return_mean']:,.4g} at {row['total_steps'] / 1000:.1f}k" for row in rows]
            print(f"| `{task}` | {mode} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
