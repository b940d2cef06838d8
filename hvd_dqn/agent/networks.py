"""Networks from observations to action values: pure functions of one flat parameter vector, or the user's Keras model."""

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_dqn.errors import InputError
from hvd_dqn.graphs import Graph

Array = Any  # np.ndarray or tf.Tensor: the MLP computes with either


class Network:
    """A network from observations [B, ...] to action values [B, A]: called with tensors, and in `q_values` with arrays.

    `refresh` must be called when the variables have changed: `q_values` may keep what it made of them. Whoever has a graph
    that changes them can fetch the tensors `kept` with its results and hand them over, which saves a call to fetch them.
    """

    def __init__(self, variables: list[tf.Variable], values: Callable[[tf.Tensor], tf.Tensor]) -> None:
        self.variables, self._values = variables, values
        self._q_values = Graph(lambda observation: [values(observation)])

    def __call__(self, observation: tf.Tensor) -> tf.Tensor:
        return self._values(observation)

    def q_values(self, observation: np.ndarray) -> np.ndarray:
        return self._q_values(observation)[0]

    def kept(self) -> list[tf.Tensor]:
        return []

    def refresh(self, kept: Sequence[np.ndarray] = ()) -> None:
        pass


def encode(observation: tf.Tensor, categories: int | None) -> tf.Tensor:
    """Makes float32 of what environments yield: k stacked states one-hot [B, k * categories], bytes scaled to [0, 1]."""
    if categories is not None:
        return tf.reshape(tf.one_hot(observation, categories), [-1, observation.shape[1] * categories])
    if observation.dtype == tf.uint8:
        return tf.cast(observation, tf.float32) * (1.0 / 255.0)
    return tf.cast(observation, tf.float32)


class FlatNetwork(Network):
    """A network whose parameters all live in one vector `theta`.

    Horovod then averages one tensor per update, and broadcast, target copy, checksum and saving are one operation each.
    `shapes` lists the weights in the order in which `forward(weights, observation)` takes them: kernels [in, out] or
    [height, width, in, out], each followed by its bias. All start uniform in +-1/sqrt(fan in), as in PyTorch.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        forward: Callable[[list[Array], Array], Array],
        categories: int | None,
        rng: np.random.Generator,
    ) -> None:
        self._shapes, self._forward, self._categories = shapes, forward, categories
        self._sizes = [math.prod(shape) for shape in shapes]
        self.theta = tf.Variable(_initial(shapes, rng), name="theta")
        super().__init__([self.theta], self._evaluate)

    def _evaluate(self, observation: tf.Tensor) -> tf.Tensor:
        weights = [
            tf.reshape(part, shape) for part, shape in zip(tf.split(self.theta, self._sizes), self._shapes, strict=True)
        ]
        return self._forward(weights, encode(observation, self._categories))


class Mlp(FlatNetwork):
    """Dense layers with ReLU; it acts in NumPy, where a small batch costs a twentieth of a TensorFlow call."""

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        actions: int,
        *,
        dueling: bool,
        categories: int | None,
        rng: np.random.Generator,
    ) -> None:
        shapes = _dense_shapes(inputs, hidden, actions, dueling)
        super().__init__(shapes, lambda weights, x: _dense(weights, _flatten(x), dueling), categories, rng)
        self._kept = Graph(self.kept)
        self._copy: list[np.ndarray] | None = None

    def kept(self) -> list[tf.Tensor]:
        return [self.theta.value()]

    def refresh(self, kept: Sequence[np.ndarray] = ()) -> None:
        self._copy = None
        for theta in kept:
            parts = np.split(theta, list(itertools.accumulate(self._sizes))[:-1])
            self._copy = [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _weights(self) -> list[np.ndarray]:
        if self._copy is None:
            self.refresh(self._kept())
        return self._copy or []

    def q_values(self, observation: np.ndarray) -> np.ndarray:
        if self._categories is not None:
            observation = _one_hot(observation, self._categories)
        elif observation.dtype == np.uint8:
            observation = observation * np.float32(1 / 255)
        return self._forward(self._weights(), observation)


class NatureCnn(FlatNetwork):
    """Three convolutions and a dense layer (Mnih et al. 2015, Methods, "Model architecture"); images are [H, W, C]."""

    KERNELS = ((8, 4, 32), (4, 2, 64), (3, 1, 64))  # (side, stride, filters)

    def __init__(
        self,
        image: tuple[int, ...],
        hidden: Sequence[int],
        actions: int,
        *,
        dueling: bool,
        rng: np.random.Generator,
    ) -> None:
        height, width, channels = image
        shapes: list[tuple[int, ...]] = []
        for side, stride, filters in self.KERNELS:
            shapes += [(side, side, channels, filters), (filters,)]
            height, width, channels = (height - side) // stride + 1, (width - side) // stride + 1, filters
            if height < 1 or width < 1:
                raise InputError(
                    f"The Nature CNN needs images of at least 36 x 36 pixels. Received: {image[0]} x {image[1]}. "
                    "Enlarge them in a wrapper, or choose --agent.network mlp or a Keras model of your own."
                )
        convolutions = len(shapes)
        shapes += _dense_shapes(height * width * channels, hidden, actions, dueling)

        def forward(weights: list[Array], x: Array) -> Array:
            for layer, (_, stride, _) in enumerate(self.KERNELS):
                kernel, bias = weights[2 * layer : 2 * layer + 2]
                x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, stride, "VALID"), bias))  # [B, H, W, C]
            return _dense(weights[convolutions:], _flatten(x), dueling)

        super().__init__(shapes, forward, None, rng)


def build_network(
    name: str,
    observation_shape: tuple[int, ...],
    categories: int | None,
    actions: int,
    *,
    hidden: Sequence[int],
    dueling: bool,
    rng: np.random.Generator,
) -> Network:
    """Makes the network called `name` for observations [B, *observation_shape]; see `Agent.network` for the names."""
    if dueling and not hidden:
        raise InputError(
            "--agent.dueling splits the last hidden layer in two: give --agent.hidden at least one hidden layer."
        )
    if name == "mlp":
        inputs = (categories or 1) * math.prod(observation_shape)
        return Mlp(inputs, hidden, actions, dueling=dueling, categories=categories, rng=rng)
    if name == "cnn":
        if len(observation_shape) != 3 or categories is not None:
            raise InputError(
                f"--agent.network cnn needs images [H, W, C]. Received observations of shape {list(observation_shape)}. "
                "Choose --agent.network mlp."
            )
        return NatureCnn(observation_shape, hidden, actions, dueling=dueling, rng=rng)
    if ":" not in name:
        raise InputError(f"--agent.network must be mlp, cnn or module:function. Received: {name!r}.")
    tf.keras.utils.set_random_seed(int(rng.integers(2**31)))
    shape = observation_shape if categories is None else (categories * math.prod(observation_shape),)
    model = _call_builder(name, shape, actions)
    if model.non_trainable_variables:
        raise InputError(
            f"The model of {name} has variables that are not trained ({model.non_trainable_variables[0].name}, ...). "
            "Batch statistics would differ between ranks: use LayerNormalization instead of BatchNormalization."
        )
    if model.losses:
        raise InputError(
            f"The model of {name} has losses of its own (a regularizer's), which DQN's loss does not include: leave them out."
        )
    return Network(model.trainable_variables, lambda observation: model(encode(observation, categories)))


def _call_builder(name: str, observation_shape: tuple[int, ...], actions: int) -> Any:
    module, function = name.split(":", 1)
    try:
        builder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--agent.network {name} cannot be imported: {error}. Expected: an importable module:function."
        ) from None
    model = builder(observation_shape, actions)
    if not isinstance(model, tf.keras.Model):
        raise InputError(
            f"{name}(observation_shape, actions) must return a keras.Model. Received: {type(model).__name__}."
        )
    out = model(tf.zeros((1, *observation_shape)))
    if tuple(out.shape) != (1, actions):
        raise InputError(
            f"The model of {name} must map [B, {', '.join(map(str, observation_shape))}] to [B, {actions}], one value per "
            f"action. Received: an output of shape {tuple(out.shape)} for B = 1."
        )
    return model


def _initial(shapes: Sequence[tuple[int, ...]], rng: np.random.Generator) -> np.ndarray:
    """Starting values of weights that come in pairs of a kernel and its bias, as one vector."""
    parts = []
    for kernel, bias in zip(shapes[::2], shapes[1::2], strict=True):
        bound = 1.0 / math.sqrt(math.prod(kernel[:-1]))
        # Biases too: without them all kinks of the first layer's ReLUs would pass through the origin, which is where
        # low-dimensional control problems live.
        parts += [rng.uniform(-bound, bound, math.prod(shape)) for shape in (kernel, bias)]
    return np.concatenate(parts).astype(np.float32)


def _one_hot(states: np.ndarray, categories: int) -> np.ndarray:
    """As `encode` does it, in NumPy."""
    encoded = np.zeros((states.size, categories), np.float32)
    encoded[np.arange(states.size), states.reshape(-1)] = 1.0
    return encoded.reshape(len(states), -1)


def _flatten(x: Array) -> Array:
    if len(x.shape) == 2:
        return x
    return (np if isinstance(x, np.ndarray) else tf).reshape(x, (-1, math.prod(x.shape[1:])))


def _dense_shapes(inputs: int, hidden: Sequence[int], actions: int, dueling: bool) -> list[tuple[int, ...]]:
    """Weights of the dense layers; dueling doubles the last hidden one: its halves feed value and advantages."""
    widths = [inputs, *hidden]
    if dueling:
        widths[-1] *= 2
    shapes: list[tuple[int, ...]] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        shapes += [(fan_in, fan_out), (fan_out,)]
    if dueling:
        return [*shapes, (hidden[-1], 1), (1,), (hidden[-1], actions), (actions,)]
    return [*shapes, (widths[-1], actions), (actions,)]


def _dense(weights: list[Array], x: Array, dueling: bool) -> Array:
    """Values [B, A] from features [B, D], in NumPy or TensorFlow, whichever `x` is.

    Dueling: q = v + a - mean(a) (Wang et al. 2016, arXiv:1511.06581, equation 9).
    """
    xp = np if isinstance(x, np.ndarray) else tf
    heads = 4 if dueling else 2
    for layer in range(0, len(weights) - heads, 2):
        if xp is np:
            x = np.maximum(x @ weights[layer] + weights[layer + 1], 0.0)
        else:  # these three operations TensorFlow fuses into one
            x = tf.nn.relu(tf.nn.bias_add(x @ weights[layer], weights[layer + 1]))
    if not dueling:
        return x @ weights[-2] + weights[-1]
    value_features, advantage_features = xp.split(x, 2, axis=1)
    value = value_features @ weights[-4] + weights[-3]  # [B, 1]
    advantage = advantage_features @ weights[-2] + weights[-1]  # [B, A]
    mean = np.mean if xp is np else tf.reduce_mean
    return value + advantage - mean(advantage, axis=1, keepdims=True)
