"""The house has floors: imports point only downwards, and one room holds each outside library."""

import ast
from pathlib import Path

import pytest

import hvd_dqn

FLOORS = {
    0: ["errors", "config", "config_files", "schedules", "transition", "arrays", "signals", "placement"],
    1: ["plan", "graphs", "copies", "workers", "vectors", "places", "frames", "pixels", "identity", "projection"],
    2: ["adam", "envs", "networks", "losses", "replay", "distributed", "normalizer"],
    3: ["lockstep", "connect", "elastic", "actor", "learner", "metrics", "resharding", "watchdog"],
    4: ["evaluation", "checkpoint", "plots", "run", "progress"],
    5: ["parts", "agent", "trainer", "session", "bench", "bench_allreduce", "doctor"],
    6: ["job", "bench_jobs", "bench_loop", "bench_scaling", "bench_project"],
    7: ["options", "cli", "commands", "bench_commands", "__main__"],
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
ONLY_IN = {
    "horovod": {"distributed", "elastic"},
    "mpi4py": {"distributed"},
    "gymnasium": {"envs", "frames", "vectors", "places", "workers", "copies", "pixels", "identity"},
    "matplotlib": {"plots"},
    "tyro": {"options", "bench_commands"},
    "pydantic": {"config", "config_files"},
}
FILES = sorted(Path(hvd_dqn.__file__).parent.glob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "__init__"], ids=lambda path: path.stem)
def test_a_room_imports_only_from_lower_floors_or_its_own(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "hvd_dqn" and len(parts) > 1 and parts[1] in FLOOR_OF:
            assert FLOOR_OF[parts[1]] <= FLOOR_OF[path.stem], f"{path.stem} imports {name} from a higher floor"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_outside_library_has_one_room(path):
    for name in imports(path):
        rooms = ONLY_IN.get(name.split(".")[0])
        assert rooms is None or path.stem in rooms, f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_rooms_that_know_the_config_take_it(path):
    if "hvd_dqn.config.Config" in imports(path):
        assert path.stem in {
            "config_files",
            "plan",
            "run",
            "parts",
            "agent",
            "trainer",
            "job",
            "bench_loop",
            "options",
            "commands",
        }


def test_every_file_has_a_floor_and_says_what_it_is_for():
    for path in FILES:
        assert path.stem == "__init__" or path.stem in FLOOR_OF
        assert ast.get_docstring(ast.parse(path.read_text()))
