"""For tests of shell scripts: a copy of them where nothing is installed, and an environment that asks for nothing."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ("PYTHON", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV", "CONDA_PREFIX")
PREFIXES = ("SLURM_", "PBS_", "LSB_", "HVD_DQN_", "HOROVOD_", "NCCL_", "TF_", "OMP_", "XLA_", "MALLOC_", "OMPI_MCA_")


def run(*command, env=None):
    plain = {k: v for k, v in os.environ.items() if k not in PLAIN and not k.startswith(PREFIXES)}
    return subprocess.run(
        [str(part) for part in command],
        env={**plain, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def copy_project(folder):
    """The scripts in a project that has no .venv."""
    shutil.copytree(ROOT / "launch", folder / "project" / "launch")
    shutil.copy(ROOT / "setup.cfg", folder / "project")
    return folder / "project"
