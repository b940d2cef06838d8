"""Settings: layers over layers, and one line for whatever does not fit."""

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from hvd_dqn.commands.options import read_settings
from hvd_dqn.config import Config, setting_names
from hvd_dqn.config_files import load_file, load_preset, parse, presets
from hvd_dqn.errors import InputError
from hvd_dqn.storage.run_directory import Run


def test_a_file_lies_over_a_preset_which_lies_over_the_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("agent: {gamma: 0.5}\nenv: {kwargs: {sutton_barto_reward: true}}\n")
    config = load_file(file, load_preset("cartpole"))
    assert config.agent.gamma == 0.5  # the file's
    assert config.env.kwargs == {"sutton_barto_reward": True}
    assert config.agent.epsilon_steps == 8_000  # the preset's
    assert config.agent.dueling == Config().agent.dueling  # the default


def test_the_command_line_lies_over_a_file_which_lies_over_a_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("agent: {gamma: 0.5, n_step: 7}\n")
    _, name, config = read_settings(["cartpole", "--config", str(file), "--agent.n_step", "8"])
    assert name == "cartpole"
    assert (config.agent.n_step, config.agent.gamma, config.agent.epsilon_steps) == (8, 0.5, 8_000)
    _, name, config = read_settings(["--config", str(file), "--agent.n_step", "8"])
    assert name == "mine"
    assert (config.agent.n_step, config.agent.gamma, config.agent.epsilon_steps) == (8, 0.5, 10_000)


def test_a_run_goes_on_by_its_own_settings_and_under_no_other_name(tmp_path):
    Run(tmp_path / "run").create(Config(seed=7), {"preset": "cartpole"})
    words = ["--run-dir", str(tmp_path / "run"), "--resume"]
    for preset in ([], ["cartpole"]):
        _, name, config = read_settings([*preset, *words])
        assert (name, config.seed) == ("cartpole", 7)
    with pytest.raises(InputError, match="is a run of cartpole, not of lunarlander"):
        read_settings(["lunarlander", *words])


def test_what_is_written_is_read_back():
    for name in presets():
        config = load_preset(name)
        assert parse(config.to_yaml(), "copy") == config


def test_the_digest_tells_settings_apart():
    assert Config().digest() == Config().digest()
    assert Config().digest() != Config(seed=1).digest()


def test_every_setting_says_what_it_means_and_where_it_comes_from():
    assert len(setting_names()) > 40
    for name, field in setting_names().items():
        assert field.json_schema_extra["meaning"], name
        assert field.json_schema_extra["source"], name


def test_every_preset_opens_with_its_source_and_expected_result():
    assert set(presets()) == {"acrobot", "cartpole", "identity", "lunarlander", "mountaincar"}
    for text in presets().values():
        assert text.startswith("#")
        assert "\n# Expected: " in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: {batch_sise: 3}", r"`learner.batch_sise`.*Did you mean `learner.batch_size`"),
        ("lerner: {}", r"`lerner`.*Did you mean `learner"),
        ("learner: {batch_size: 0}", r"`learner.batch_size`: .*greater than or equal to 1.*Received: 0"),
        ("agent: {gamma: 1.5}", r"`agent.gamma`: .*less than or equal to 1.*Received: 1.5"),
        ("agent: {loss: hubert}", r"`agent.loss`: .*'huber' or 'squared'.*'hubert'"),
        ("learner: {learning_rate: .nan}", r"`learner.learning_rate`: .*nan"),
        ("learner: 3", r"`learner`.*3"),
        ("- a\n- b", r"mine: "),
        ("a: b: c", r"mine is not YAML"),
        ("!!python/object/apply:os.system ['true']", r"mine is not YAML"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse(text, "mine")
    assert "\n" not in str(error.value)


def test_an_unknown_preset_gets_the_nearest_one():
    with pytest.raises(InputError, match=r"no preset 'cartpol'.*Did you mean `cartpole`.*Presets: acrobot"):
        load_preset("cartpol")


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing.yaml.*Expected: a YAML file"):
        load_file(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes.yaml"):
        load_file(tmp_path / "bytes.yaml")


def test_presets_are_valid_yaml_with_nothing_superfluous():
    for name, text in presets().items():
        assert isinstance(yaml.safe_load(text), dict), name


def check_one_line(text):
    said = ""
    try:
        parse(text, "fuzz")
    except InputError as error:
        said = str(error)
    assert "\n" not in said


@given(st.one_of(st.text(max_size=80), st.binary(max_size=60).map(lambda b: b.decode("latin-1"))))
@example("seed: 2024-02-30")
def test_any_text_is_settings_or_one_line(text):
    check_one_line(text)


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=3)
)


@given(st.sampled_from(sorted(setting_names())), values)
def test_any_value_of_any_setting_is_taken_or_refused_in_one_line(name, value):
    *section, leaf = name.split(".")
    tree = {section[0]: {leaf: value}} if section else {leaf: value}
    check_one_line(yaml.safe_dump(tree))


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch hacked']", "a: &a [*a]"])
def test_yaml_runs_no_code(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        parse(text, "evil")
    assert not (tmp_path / "hacked").exists()
