"""Memory and open files of every rank of a long training, with an evaluation and a checkpoint every 5,000 total steps.

    python -m tests.faults.leaks [--minutes 31] [--ranks 2] [--out leaks.png]

Draws both over time, and prints what each rank gained from the second third of the time to the last.
"""

import argparse
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import psutil

from tests.ranks import BIN, ROOT

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of what it draws with

TRAIN = [
    "train", "cartpole", "--total_steps", "1000000000", "--evaluation.target_return", "None",
    "--evaluation.period", "5000", "--checkpoint.period", "5000",
]  # fmt: skip


def ranks_of(folder: Path) -> list[psutil.Process]:
    """In the order of their ranks."""
    found = psutil.process_iter(["cmdline", "name"])
    mine = [p for p in found if str(folder / "run") in (p.info["cmdline"] or []) and p.info["name"] == "hvd-dqn"]
    return sorted(mine, key=lambda p: int(p.environ()["OMPI_COMM_WORLD_RANK"]))


def watch(folder: Path, minutes: float, ranks: int) -> np.ndarray:
    """[samples, ranks, (minutes, megabytes, open files)]"""
    command = ["horovodrun", "-np", str(ranks), "hvd-dqn", *TRAIN, "--run_dir", str(folder / "run")]
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
    }
    samples = []
    with (folder / "out").open("w") as out:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            while not list((folder / "run/checkpoints").glob("*/MANIFEST.json")):
                assert launcher.poll() is None, (folder / "out").read_text()
                time.sleep(1)
            began, processes = time.monotonic(), ranks_of(folder)
            assert len(processes) == ranks
            while (now := (time.monotonic() - began) / 60) < minutes:
                samples.append([(now, p.memory_info().rss / 1e6, p.num_fds()) for p in processes])
                time.sleep(5)
            processes[0].send_signal(signal.SIGUSR1)
            launcher.wait(120)
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    return np.array(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=31)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("leaks.png"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = watch(Path(folder), options.minutes, options.ranks)
        steps = (Path(folder) / "run/metrics.csv").read_text().splitlines()[-1].split(",")[0]
    figure, (memory, files) = plt.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
    thirds = np.array_split(samples, 3)
    for rank in range(options.ranks):
        style = ("-", "--")[rank % 2]  # the ranks' lines lie on each other
        memory.plot(samples[:, rank, 0], samples[:, rank, 1], style, label=f"rank {rank}")
        files.plot(samples[:, rank, 0], samples[:, rank, 2], style, label=f"rank {rank}")
        before, after = (np.median(third[:, rank, 1:], axis=0) for third in thirds[1:])
        print(
            f"rank {rank}: {before[0]:.1f} MB and {before[1]:.0f} open files in the second third of {options.minutes:g} "
            f"minutes, {after[0]:.1f} MB and {after[1]:.0f} in the last"
        )
    print(f"{int(steps):,} total steps")
    for axes, what, highest in zip(
        (memory, files), ("resident memory, MB", "open files"), samples.max((0, 1))[1:], strict=True
    ):
        axes.set(xlabel="minutes", ylabel=what, ylim=(0, 1.2 * highest))
    memory.legend(frameon=False, loc="lower right")
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
