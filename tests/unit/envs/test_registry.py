"""Ids are found wherever packages register them, and what is missing is named."""

import importlib.metadata
import sys

import gymnasium
import pytest

from hvd_dqn.envs import registry
from hvd_dqn.errors import InputError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a module that registers environments by functions."""
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(gymnasium.registry)

    def write(name, text):
        (tmp_path / f"{name.replace('.', '/')}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name.replace('.', '/')}.py").write_text(text)

    yield write
    for name in set(gymnasium.registry) - set(before):
        del gymnasium.registry[name]
    for name in [name for name in sys.modules if name.startswith("somebodys")]:
        del sys.modules[name]


REGISTERS = "import gymnasium\ndef register_envs():\n    gymnasium.register('{}', entry_point='a:b')\n"


def entry_points(monkeypatch, *points):
    found = [importlib.metadata.EntryPoint(*point) for point in points]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point for point in found if point.group == group]
    )


def test_a_modules_function_or_that_of_its_submodule_gym_registers(package):
    package("somebodys", REGISTERS.format("Direct-v0"))
    assert registry.find_spec("somebodys:Direct-v0").id == "Direct-v0"
    package("somebodys_too.__init__", "")
    package("somebodys_too.gym", REGISTERS.format("Below/It-v1"))
    assert registry.find_spec("somebodys_too:Below/It-v1").id == "Below/It-v1"
    package("somebodys_own", "from gymnasium import register_envs\n")  # Gymnasium's, which takes a module
    with pytest.raises(InputError, match="There is no environment `somebodys_own:None-v0`"):
        registry.find_spec("somebodys_own:None-v0")


@pytest.mark.parametrize(
    ("name", "group", "registers", "id"),
    [
        ("Space", "gymnasium.envs", "Space/Point-v0", "Space/Point-v0"),
        ("Space", "gymnasium.envs", "Point-v0", "Space/Point-v0"),  # the entry point's name is the namespace
        ("__root__", "gymnasium.envs", "Rooted-v0", "Rooted-v0"),
        ("some-env", "gymnasium.envs.__root__", "Rooted-v0", "Rooted-v0"),
    ],
)
def test_an_entry_point_registers_when_its_environment_is_asked_for(package, monkeypatch, name, group, registers, id):
    package("somebodys_point", REGISTERS.format(registers))
    entry_points(monkeypatch, (name, "somebodys_point:register_envs", group))
    registry._load_entry_point.cache_clear()
    assert id not in gymnasium.registry
    assert registry.find_spec(id).id == id
    assert registry.find_spec("CartPole-v1").id == "CartPole-v1"


def test_an_entry_point_that_fails_is_named_only_where_nothing_was_found(package, monkeypatch):
    package("somebodys_bad", "1 / 0\n")
    entry_points(monkeypatch, ("Bad", "somebodys_bad:register", "gymnasium.envs"))
    registry._load_entry_point.cache_clear()
    assert registry.find_spec("CartPole-v1")
    with pytest.raises(InputError, match=r"`Bad/Thing-v0`.*somebodys_bad:register cannot be loaded: ZeroDivisionError"):
        registry.find_spec("Bad/Thing-v0")


@pytest.mark.parametrize(
    ("id", "module"),
    [("MiniGrid-Empty-5x5-v0", "minigrid"), ("ALE/Pong-v5", "ale_py"), ("MinAtar/Breakout-v1", "minatar")],
)
def test_environments_of_known_packages_are_found_by_their_id_alone(id, module):
    pytest.importorskip(module)
    assert registry.find_spec(id).id == id


@pytest.mark.parametrize(
    ("id", "line"),
    [
        ("PandaReach-v3", r"The package panda-gym has it: pip install panda-gym\."),
        ("FetchPush-v4", "pip install gymnasium-robotics"),
        ("panda_gym:PandaReach-v3", "There is no module `panda_gym`.*Install it: pip install panda-gym"),
        ("MiniGrid-Empty-5x5-v0", "pip install minigrid"),
        ("Taxi-v3", "use `Taxi-v4` instead"),
        ("CartPol-v1", "Nearest: `CartPole-v1`"),
    ],
)
def test_what_is_missing_is_named_with_the_package_or_the_nearest_id(id, line, monkeypatch):
    entry_points(monkeypatch)
    for name in [name for name in gymnasium.registry if name.startswith("MiniGrid")]:
        monkeypatch.delitem(gymnasium.registry, name)
    real = registry.importlib.util.find_spec
    monkeypatch.setattr(
        registry.importlib.util, "find_spec", lambda name, *a: None if name == "minigrid" else real(name, *a)
    )
    with pytest.raises(InputError, match=line) as caught:
        registry.find_spec(id)
    assert "\n" not in str(caught.value)


def test_a_newer_version_is_known():
    assert registry.newest(registry.find_spec("CartPole-v0")) == "CartPole-v1"
    assert registry.newest(registry.find_spec("CartPole-v1")) is None
