"""What works and how fast on this machine's GPUs: `tests/gpu/check.sh` runs it after the set-up.

One rank, then one per GPU (two on a machine without): the doctor, unit tests that touch devices, averaging, CartPole, images,
and the speed of updates. It writes one JSON file, prints one table, and says what it could not check.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hvd_dqn.bench.results import provenance
from tests.ranks import ROOT, run

DEVICE_TESTS = ("tests/unit/agent", "tests/unit/test_graphs.py", "tests/unit/ranks/test_placement.py")
CARTPOLE = ("hvd-dqn", "train", "cartpole", "--total-steps", "10000", "--evaluation.target-return", "None")
PIXELS = ("hvd-dqn", "bench", "loop", "pixels", "--total-steps", "4000", "--json")


class Step(NamedTuple):
    """A command, and what to read in its output for the table."""

    name: str
    command: tuple[str, ...]
    read: Callable[[str], str]
    on_cpu: bool = False  # hides the GPUs


def gpus() -> list[str]:
    """The names of this machine's NVIDIA GPUs."""
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except OSError:
        return []
    return re.findall(r"^GPU \d+: (.*?) \(UUID", said, re.MULTILINE)


def on(ranks: int, *command: str) -> tuple[str, ...]:
    return command if ranks == 1 else ("horovodrun", "-np", str(ranks), *command)


def steps(ranks: int, folder: Path) -> list[Step]:
    one, several = f"{folder}/one", f"{folder}/several"
    return [
        Step("doctor, one rank", ("hvd-dqn", "doctor", "--json"), doctor),
        Step("unit tests", ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *DEVICE_TESTS), last_line),
        Step(f"doctor, {ranks} ranks", on(ranks, "hvd-dqn", "doctor", "--json"), doctor),
        Step(f"doctor, {ranks} ranks on CPU", on(ranks, "hvd-dqn", "doctor", "--json"), doctor, on_cpu=True),
        Step("averaging, two ranks", on(2, "python", "tests/parallel/worker.py"), lambda said: "equal weights"),
        Step("CartPole, one rank", (*CARTPOLE, "--run-dir", one), result),
        Step(f"CartPole, {ranks} ranks", on(ranks, *CARTPOLE, "--run-dir", several), result),
        Step("images, one rank", PIXELS, loop),
        Step(f"images, {ranks} ranks", on(ranks, *PIXELS), loop),
        Step("updates", ("hvd-dqn", "bench", "learner", "--json"), learner),
    ]


def doctor(said: str) -> str:
    report = found(said)
    problems = "; ".join(report["problems"]) or "no problem"
    devices = ", ".join(f"GPU {gpu}" for rank in report["ranks"] for gpu in rank["gpus"]) or "CPU"
    speeds = "".join(f", {row['bytes']:,} B in {row['median']:,.0f} us" for row in report["allreduce"])
    nccl = "NCCL" if report["ranks"][0]["horovod"].get("nccl_built") else "no NCCL"
    return f"{devices}, {nccl}{speeds}: {problems}"


def found(said: str) -> dict[str, Any]:
    """The JSON object in the output of a command, which a launcher may have marked with the rank."""
    return json.loads(said[said.index("{") : said.rindex("}") + 1])


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1].strip("= ")


def result(said: str) -> str:
    return re.search(r"return [\d.]+ .* on \d+ ranks?", said)[0]


def loop(said: str) -> str:
    (row,) = found(said)["results"]
    return f"{row['steps_per_second']:,.0f} steps/s, {row['updates_per_second']:,.0f} updates/s"


def learner(said: str) -> str:
    rows = found(said)["results"]
    return ", ".join(f"{row['network']} {row['microseconds_per_update']['median']:,.0f} us" for row in rows)


def take(step: Step) -> dict[str, Any]:
    began = time.monotonic()
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if step.on_cpu else {}
    try:
        done = run(step.command, timeout=600, TF_CPP_MIN_LOG_LEVEL="2", PYTHONPATH=str(ROOT), **hidden)
        said, passed = done.stdout, done.returncode == 0
        about = step.read(said) if passed else " / ".join((said + done.stderr).strip().splitlines()[-3:])
    except Exception as error:  # of whatever kind: the other steps still tell something
        said, passed, about = "", False, f"{type(error).__name__}: {error}"
    row = {
        "step": step.name,
        "command": " ".join(step.command),
        "passed": passed,
        "result": about,
        "output": said[-4_000:],
    }
    print(f"| {step.name} | {'yes' if passed else 'NO'} | {time.monotonic() - began:.0f} s | {about} |", flush=True)
    return row | {"seconds": time.monotonic() - began}


def not_checked(names: list[str]) -> list[str]:
    """What this machine or this version leaves open."""
    missing = ["bfloat16 and several GPUs in one rank: not in this version"]
    if not names:
        missing.append("GPUs and NCCL: this machine shows none to nvidia-smi, so everything ran on its CPU")
    elif len(names) == 1:
        missing.append("averaging between GPUs: this machine has one, which one rank had alone")
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    options = parser.parse_args()
    names = gpus()
    # One GPU is one rank's; without any, two ranks share the cores.
    ranks = len(names) or 2
    print(
        f"{', '.join(names) or 'no GPU'}; {platform.processor() or platform.machine()}, Python {platform.python_version()}\n"
    )
    print("| check | passed | time | result |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = [take(step) for step in steps(ranks, Path(folder)) if ranks > 1 or "ranks" not in step.name]
    for text in not_checked(names):
        print(f"\nNot checked: {text}.")
    report = {**provenance(), "gpus": names, "steps": rows, "not_checked": not_checked(names)}
    options.out.write_text(json.dumps(report, indent=1))
    print(f"\nWritten to {options.out}.")
    sys.exit(0 if all(row["passed"] for row in rows) else 1)


if __name__ == "__main__":
    main()
