"""The README tells the truth: its settings table is the config's, and each of its commands is run by a test.

`python -m tests.unit.test_readme` writes the table anew.
"""

import re
from pathlib import Path
from typing import Literal, get_args, get_origin

from hvd_dqn.config import setting_names
from hvd_dqn.config_files import presets

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FAULTS = ROOT / "tests/faults/README.md"
BEGIN, END = "<!-- settings: made by python -m tests.unit.test_readme -->\n", "<!-- end of settings -->"

#   what a command of the README looks like          where it is run
RUN_BY = {
    r"\./launch/train\.sh cartpole( .*)?": "tests/learning (cartpole on two ranks); .ci/run (the set-up)",
    r"\./launch/test\.sh( .*)?": ".ci/run",
    r"git clone .*|cd hvd_dqn": "whoever is here has done it",
    r"source \.venv/bin/activate": "launch/test.sh does the same by PATH",
    r"(horovodrun -np 2 )?hvd-dqn train (identity|cartpole)( .*)?": "tests/parallel, tests/unit/test_cli.py, tests/learning",
    r"\./launch/(horovodrun|mpirun)\.sh -np 2 (train .*|doctor)": "tests/cluster/test_hosts.py, tests/faults/test_training.py",
    r"\./launch/horovodrun\.sh -H alpha:2,beta:2 train cartpole": "tests/cluster/test_hosts.py (both launchers)",
    r"sbatch .*launch/slurm/train\.sbatch .*": "tests/cluster/test_slurm.py",
    r"hvd-dqn train --config .*": "tests/unit/test_cli.py",
    r"hvd-dqn train .*--resume": "tests/unit/test_cli.py",
    r"hvd-dqn evaluate runs/\S+( .*)?": "tests/unit/test_cli.py",
    r"hvd-dqn plot runs/.*": "tests/unit/test_cli.py",
    r"hvd-dqn presets|hvd-dqn train --help": "tests/unit/test_cli.py",
    r"(horovodrun -np 2 )?hvd-dqn doctor": "tests/unit/commands/test_doctor.py",
    r"(horovodrun -np 2 )?hvd-dqn bench learner( .*)?": "tests/unit/bench/test_learner.py",
    r"(horovodrun -np 2 )?hvd-dqn bench (allreduce|loop .*|scaling|project)": "tests/unit/bench/test_loop.py and others",
    r"horovodrun .*--host-discovery-script .* hvd-dqn train cartpole --elastic .*": "tests/faults/test_elastic.py",
    r"pytest tests/faults -rP": ".ci/run runs all tests",
    r"(horovodrun -np 2 )?python -m tests\.benchmarks\.safety (guards|checkpoints --rounds 3)": "by hand: it takes minutes",
    r"python -m tests\.faults\.leaks.*": "by hand: it takes half an hour",
    r"tests/benchmarks/setup\.sh|python -m tests\.benchmarks\.(learner|loop|solve|steps)": "by hand: PyTorch and hours",
    r"python -m tests\.benchmarks\.pictures": "tests/unit/test_pictures.py",
    r"python -m tests\.learning\.table.*": "by hand: it takes an hour",
    r"pytest -m slow( .*)?": "by hand: the marker says so",
}


def settings_table() -> str:
    rows = ["| setting | default | meaning | source |", "|---|---|---|---|"]
    for name, field in setting_names().items():
        extra = field.json_schema_extra
        meaning = extra["meaning"] + (f", in {extra['unit']}" if extra["unit"] else "")
        if get_origin(field.annotation) is Literal:
            meaning += f" ({', '.join(f'`{value}`' for value in get_args(field.annotation))})"
        rows.append(f"| `{name}` | `{field.default}` | {meaning} | {extra['source']} |")
    return "\n".join(rows) + "\n"


def commands() -> list[str]:
    text = README.read_text() + FAULTS.read_text()
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_settings_table_is_the_configs():
    text = README.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == settings_table()


def test_every_command_is_run_by_something():
    assert len(commands()) > 10
    for command in commands():
        assert any(re.fullmatch(pattern, command) for pattern in RUN_BY), command


def test_every_place_that_is_said_to_run_them_exists():
    for where in RUN_BY.values():
        for path in re.findall(r"tests/[\w/.]+|\.ci/run|launch/test\.sh", where):
            assert (ROOT / path).exists(), path


def test_every_preset_is_in_the_readme():
    for name in presets():
        assert f"`{name}`" in README.read_text()


def test_every_file_that_is_linked_exists():
    for page in (README, FAULTS):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), target


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(text[: text.index(BEGIN) + len(BEGIN)] + settings_table() + text[text.index(END) :])
