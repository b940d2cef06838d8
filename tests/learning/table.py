"""Trains the presets with several seeds on one rank and on two, and prints the README's table of results.

    python -m tests.learning.table [--presets cartpole ...] [--seeds 1 2 3] [--out DIR]

Runs that are already finished in DIR are not repeated. One-rank runs go in pairs, since each needs one core.
"""

import argparse
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hvd_dqn.bench.results import revision
from hvd_dqn.ranks.placement import cores
from hvd_dqn.storage.run_directory import Run
from tests.ranks import run

MODES = {"1 rank": (1, "weak"), "2 ranks, weak": (2, "weak"), "2 ranks, strong": (2, "strong")}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
# Ranks that share a core must hand it over while they wait: Open MPI, told of a slot for each, believes each has its own.
YIELD = {"OMPI_MCA_mpi_yield_when_idle": "1"}
TIMEOUT = 14_400  # for eight ranks on two cores


def train(preset: str, ranks: int, scaling: str, seed: int, out: Path, more: Sequence[str] = ()) -> Run:
    """The finished run, found in `out` or made now; `commit` in its run.json is that of the code that made it.

    `more` are settings, which must be the same for all runs in `out`.
    """
    made = Run(out / f"{preset}-{ranks}-{scaling}-{seed}")
    if not made.exists or "result" not in made.about():
        shutil.rmtree(made.path, ignore_errors=True)  # of a run that was broken off
        launcher, commit = ["horovodrun", "-np", str(ranks)] if ranks > 1 else [], revision()
        words = ["train", preset, "--seed", str(seed), "--ranks.scaling", scaling, "--run_dir", str(made.path), *more]
        crowded = YIELD if ranks > cores() else {}
        done = run([*launcher, "hvd-dqn", *words], timeout=TIMEOUT, **ONE_THREAD, **crowded)
        if done.returncode:
            raise RuntimeError(f"{words} on {ranks} ranks ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        made.note(commit=commit)
    return made


def trained(
    preset: str, ranks: int, scaling: str, seeds: Sequence[int], out: Path, more: Sequence[str] = ()
) -> list[Run]:
    """A run for each seed, as many at once as there are cores for their ranks."""
    with ThreadPoolExecutor(max(1, cores() // ranks)) as pool:
        return list(pool.map(lambda seed: train(preset, ranks, scaling, seed, out, more), seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["cartpole", "acrobot", "mountaincar", "lunarlander"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    options = parser.parse_args()
    print(f"| preset | ranks | {' | '.join(f'seed {seed}' for seed in options.seeds)} |")
    print(f"|---|---|{'---|' * len(options.seeds)}")
    for preset in options.presets:
        for mode, (ranks, scaling) in MODES.items():
            rows: list[dict[str, Any]] = [
                made.about()["result"] for made in trained(preset, ranks, scaling, options.seeds, options.out)
            ]
            cells = [f"{row['return_mean']:.1f} at {row['total_steps'] / 1000:.1f}k" for row in rows]
            print(f"| `{preset}` | {mode} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
