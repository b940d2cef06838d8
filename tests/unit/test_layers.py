"""Imports point one way, from the commands down to the settings, and one package holds each outside library."""

import ast
from pathlib import Path

import pytest

import hvd_dqn

# Each may import from those that stand below it, and from its own line only where it is the same folder.
ORDER = (
    {"cli", "__main__", "commands"},
    {"api"},
    {"job"},
    {"reporting", "bench"},
    {"training"},
    {"envs", "storage"},
    {"agent"},
    {"ranks"},
    {"config_files", "config", "values", "errors", "graphs", "loading", "printing"},
)
LAYER_OF = {name: layer for layer, names in enumerate(ORDER) for name in names}
ONLY_IN = {
    "horovod": {"ranks"},
    "mpi4py": {"ranks"},
    "gymnasium": {"envs"},
    "matplotlib": {"reporting"},
    "pydantic": {"config", "config_files"},
}
PACKAGE = Path(hvd_dqn.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def place(path: Path) -> str:
    """The folder of a module, or its own name where it lies at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path):
    here = place(path)
    for imported in imports(path):
        _, _, rest = imported.partition("hvd_dqn.")
        there = rest.split(".")[0]
        if there in LAYER_OF and there != here:
            below = LAYER_OF[there] > LAYER_OF[here] or LAYER_OF[here] == len(ORDER) - 1
            assert below or {here, there} <= ORDER[0], f"{name(path)} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_each_outside_library_has_one_place(path):
    for imported in imports(path):
        places = ONLY_IN.get(imported.split(".")[0])
        assert places is None or place(path) in places, f"{name(path)} imports {imported}"


def test_every_module_has_a_layer_and_says_what_it_is_for():
    for path in FILES:
        assert place(path) in LAYER_OF, name(path)
        assert ast.get_docstring(ast.parse(path.read_text())), name(path)


@pytest.mark.parametrize("folder", ["agent", "envs"])
def test_what_the_algorithm_and_the_environments_are_does_not_depend_on_the_settings(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        assert not any(imported.startswith("hvd_dqn.config") for imported in imports(path)), name(path)
