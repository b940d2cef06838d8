"""Trains the presets with several seeds on one rank and on two, and prints the README's table of results.

    python -m tests.learning.table [--presets cartpole ...] [--seeds 1 2 3] [--out DIR]

Runs that are already finished in DIR are not repeated. One-rank runs go in pairs, since each needs one core.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.ranks import horovodrun, run

MODES = {"1 rank": (1, "weak"), "2 ranks, weak": (2, "weak"), "2 ranks, strong": (2, "strong")}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}


def train(preset: str, seed: int, mode: str, out: Path) -> dict:
    ranks, scaling = MODES[mode]
    folder = out / f"{preset}-{ranks}-{scaling}-{seed}"
    if not (folder / "run.json").exists():
        command = ["hvd-dqn", "train", preset, "--seed", str(seed), "--ranks.scaling", scaling, "--run_dir", folder]
        done = run(command, timeout=7200, **ONE_THREAD) if ranks == 1 else horovodrun(ranks, *command, timeout=7200)
        if done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return json.loads((folder / "run.json").read_text())["result"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["cartpole", "acrobot", "mountaincar", "lunarlander"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    options = parser.parse_args()
    print(f"| preset | ranks | {' | '.join(f'seed {seed}' for seed in options.seeds)} |")
    print(f"|---|---|{'---|' * len(options.seeds)}")
    for preset in options.presets:
        for mode, (ranks, _) in MODES.items():
            with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // ranks)) as pool:
                rows = list(pool.map(lambda seed: train(preset, seed, mode, options.out), options.seeds))  # noqa: B023
            cells = [f"{row['return_mean']:.1f} at {row['total_steps'] / 1000:.1f}k" for row in rows]
            print(f"| `{preset}` | {mode} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
