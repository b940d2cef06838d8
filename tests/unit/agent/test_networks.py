"""Networks: shapes, the two ways of computing an MLP, dueling, and the user's own models."""

import random

import numpy as np
import pytest
import tensorflow as tf

from hvd_dqn.agent.layout import Layout, Part
from hvd_dqn.agent.networks import CONVOLUTIONS, Network, build_network, cnn
from hvd_dqn.agent.objectives import Dqn
from hvd_dqn.agent.preprocess import Preprocess
from hvd_dqn.errors import InputError

DQN = Dqn(double=True, loss="huber")


def make(
    name="mlp",
    shape=(4,),
    categories=None,
    actions=3,
    hidden=(8, 6),
    dueling=False,
    seed=0,
    objective=DQN,
    dtype=np.float32,
):
    rng = np.random.default_rng(seed)
    states = (categories,) * shape[0] if categories else ()
    divisor = np.array(255.0) if dtype == np.uint8 else None
    preprocess = Preprocess(Layout([Part(shape, np.dtype(dtype), divisor=divisor, categories=states)]))
    return build_network(name, preprocess, actions, objective, hidden=hidden, dueling=dueling, rng=rng)


class Gain(tf.keras.layers.Layer):
    """One weight without axes, for all features."""

    def build(self, shape):
        self.gain = self.add_weight(name="gain", shape=(), initializer="ones")

    def call(self, features):
        return features * self.gain


def keras_model(observation_shape, actions):
    return tf.keras.Sequential(
        [tf.keras.Input(observation_shape), tf.keras.layers.Dense(5, "relu"), Gain(), tf.keras.layers.Dense(actions)]
    )


def keras_model_of_wrong_width(observation_shape, actions):
    return keras_model(observation_shape, actions + 1)


def keras_model_with_batch_statistics(observation_shape, actions):
    layers = tf.keras.layers
    return tf.keras.Sequential([tf.keras.Input(observation_shape), layers.BatchNormalization(), layers.Dense(actions)])


def keras_model_with_embedding(observation_shape, actions):
    layers = tf.keras.layers
    inputs = tf.keras.Input(observation_shape)
    numbers = layers.Lambda(lambda x: tf.cast(tf.clip_by_value(tf.abs(x) * 3, 0, 7), tf.int32))(inputs)
    features = layers.Dense(5)(layers.Flatten()(layers.Embedding(8, 3)(numbers)))
    both = layers.Add()([layers.Dense(5, "relu")(inputs), features])
    return tf.keras.Model(inputs, layers.Dense(actions)(both))


def keras_model_with_a_regularizer(observation_shape, actions):
    layers = tf.keras.layers
    return tf.keras.Sequential([tf.keras.Input(observation_shape), layers.Dense(actions, kernel_regularizer="l2")])


def not_a_model(observation_shape, actions):
    return 3


@pytest.mark.parametrize(
    ("hidden", "dueling"), [((), False), ((8,), False), ((8, 6), False), ((8,), True), ((8, 6), True)]
)
@pytest.mark.parametrize("kind", ["float", "states", "stacked states", "bytes", "image"])
def test_an_mlp_computes_the_same_in_numpy_and_in_tensorflow(kind, hidden, dueling):
    rng = np.random.default_rng(1)
    shape, categories, observation = {
        "float": ((4,), None, rng.normal(size=(7, 4)).astype(np.float32)),
        "states": ((1,), 5, rng.integers(5, size=(7, 1)).astype(np.int32)),
        "stacked states": ((3,), 5, rng.integers(5, size=(7, 3)).astype(np.int32)),
        "bytes": ((4,), None, rng.integers(256, size=(7, 4)).astype(np.uint8)),
        "image": ((3, 3, 2), None, rng.normal(size=(7, 3, 3, 2)).astype(np.float32)),
    }[kind]
    network = make(shape=shape, categories=categories, hidden=hidden, dueling=dueling)
    q = Network.q_values(network, observation)  # by its graph
    assert q.shape == (7, 3)
    np.testing.assert_allclose(network.q_values(observation), q, rtol=1e-5, atol=1e-6)


def test_an_mlp_by_hand():
    network = make(shape=(2,), actions=2, hidden=(2,))
    #                       W1 [2, 2]             b1          W2 [2, 2]             b2
    network.theta.assign([1.0, -1.0, 0.5, 2.0, 0.1, 0.0, 1.0, 0.0, 3.0, -1.0, 0.5, 0.0])
    # x = (1, 2): hidden = relu(1 + 1 + 0.1, -1 + 4) = (2.1, 3); q = (2.1 + 9 + 0.5, -3)
    assert network.q_values(np.array([[1.0, 2.0]], np.float32))[0] == pytest.approx([11.6, -3.0])


def test_the_advantages_of_a_dueling_network_have_mean_zero():
    network = make(hidden=(6,), dueling=True)
    observation = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    before = network.q_values(observation)
    theta = network.theta.numpy()
    theta[-3:] += 5.0  # the same number on every advantage's bias: it must cancel out
    network.theta.assign(theta)
    network.refresh()
    np.testing.assert_allclose(network.q_values(observation), before, rtol=1e-4, atol=1e-5)
    theta[-3 - 6 * 3 - 1] += 2.0  # the value's bias moves all actions alike
    network.theta.assign(theta)
    network.refresh()
    np.testing.assert_allclose(network.q_values(observation), before + 2.0, rtol=1e-4, atol=1e-5)
    theta[-28:-21] = [0] * 6 + [2]  # the value's kernel and bias: the value is 2, and the mean of all actions'
    network.theta.assign(theta)
    network.refresh()
    np.testing.assert_allclose(network.q_values(observation).mean(axis=1), 2.0, rtol=1e-4)


def test_weights_and_biases_start_within_one_over_the_root_of_a_layers_inputs():
    theta = make(hidden=(64, 32)).theta.numpy()
    for inputs, outputs in [(4, 64), (64, 32), (32, 3)]:
        for size in (inputs * outputs, outputs):
            part, theta = theta[:size], theta[size:]
            assert 0 < np.abs(part).max() <= 1 / np.sqrt(inputs)
            assert size < 30 or np.abs(part).max() > 0.9 / np.sqrt(inputs)
    assert not theta.size


def test_the_nature_cnn_has_the_papers_size():
    network = make("cnn", shape=(84, 84, 4), actions=6, hidden=(512,), dtype=np.uint8)
    # 8*8*4*32+32 + 4*4*32*64+64 + 3*3*64*64+64 + 3136*512+512 + 512*6+6
    assert network.theta.shape == (1_687_206,)
    image = np.random.default_rng(0).integers(256, size=(2, 84, 84, 4)).astype(np.uint8)
    assert network.q_values(image).shape == (2, 6)
    bright = network.q_values(np.full_like(image, 255))
    np.testing.assert_allclose(bright, network(tf.ones((2, 84, 84, 4))).numpy(), rtol=1e-4, atol=1e-5)


def test_an_own_keras_model_is_used_with_its_variables_as_they_are():
    network = make("tests.unit.agent.test_networks:keras_model")
    assert len(network.variables) == 5
    assert network.q_values(np.zeros((2, 4), np.float32)).shape == (2, 3)
    states = make("tests.unit.agent.test_networks:keras_model", shape=(1,), categories=5)
    assert states.q_values(np.array([[3]], np.int32)).shape == (1, 3)


def test_each_of_stacked_states_counts():
    for name in ("mlp", "tests.unit.agent.test_networks:keras_model"):
        network = make(name, shape=(2,), categories=5)
        q = network.q_values(np.array([[3, 1], [3, 2], [0, 2], [3, 1]], np.int32))
        assert len(np.unique(q[:, 0])) == 3
        assert np.array_equal(q[0], q[3])


def test_one_seed_makes_one_network():
    for name in ("mlp", "tests.unit.agent.test_networks:keras_model"):
        first, second = make(name, seed=3), make(name, seed=3)
        for a, b in zip(first.variables, second.variables, strict=True):
            assert np.array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "rnn"}, r"mlp, cnn, minatar or module:function.*'rnn'"),
        ({"name": "cnn"}, r"needs images.*\[4\].*mlp"),
        ({"name": "cnn", "shape": (20, 20, 1)}, r"at least 36 x 36 pixels.*20 x 20"),
        ({"name": "no_such_module:f"}, r"cannot be imported.*no_such_module"),
        ({"name": "tests.unit.agent.test_networks:nothing"}, r"cannot be imported.*nothing"),
        ({"name": "tests.unit.agent.test_networks:not_a_model"}, r"must return a keras.Model.*int"),
        ({"name": "tests.unit.agent.test_networks:keras_model_of_wrong_width"}, r"\[B, 3\].*\(1, 4\)"),
        ({"name": "tests.unit.agent.test_networks:keras_model_with_batch_statistics"}, r"LayerNormalization"),
        ({"name": "tests.unit.agent.test_networks:keras_model_with_a_regularizer"}, r"losses of its own"),
        ({"hidden": (), "dueling": True}, r"at least one hidden layer"),
        ({"hidden": (10**6, 10**6)}, r"1,000,009,000,003 parameters.*Lower --agent.hidden"),
    ],
)
def test_a_network_that_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make(**arguments)


def weights_of(theta: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    parts = np.split(theta, np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize(
    ("image", "convolutions"),
    [((84, 84, 4), CONVOLUTIONS["cnn"]), ((40, 52, 3), CONVOLUTIONS["cnn"]), ((10, 10, 4), CONVOLUTIONS["minatar"])],
)
def test_a_cnn_is_the_one_of_keras_layers(image, convolutions):
    """An independent reference: strides, padding, the order of rows, columns and channels, and of the flattened features."""
    layers = tf.keras.layers
    reference = tf.keras.Sequential(
        [
            tf.keras.Input(image),
            *(
                layers.Conv2D(filters, side, stride, "valid", activation="relu")
                for side, stride, filters in convolutions
            ),
            layers.Flatten(),
            layers.Dense(32, "relu"),
        ]
    )
    trunk = cnn(convolutions, image, [32])
    rng = np.random.default_rng(0)
    weights = [rng.normal(0, 0.1, shape).astype(np.float32) for shape in trunk.shapes]
    reference.set_weights(weights)
    inputs = rng.random((2, *image)).astype(np.float32)
    expected = reference(inputs).numpy()
    assert np.count_nonzero(expected) > 10
    np.testing.assert_allclose(
        trunk.forward([tf.constant(w) for w in weights], tf.constant(inputs)), expected, rtol=1e-4, atol=1e-4
    )


def beside(*parts) -> Preprocess:
    return Preprocess(Layout([Part(shape, np.dtype(np.float32), name, **what) for name, shape, what in parts]))


IMAGE = {"is_image": True}


@pytest.mark.parametrize("name", ["minatar", "cnn"])
def test_an_image_and_the_numbers_around_it_meet_in_front_of_the_dense_layers(name):
    side = {"minatar": 10, "cnn": 36}[name]
    preprocess = beside(("a", (3,), {}), ("image", (side, side, 2), IMAGE), ("z", (2, 2, 1), {}))
    network = build_network(name, preprocess, 3, DQN, hidden=(9, 8), dueling=False, rng=np.random.default_rng(0))
    rng = np.random.default_rng(1)
    observation = rng.normal(size=(5, 3 + side * side * 2 + 4)).astype(np.float32)
    layers = tf.keras.layers
    inputs = tf.keras.Input((observation.shape[1],))
    image = layers.Reshape((side, side, 2))(inputs[:, 3:-4])
    for kernel, stride, filters in CONVOLUTIONS[name]:
        image = layers.Conv2D(filters, kernel, stride, "valid", activation="relu")(image)
    numbers = layers.Dense(9, "relu")(layers.Concatenate()([inputs[:, :3], inputs[:, -4:]]))
    features = layers.Dense(9, "relu")(layers.Concatenate()([layers.Flatten()(image), numbers]))
    reference = tf.keras.Model(inputs, layers.Dense(3)(layers.Dense(8, "relu")(features)))
    shapes = [tuple(weight.shape) for weight in reference.weights]
    reference.set_weights(weights_of(network.theta.numpy(), shapes))
    np.testing.assert_allclose(network.q_values(observation), reference(observation).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("a", (3,), {}), ("b", (4, 4, 1), {})], r"exactly one image .*none in a, b\. Choose --agent.network mlp\.$"),
        ([("a", (10, 10, 1), IMAGE), ("b", (10, 10, 1), IMAGE)], r"Received: 2 \(a, b\).*FilterObservation"),
        (
            [("a", (7, 11, 11), {**IMAGE, "unsure": (7, 11, 11)}), ("b", (2,), {})],
            r"channels of .*`a` of shape \[7, 11, 11\]",
        ),
        (
            [("", (7, 11, 11), {**IMAGE, "unsure": (7, 11, 11)})],
            r"observations of shape \[7, 11, 11\].*TransformObservation",
        ),
    ],
)
def test_images_that_are_not_one_or_not_sure_are_refused(parts, message):
    with pytest.raises(InputError, match=message):
        build_network("minatar", beside(*parts), 3, DQN, hidden=(8,), dueling=False, rng=np.random.default_rng(0))


class Quantiles(Dqn):
    """An objective of several outputs per action, whose value is their mean."""

    outputs = 5

    def q(self, out):
        return tf.reduce_mean(out, axis=-1)


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_head_of_several_outputs_has_an_axis_for_them(name, dueling):
    objective = Quantiles(double=True, loss="huber")
    shape = (4,) if name == "mlp" else (36, 36, 2)
    network = make(name, shape=shape, hidden=(8,), dueling=dueling, objective=objective)
    observation = np.random.default_rng(1).normal(size=(7, *shape)).astype(np.float32)
    out = network(tf.constant(observation)).numpy()
    assert out.shape == (7, 3, 5)
    np.testing.assert_allclose(network.q_values(observation), out.mean(axis=-1), rtol=1e-5, atol=1e-6)
    if dueling:  # over the actions, for each output
        theta = network.theta.numpy()
        theta[-15:] += np.tile(np.arange(5.0, dtype=np.float32), 3)
        network.theta.assign(theta)
        np.testing.assert_allclose(network(tf.constant(observation)), out, rtol=1e-4, atol=1e-5)


def test_making_a_keras_model_leaves_the_callers_random_numbers_alone():
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    expected = np.random.random(), random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    make("tests.unit.agent.test_networks:keras_model")
    assert (np.random.random(), random.random()) == expected  # noqa: NPY002
