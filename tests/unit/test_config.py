"""Settings: layers over layers, and one line for whatever does not fit."""

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from hvd_dqn.commands.options import read_settings
from hvd_dqn.config import Config, setting_names
from hvd_dqn.config_files import configure, from_yaml, load_file, load_preset, presets
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
        assert from_yaml(config.to_yaml(), "copy") == config


def test_arguments_and_wrappers_of_an_environment_are_written_and_read_back_whatever_their_kind():
    env = {"kwargs": {"a": [1, {"b": None}], "c": np.arange(2), "d": (1.5, "x: y"), "e": np.inf}, "wrappers": "m:A"}
    config = configure(Config(), {"env": env})
    assert config.env.kwargs == {"a": [1, {"b": None}], "c": [0, 1], "d": [1.5, "x: y"], "e": np.inf}
    assert from_yaml(config.to_yaml(), "copy") == config
    for bad in (object(), {1, 2}, print):
        with pytest.raises(InputError, match=r"`env.kwargs`: expected what YAML can write.* Received: a "):
            configure(Config(), {"env.kwargs": {"a": bad}})


def test_the_digest_tells_settings_apart():
    assert Config().digest() == Config().digest()
    assert Config().digest() != Config(seed=1).digest()
    alike = [configure(Config(), {"env.kwargs": kwargs}) for kwargs in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1})]
    assert alike[0].digest() == alike[1].digest() != alike[2].digest()


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


NUMBER = r"must be a whole number, at least 1\."
#   what stands in a file                                what the line says
BAD_FILES = [
    ("learner: {batch_sise: 3}",                         r"`learner.batch_sise`\. Did you mean `learner.batch_size`\?"),
    ("lerner: {}",                                       r"`lerner`\. Did you mean `learner`\?"),
    ("agnet: {gamma: 0.5}",                              r"no setting `agnet`\. Did you mean `agent`\?"),
    ("agnet:",                                           r"no setting `agnet`\. Did you mean `agent`\?"),
    ("learner: {batch_size: 0}",                         rf"mine: `learner.batch_size` {NUMBER} Received: 0\."),
    ("learner: {batch_size: 1.5}",                       rf"`learner.batch_size` {NUMBER} Received: 1.5\."),
    ("learner: {batch_size: }",                          rf"`learner.batch_size` {NUMBER} Received: None\."),
    ("total_steps: -5",                                  rf"`total_steps` {NUMBER} Received: -5\."),
    ("total_steps: 1e400",                               rf"`total_steps` {NUMBER} Received: inf\."),
    ("agent: {gamma: 1.5}",                              r"`agent.gamma` must be a number from 0 to 1\. Received: 1.5\."),
    ("agent: {epsilon_zeta: 1}",                         r"must be a number above 1, or none\. Received: 1"),
    ("agent: {loss: hubert}",                            r"be `huber` or `squared`\. Received: 'hubert'\. .* `huber`\?"),
    ("agent: {hidden: [64, 0]}",                         r"`agent.hidden` must be whole numbers, each at least 1, like 64,64"),
    ("agent: {hidden: {a: 1}}",                          r"`agent.hidden` must be whole numbers"),
    ("agent: {double: 7}",                               r"`agent.double` must be true or false\. Received: 7\."),
    ("learner: {learning_rate: .nan}",                   r"`learner.learning_rate` must be a number above 0\. Received: nan"),
    ("seed: yes",                                        r"`seed` must be .*Received: True \(YAML reads yes, no, on and off"),
    ("learner: {learning_rate: true}",                   r"`learner.learning_rate` must be a number"),
    ("env: CartPole-v1",                                 r"`env` is a section: .*`env: {id: CartPole-v1}`.*'CartPole-v1'"),
    ("learner: 3",                                       r"`learner` is a section: .*`learner: {batch_size: 64}`.* 3\."),
    ("agent: [gamma, 1]",                                r"`agent` is a section: "),
    ("env: {kwargs: [1]}",                               r"`env.kwargs` must be names with values of YAML.* Received: \[1\]"),
    ("env: {kwargs: {a: {1: 2}}}",                       r"`env.kwargs`: names must be text.* Received: 1\."),
    ("env: {kwargs: {a: &a [*a]}}",                      r"`env.kwargs`: it is nested deeper than 30 levels"),
    ("env: {wrappers: [1]}",                             r"`env.wrappers`: expected the name of a class.* Received: 1\."),
    ("env: {wrappers: [A b]}",                           r"`env.wrappers`: expected the name of a class.* Received: 'A b'"),
    ("env: {wrappers: [{A: 1}]}",                        r"`env.wrappers`: .* arguments of `A` by name.* Received: 1"),
    ("env: {wrappers: [{A: , B: }]}",                    r"`env.wrappers` must be names of classes, each alone or with"),
    ("env: {wrappers: 3}",                               r"`env.wrappers` must be names of classes.* Received: 3"),
    ("env: {max_episode_steps: 0}",                      r"`env.max_episode_steps` must be a whole number, at least 1"),
    ("- a\n- b",                                         r"mine: Expected settings, such as .*Received: \['a', 'b'\]"),
    ("cartpole",                                         r"mine: Expected settings, such as .*Received: 'cartpole'"),
    ("",                                                 r"mine: There are no settings in it\. Write at least one"),
    ("# nothing yet\n---\n",                             r"mine: There are no settings in it"),
    ("{}",                                               r"mine: There are no settings in it"),
    ("seed: 1\ntotal_steps: 9\nseed: 2",                 r"mine: `seed` is given twice, in lines 1 and 3\. Keep one"),
    ("env:\n  id: a\n  id: b",                           r"`id` is given twice, in lines 2 and 3"),
    ("env: {kwargs: {a: 1, a: 1}}",                      r"`a` is given twice"),
    ("agent: {}\nagent: {gamma: 1}",                     r"`agent` is given twice, in lines 1 and 2"),
    ("agent.gamma: 1\nagent: {gamma: 1}",                r"`agent.gamma` is given twice"),
    ("learner: {replay_ratio: 8}",                       r"Its name is now `learner.samples_per_insert`: write that"),
    ("replay_ratio: 8",                                  r"Did you mean `learner.samples_per_insert`\?"),
    ("lr: 0.1",                                          r"Did you mean `learner.learning_rate`\?"),
    ("learner: {lr: 0.1}",                               r"Did you mean `learner.learning_rate`\?"),
    ("learning_starts: 1",                               r"Did you mean `learner.learn_start`\?"),
    ("train_freq: 1",                                    r"Did you mean `learner.train_period`\?"),
    ("buffer_size: 1",                                   r"Did you mean `replay.capacity`\?"),
    ("target_update_interval: 1",                        r"Did you mean `learner.target_period`\?"),
    ("exploration_fraction: 1",                          r"Did you mean `agent.epsilon_steps`\?"),
    ("num_envs: 1",                                      r"Did you mean `env.envs_per_rank`\?"),
    ("n_envs: 1",                                        r"Did you mean `env.envs_per_rank`\?"),
    ("period: 1",                                        r"`evaluation.period`, `report.period` or `checkpoint.period`\?"),
    ("gama: 1",                                          r"Did you mean `agent.gamma`\?"),
    ("1: 2",                                             r"no setting `1`"),
    ("a: b: c",                                          r"mine is not YAML"),
    ("!!python/object/apply:os.system ['true']",         r"mine is not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_what_does_not_fit_is_said_in_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        from_yaml(text, "mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("total_steps: 1e6", "total_steps", 1_000_000),
        ("total_steps: 1_000_000", "total_steps", 1_000_000),
        ("total_steps: '1e4'", "total_steps", 10_000),
        ("learner: {learn_start: 2.5e3}", "learner.learn_start", 2_500),
        ("evaluation: {episodes: 2e1}", "evaluation.episodes", 20),
        ("learner: {learning_rate: 1e-3}", "learner.learning_rate", 0.001),
        ("agent: {hidden: 64}", "agent.hidden", (64,)),
        ("agent:\n  hidden: 64,64", "agent.hidden", (64, 64)),
        ("agent: {hidden: 64 64}", "agent.hidden", (64, 64)),
        ("agent: {hidden: [64, 1e2]}", "agent.hidden", (64, 100)),
        ("agent: {hidden: []}", "agent.hidden", ()),
        ("agent:", "agent.gamma", 0.99),
        ("learner.learning_rate: 0.01", "learner.learning_rate", 0.01),
        ("learner.learning_rate: 0.01\nlearner: {batch_size: 8}", "learner.learning_rate", 0.01),
        ("env: {kwargs: {x: 1e4, y: on, z: a=b}}", "env.kwargs", {"x": 1e4, "y": True, "z": "a=b"}),
        ("env: {kwargs: {c: {a: [1, null]}, d: 2020-01-02}}", "env.kwargs", {"c": {"a": [1, None]}, "d": "2020-01-02"}),
        ("env: {wrappers: A}", "env.wrappers", ("A",)),
        ("env: {wrappers: [A, 'm.n:B', {C: {x: [1]}}]}", "env.wrappers", ("A", "m.n:B", {"C": {"x": [1]}})),
        ("env: {wrappers: {C: {x: 1}}}", "env.wrappers", ({"C": {"x": 1}},)),
        ("env: {wrappers: [{A: }, {gymnasium.wrappers:B: {}}]}", "env.wrappers", ("A", "B")),
        ("evaluation: {target_return: None}", "evaluation.target_return", None),
        ("ranks: {learning_rate_scaling: none}", "ranks.learning_rate_scaling", "none"),
    ],
)
def test_what_is_clear_is_taken(text, name, value):
    config = from_yaml(text, "mine")
    for part in name.split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


def test_python_takes_nested_names_dotted_ones_and_numbers_of_numpy():
    base = load_preset("cartpole")
    config = configure(base, {"env": {"id": "X-v0"}, "learner.batch_size": np.int64(8), "agent.gamma": np.float32(0.5)})
    assert (config.env.id, config.learner.batch_size, config.agent.gamma) == ("X-v0", 8, 0.5)
    assert config.env.normalize_observation  # the preset's
    assert base == load_preset("cartpole")
    assert configure(base, {}) == base
    assert configure(base, {"agent": Config().agent}).agent == Config().agent
    for bad, line in [
        (
            {"env": "X-v0"},
            "`env` is a section: write its settings by name, such as `env: {id: X-v0}`. Received: 'X-v0'.",
        ),
        ({"env": {"id": "a"}, "env.id": "b"}, "`env.id` is given twice. Keep one of them."),
        ({"seed": True}, "`seed` must be a whole number, at least 0. Received: True (YAML"),
        ({"lr": 1}, "There is no setting `lr`. Did you mean `learner.learning_rate`?"),
        ([1], "Expected settings, such as `env: {id: CartPole-v1}`. Received: [1]."),
    ]:
        with pytest.raises(InputError) as error:
            configure(base, bad)
        assert str(error.value).startswith(line)


def test_a_file_and_the_command_line_refuse_in_the_same_words():
    for name, value in [
        ("learner.batch_size", "0"),
        ("agent.loss", "hubert"),
        ("agent.hidden", "64,x"),
        ("seed", "-1"),
    ]:
        said = set()
        for refuse in (
            lambda n=name, v=value: read_settings(["cartpole", f"--{n}", v]),
            lambda n=name, v=value: configure(Config(), {n: v}),
            lambda n=name, v=value: from_yaml(f"{n}: {v!r}", "mine"),
        ):
            with pytest.raises(InputError) as error:
                refuse()
            said.add(str(error.value).removeprefix("mine: "))
        assert len(said) == 1


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
        from_yaml(text, "fuzz")
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
        from_yaml(text, "evil")
    assert not (tmp_path / "hacked").exists()
