"""The READMEs tell the truth: settings are the config's, commands are run by tests, links lead somewhere.

`python -m tests.unit.test_readme` writes hvd_dqn/SETTINGS.md anew.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from hvd_dqn import values
from hvd_dqn.commands.options import read_settings
from hvd_dqn.commands.words import shown
from hvd_dqn.config import Config, setting_names
from hvd_dqn.config_files import presets

ROOT = Path(__file__).resolve().parents[2]
README, SETTINGS, LEARNING = ROOT / "README.md", ROOT / "hvd_dqn/SETTINGS.md", ROOT / "tests/learning/README.md"
PAGES = [
    README,
    SETTINGS,
    *sorted(path for place in ("launch", "docker", "tests/*") for path in ROOT.glob(f"{place}/README.md")),
]
LONGEST = 10_500  # bytes of README.md: what a newcomer reads


# ---- The settings ----
INTRODUCTION = """# Settings

Made from `hvd_dqn/config.py` by `python -m tests.unit.test_readme`; `hvd-dqn train --help` says the same.

On the command line options are written as below; underscores work too. In YAML, `--learner.batch-size 64` is `batch_size: 64`
under `learner:`. The command line wins over the `--config` file, the file over the preset, the preset over these defaults.
Examples:

```sh
hvd-dqn train cartpole --env.normalize-observation true --evaluation.target-return none --agent.hidden 64,64
hvd-dqn train --env.id FrozenLake-v1 --env.kwargs '{"map_name": "8x8"}'
```

"Total steps" are steps summed over all environments of all ranks. A phase is the block of updates made every `train_period`
of them.
"""
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def settings_page() -> str:
    """All settings in a table for each section of the config, headed by the first line of the section's docstring."""
    sections: dict[str, list[str]] = {}
    for name, field in setting_names().items():
        sections.setdefault(name.rpartition(".")[0], []).append(row(name, field))
    page = INTRODUCTION
    for section, rows in sections.items():
        kind = Config.model_fields[section].annotation if section else Config
        page += f"\n## {section or 'the run'}\n\n{(kind.__doc__ or '').strip().splitlines()[0]}\n\n"
        page += (
            "\n".join(["| option | default | allowed | meaning | unit | source |", "|---|---|---|---|---|---|", *rows])
            + "\n"
        )
    return page


def row(name: str, field: Any) -> str:
    about = field.json_schema_extra
    cells = [
        f"`--{name.replace('_', '-')}`",
        f"`{shown(field.default)}`",
        values.expected(field.annotation, field.metadata),
        about["meaning"],
        about["unit"],
        about["source"],
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def test_the_page_of_settings_is_the_configs():
    assert SETTINGS.read_text() == settings_page(), "python -m tests.unit.test_readme writes it anew"


def test_every_option_that_a_page_names_is_a_setting():
    for page in PAGES:
        for option in re.findall(r"--([a-z]+\.[a-z][\w-]*)", page.read_text()):
            assert option.replace("-", "_") in setting_names(), f"{page}: --{option}"


# ---- The commands ----
class Run(NamedTuple):
    """A test (or what CI calls), and the command's words there: a regex that its code must contain, comments left out."""

    file: str
    words: str


class ByHand(NamedTuple):
    """What takes hours or another machine: the file that it leaves, and what is found there."""

    file: str
    words: str = ""


class NotRun(NamedTuple):
    """What nothing here can run: the page that says so, and its words."""

    page: str
    words: str


# Where commands are run
CLI, LAUNCH, SLURM, HOSTS = (
    "tests/unit/test_cli.py", "tests/unit/test_launch_ranks.py", "tests/cluster/test_slurm.py", "tests/cluster/test_hosts.py",
)  # fmt: skip
IMAGE, LEARNS, ELASTIC = "tests/cluster/image.sh", "tests/learning/test_learning.py", "tests/faults/test_elastic.py"
RESULTS, FAULTS, HERE = "tests/benchmarks/results", "tests/faults/README.md", "tests/unit/test_readme.py"
CURVES = ByHand("tests/learning/cartpole.png")
NO_ENGINE = NotRun("docker/README.md", r"Not run at all: the Docker engine, Kubernetes, Apptainer, the GPU image")

#    what a command looks like, and what runs it
RUN_BY: list[tuple[str, list[Run | ByHand | NotRun]]] = [
    # The set-up
    (r"git clone REPOSITORY hvd_dqn|cd hvd_dqn|source \.venv/bin/activate", []),  # whoever is here has done it
    (r"\./launch/train\.sh cartpole", [
        Run(LAUNCH, r"\(\['cartpole'\], '2', \['cartpole'\]\)"),
        Run("tests/faults/test_training.py", r"ROOT / 'launch/train\.sh'"),
        Run(LEARNS, r"'hvd-dqn', 'train', 'cartpole'"),
    ]),
    (r"\./launch/test\.sh", [Run(".ci/run", r"exec \./launch/test\.sh")]),
    (r"\./launch/setup\.sh", [Run("launch/test.sh", r"^\./launch/setup\.sh"), Run(IMAGE, r"buildah bud")]),
    (r"pip install '\.\[cpu\]'", [Run("launch/setup.sh", r'-e "\.\[\$kind,box2d,dev\]"')]),
    # The command line
    (r"hvd-dqn presets", [Run(CLI, r"hvd_dqn\('presets'\)")]),
    (r"hvd-dqn train --help", [Run(CLI, r"hvd_dqn\('train', '--help'\)")]),
    (r"hvd-dqn train cartpole --seed 3 --run-dir runs/one", [Run(LEARNS, r"'train', 'cartpole'.*'--run_dir'")]),
    (r"hvd-dqn train cartpole --env\.normalize-observation .*", [Run(HERE, r"'--env\.normalize-observation', 'true'")]),
    (r"hvd-dqn train --env\.id FrozenLake-v1 .*", [Run(HERE, r"'--env\.id', 'FrozenLake-v1'")]),
    (r"hvd-dqn train cartpole --from runs/one", [Run("tests/unit/test_api.py", r"'hvd-dqn', 'train', 'identity', .*'--from'")]),
    (r"hvd-dqn train --config \S+", [Run(CLI, r"'train', '--config'")]),
    (r"hvd-dqn evaluate runs/one --episodes 100 --best", [Run(CLI, r"'evaluate', folder, '--best', '--episodes'")]),
    (r"hvd-dqn plot runs/\S+ runs/\S+ -o curve\.png", [Run(CLI, r"'plot', folder, folder, '-o'")]),
    (r"hvd-dqn plot runs/table/cartpole-\*", [Run(CLI, r"'plot', folder, folder"), CURVES]),
    # Several ranks
    (r"\./launch/horovodrun\.sh -np 2 train .*", [
        Run(LAUNCH, r"'horovodrun\.sh train cartpole'"),
        Run("tests/parallel/test_jobs_on_two_ranks.py", r"'train', '--run_dir', folder, '--resume'"),
    ]),
    (r"\./launch/mpirun\.sh -np 2 train cartpole", [
        Run(LAUNCH, r"'mpirun\.sh -np 2 "),
        Run(HOSTS, r"\['mpirun\.sh'\]"),
    ]),
    (r"\./launch/horovodrun\.sh -np 2 doctor", [Run(HOSTS, r"launcher, tmp_path, 'doctor'")]),
    (r"\./launch/(horovodrun|mpirun)\.sh -H alpha:2,beta:2 --interface eth0 train cartpole", [
        Run(LAUNCH, r"'\w+\.sh -H a\.x:\d,b\.x:\d .*--interface e0.* train cartpole'"),
        Run(HOSTS, r"launcher, tmp_path, 'train', 'identity'"),
    ]),
    (r"horovodrun -np 2 hvd-dqn train cartpole", [
        Run(LEARNS, r"'hvd-dqn', 'train', 'cartpole'"),
        Run("tests/ranks.py", r"\['horovodrun', .*'-np'"),
    ]),
    (r"mpirun -np 2 --bind-to none hvd-dqn train cartpole", [Run(IMAGE, r'"mpirun -np 2 --bind-to none hvd-dqn"')]),
    (r"horovodrun .*--host-discovery-script \./hosts\.sh hvd-dqn train cartpole --elastic .*", [
        Run(ELASTIC, r"'--host-discovery-script'"),
        Run(ELASTIC, r"'train', 'identity', '--elastic'"),
    ]),
    (r"hvd-dqn plan cartpole --ranks 64", [Run("tests/unit/commands/test_plan.py", r"'plan cartpole --ranks 512 --check")]),
    # Slurm
    (r"srun --mpi=pmix -n2 hvd-dqn doctor", [
        Run(SLURM, r"'srun', '--mpi=pmix', '--ntasks=2'"),
        Run(SLURM, r'"hvd-dqn", "doctor"'),
    ]),
    (r"srun --mpi=pmix --nodes=2 --ntasks-per-node=2 hvd-dqn train cartpole", [
        Run("launch/batch.sh", r"options=\(--mpi=pmix\)"),
        Run(SLURM, r"\('train', 2, 1\)"),
    ]),
    (r"sbatch (-.* )?launch/slurm/train\.sbatch .*", [
        Run(SLURM, r"'sbatch', '--parsable', \*options, path, \*words"),
        Run(SLURM, r"path = f'launch/slurm/\{script\}\.sbatch'"),
    ]),
    (r"sbatch --array=1-5 --ntasks-per-node=4 launch/slurm/seeds\.sbatch cartpole", [
        Run(SLURM, r"'seeds', \*LONG, options=\['--array=3,5', '--ntasks-per-node=1'"),
    ]),
    # Containers: by podman and buildah, which take the same words
    (r"docker (build|compose) -f docker/\S+ (-t hvd-dqn \.|build)", [
        Run(IMAGE, r"-f docker/Dockerfile"),
        NO_ENGINE,
    ]),
    (r"docker run --rm hvd-dqn( horovodrun -np 2 hvd-dqn)? (train cartpole|doctor)", [
        Run(IMAGE, r'podman run --rm "\$image" train identity'),
        Run(IMAGE, r'podman run --rm "\$image" horovodrun -np 2 hvd-dqn train identity'),
        NO_ENGINE,
    ]),
    (r"docker run --rm --user .*|mkdir -p runs", [Run(IMAGE, r"podman run --rm --user 4321"), NO_ENGINE]),
    (r"docker compose -f docker/compose\.yaml (run --rm head .*|down)", [
        Run(IMAGE, r"run --rm -T head train identity"),
        Run(IMAGE, r"run --rm -T head doctor"),
        Run(IMAGE, r"down -v"),
        NO_ENGINE,
    ]),
    (r"docker .*:gpu .*|docker save .*|apptainer .*|kubectl .*", [NO_ENGINE]),
    (r"tests/cluster/image\.sh && git commit .*", [
        Run("tests/cluster/test_docker.py", r"'tests/cluster/image\.sh', '--if-changed'"),
        ByHand("docker/PASSED"),
    ]),
    # Measurements
    (r"horovodrun -np 2 hvd-dqn bench allreduce", [ByHand(f"{RESULTS}/allreduce.json", r"hvd-dqn bench allreduce")]),
    (r"hvd-dqn bench scaling", [ByHand(f"{RESULTS}/scaling-zoo.json", r"hvd-dqn bench scaling")]),
    (r"hvd-dqn bench project", [ByHand(f"{RESULTS}/project-gradients.json", r"hvd-dqn bench project")]),
    (r"tests/benchmarks/setup\.sh", [ByHand(f"{RESULTS}/learner.json", r"sb3")]),
    (r"python -m tests\.benchmarks\.learner", [ByHand(f"{RESULTS}/learner.json", r"tests\.benchmarks\.learner")]),
    (r"python -m tests\.benchmarks\.loop", [ByHand(f"{RESULTS}/loop-zoo.json", r"tests\.benchmarks\.loop")]),
    (r"python -m tests\.benchmarks\.solve", [ByHand(f"{RESULTS}/solve-cartpole.json", r"tests\.benchmarks\.solve")]),
    (r"python -m tests\.benchmarks\.steps", [ByHand(f"{RESULTS}/steps.json", r"tests\.benchmarks\.steps")]),
    (r"python -m tests\.benchmarks\.pictures", [Run("tests/unit/test_pictures.py", r"pictures\.main\(\)")]),
    (r"python -m tests\.benchmarks\.gpu\.lower FOLDER", [ByHand(f"{RESULTS}/gpu-phase.json", r"gpu\.lower FOLDER")]),
    (r"python tests/benchmarks/gpu/phase\.py FOLDER( --convert)?", [
        ByHand(f"{RESULTS}/gpu-phase.json", r"gpu/phase\.py FOLDER --convert"),
    ]),
    (r"python -m tests\.learning\.table", [Run("tests/unit/test_pictures.py", r"table\.trained\("), CURVES]),
    (r"pytest tests/faults -rP", [Run("launch/test.sh", r'exec pytest "\$@"')]),
    (r"pytest -m slow( tests/faults -rP)?", [
        Run("tests/faults/test_death.py", r"pytest\.param\('mpirun', marks=pytest\.mark\.slow\)"),
    ]),
    (r"horovodrun -np 2 python -m tests\.benchmarks\.safety guards", [ByHand(FAULTS, r"1\.9 % \(1\.9 to 2\.2 in five rounds")]),
    (r"python -m tests\.benchmarks\.safety checkpoints --rounds 3", [ByHand(FAULTS, r"84 x 84 bytes, 4 stacked \| 100,000")]),
    (r"python -m tests\.faults\.leaks", [ByHand("tests/faults/leaks.png")]),
]  # fmt: skip


def commands(page: Path) -> list[str]:
    """The lines of the page's sh blocks, without comments; lines that end with a backslash go on."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [" ".join(line.split("  #")[0].split(" # ")[0].split()) for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def code(path: Path) -> str:
    """What a file does: its source without comments and docstrings, Python with one kind of quotes."""
    text = path.read_text(errors="replace")
    if path.suffix == ".py":
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                node.value.value = ""
        return ast.unparse(tree)
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def missing(proof: Run | ByHand | NotRun, root: Path = ROOT) -> str | None:
    """What is wrong with a proof, if anything."""
    path = root / proof[0]
    if not path.exists():
        return f"there is no {proof[0]}"
    text = code(path) if isinstance(proof, Run) else path.read_text(errors="replace")
    found = not proof.words or re.search(
        proof.words, " ".join(text.split()) if isinstance(proof, NotRun) else text, re.MULTILINE
    )
    return None if found else f"{proof[0]} does not contain {proof.words!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_run_by_something(page):
    for command in commands(page):
        proofs = [proof for pattern, proof in RUN_BY if re.fullmatch(pattern, command)]
        assert proofs, f"{page}: nothing is said to run `{command}`"


@pytest.mark.parametrize(
    ("pattern", "proofs"),
    [pytest.param(*entry, id=entry[0]) for entry in RUN_BY],
)
def test_what_is_said_to_run_a_command_does(pattern, proofs):
    assert [complaint for proof in proofs if (complaint := missing(proof))] == []
    assert any(re.fullmatch(pattern, command) for page in PAGES for command in commands(page)), f"no page has {pattern}"


def test_a_command_that_only_a_comment_names_counts_as_run_by_nothing(tmp_path):
    (tmp_path / "test_it.py").write_text('"""hvd-dqn train"""\n# hvd-dqn train\nrun(["hvd-dqn",\n  "plot"])\n')
    (tmp_path / "it.sh").write_text("# hvd-dqn train\nhvd-dqn plot\n")
    #                         proof                                                missing
    for proof, expected in [(Run("test_it.py", r"hvd-dqn train"),                True),
                            (Run("test_it.py", r"'hvd-dqn', 'plot'"),            False),
                            (Run("it.sh", r"hvd-dqn train"),                     True),
                            (Run("it.sh", r"hvd-dqn plot"),                      False),
                            (Run("gone.py", r""),                                True),
                            (ByHand("result.json"),                              True)]:  # fmt: skip
        assert bool(missing(proof, tmp_path)) == expected, proof


TAKEN = [
    (["cartpole", "--env.normalize-observation", "true", "--evaluation.target-return", "none", "--agent.hidden", "64,64"],
     {"env.normalize_observation": True, "evaluation.target_return": None, "agent.hidden": (64, 64)}),
    (["--env.id", "FrozenLake-v1", "--env.kwargs", '{"map_name": "8x8"}'],
     {"env.id": "FrozenLake-v1", "env.kwargs": {"map_name": "8x8"}}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), TAKEN)
def test_the_forms_of_settings_are_taken(words, expected):
    _, _, config = read_settings(words)
    for name, value in expected.items():
        section, inner = name.split(".")
        assert getattr(getattr(config, section), inner) == value, name


# ---- What else the pages say ----
def test_the_readme_is_short():
    assert len(README.read_bytes()) <= LONGEST


def test_every_preset_is_in_the_readme():
    for name in presets():
        assert f"`{name}`" in README.read_text()


def test_the_example_in_yaml_is_a_config():
    (block,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert Config.model_validate(yaml.safe_load(block)).total_steps == 200_000


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_in_python_can_be_parsed(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        ast.parse(block)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), f"{page}: {target}"
        assert not heading or heading in anchors(there), f"{page}: {target}#{heading}"


def test_the_table_of_results_sums_up_the_table_of_seeds():
    cells = r"^\| `(\w+)` \|(.*)\|$"
    seeds: dict[str, list[str]] = {}
    for name, rest in re.findall(cells, LEARNING.read_text(), flags=re.MULTILINE):
        runs = re.findall(r"(-?[\d.]+) at ([\d.]+)k", rest)
        returns, steps = ([float(run[i]) for run in runs] for i in (0, 1))
        seeds.setdefault(name, []).append(f"{min(returns)} to {max(returns)} ({min(steps)}k to {max(steps)}k)")
    results = {
        name: [cell.strip() for cell in rest.split("|")]
        for name, rest in re.findall(cells, README.read_text(), flags=re.MULTILINE)
        if " to " in rest
    }
    assert results == seeds
    assert len(seeds) == 4


def test_the_table_of_the_gpu_is_its_files():
    rows = json.loads((ROOT / RESULTS / "gpu-phase.json").read_text())["results"]
    text = (ROOT / "tests/benchmarks/README.md").read_text()
    table = [
        line.split(" | ")
        for line in text[text.index("## On a GPU") :].splitlines()
        if line.startswith(("| MLP", "| Nature"))
    ]
    told = {
        (int(row[1].replace(",", "")), kind, row[column])
        for row in table
        for kind, column in (("float32", 2), ("bfloat16", 5))
    }
    assert told == {(row["batch"], row["type"], f"{row['microseconds_per_update']:,.0f}") for row in rows}
    assert len(table) * 2 == len(rows)


if __name__ == "__main__":
    SETTINGS.write_text(settings_page())
