"""Networks from preprocessed observations to outputs: trunk and head with one flat weight vector, or a Keras model."""

import importlib
import itertools
import math
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvd_dqn.agent.objectives import Objective
from hvd_dqn.agent.preprocess import Preprocess
from hvd_dqn.errors import InputError
from hvd_dqn.graphs import Graph

# Convolutions of the trunks for images, (side, stride, filters) each. Sources: Mnih et al. 2015, Methods, "Model
# architecture"; Young & Tian 2019, arXiv:1903.03176, section 4.
CONVOLUTIONS = {"cnn": ((8, 4, 32), (4, 2, 64), (3, 1, 64)), "minatar": ((3, 1, 16),)}

MOST_PARAMETERS = 2**30  # 4 GB; Adam keeps two more copies and the target network another one

Shape = tuple[int, ...]
Weights = Sequence[tf.Tensor]


class Network:
    """A function of `variables`, from inputs [B, ...] to outputs [B, A], or [B, A, N] for N > 1 numbers per action.

    `q_values` is for acting. It maps arrays of observations to arrays of values: preprocessing, network, objective.
    """

    def __init__(
        self,
        variables: list[tf.Variable],
        forward: Callable[[tf.Tensor], tf.Tensor],
        preprocess: Preprocess,
        objective: Objective,
    ) -> None:
        self.variables, self._forward = variables, forward
        self._q_values = Graph(lambda observation: [objective.q(forward(preprocess(observation)))])

    def __call__(self, inputs: tf.Tensor) -> tf.Tensor:
        return self._forward(inputs)

    def q_values(self, observation: np.ndarray) -> np.ndarray:
        """The values [B, A] float32 of observations [B, ...]."""
        return self._q_values(observation)[0]

    def numpy_weights(self) -> list[tf.Tensor]:
        """The weights for `refresh`, as tensors. A graph that changes the variables returns them, to save a call."""
        return []

    def refresh(self, numpy_weights: Sequence[np.ndarray] = ()) -> None:
        """Call it when the variables have changed. Without `numpy_weights` they are fetched on first use."""


class Trunk(NamedTuple):
    """The part of a network that computes features [B, D] from inputs."""

    shapes: list[Shape]  # of its weights: kernels [in, out] or [height, width, in, out], each followed by its bias
    features: int  # D
    forward: Callable[[Weights, tf.Tensor], tf.Tensor]


class Head(NamedTuple):
    """The part of a network that computes outputs from features."""

    shapes: list[Shape]
    forward: Callable[[Weights, tf.Tensor], tf.Tensor]


def mlp(inputs: int, widths: Sequence[int]) -> Trunk:
    """Dense layers with ReLU; inputs of any shape are flattened."""

    def forward(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        x = x if len(x.shape) == 2 else tf.reshape(x, [-1, math.prod(x.shape[1:])])
        for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
            x = tf.nn.relu(tf.nn.bias_add(x @ kernel, bias))  # TensorFlow fuses this into one operation
        return x

    shapes: list[Shape] = [shape for a, b in itertools.pairwise([inputs, *widths]) for shape in ((a, b), (b,))]
    return Trunk(shapes, widths[-1] if widths else inputs, forward)


def cnn(
    convolutions: Sequence[tuple[int, int, int]], image: Shape, widths: Sequence[int], begin: int = 0, besides: int = 0
) -> Trunk:
    """Convolutions without padding, each (side, stride, filters) with ReLU, then an `mlp`; images are [H, W, C].

    With `besides` > 0 inputs are vectors in which the image begins at `begin`, and that many other numbers. These pass a
    dense layer with ReLU, as wide as the first of `widths`, and join the convolutions' features in front of the `mlp`.
    """
    height, width, channels = image
    shapes: list[Shape] = []
    for side, stride, filters in convolutions:
        shapes += [(side, side, channels, filters), (filters,)]
        height, width, channels = (height - side) // stride + 1, (width - side) // stride + 1, filters
        if height < 1 or width < 1:
            least = _least_side(convolutions)
            raise InputError(
                f"The CNN needs images of at least {least} x {least} pixels. Received: {image[0]} x {image[1]}. "
                "Enlarge them in a wrapper, or choose --agent.network mlp or a Keras model of your own."
            )
    beside, end = mlp(besides, widths[:1] if besides else ()), begin + math.prod(image)
    dense = mlp(height * width * channels + beside.features, widths)
    own = len(shapes)

    def forward(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        if besides:
            others = tf.concat([x[:, :begin], x[:, end:]], axis=1)
            features = beside.forward(weights[own : own + len(beside.shapes)], others)
            pixels = convolved(weights, tf.reshape(x[:, begin:end], [-1, *image]))
            x = tf.concat([tf.reshape(pixels, [-1, height * width * channels]), features], axis=1)
        else:
            x = convolved(weights, x)
        return dense.forward(weights[own + len(beside.shapes) :], x)

    def convolved(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        layers = zip(convolutions, weights[:own:2], weights[1:own:2], strict=True)
        for (_, stride, _), kernel, bias in layers:
            x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, stride, "VALID"), bias))  # [B, H, W, C]
        return x

    return Trunk([*shapes, *beside.shapes, *dense.shapes], dense.features, forward)


def head(features: int, actions: int, outputs: int, *, dueling: bool, sizes: Sequence[int] = ()) -> Head:
    """One dense layer or, dueling, one for the value and one for the advantages, each fed by half of the features.

    Dueling: q = v + a - mean(a) over the actions (Wang et al. 2016, arXiv:1511.06581, equation 9), for each output. If
    actions have several dimensions of these `sizes`, it is the mean over the choices in the same dimension.
    """
    assert outputs == 1 or len(sizes) < 2

    def per_action(x: tf.Tensor, count: int) -> tf.Tensor:
        return x if outputs == 1 else tf.reshape(x, [-1, count, outputs])  # [B, A] or [B, A, N]

    if not dueling:
        shapes: list[Shape] = [(features, actions * outputs), (actions * outputs,)]
        return Head(shapes, lambda weights, x: per_action(x @ weights[0] + weights[1], actions))

    def forward(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        value_features, advantage_features = tf.split(x, 2, axis=1)
        value = per_action(value_features @ weights[0] + weights[1], 1)
        advantage = per_action(advantage_features @ weights[2] + weights[3], actions)
        if len(sizes) > 1:
            return value + advantage - advantage @ mean_in_dimension(sizes)
        return value + advantage - tf.reduce_mean(advantage, axis=1, keepdims=True)

    half = features // 2
    return Head([(half, outputs), (outputs,), (half, actions * outputs), (actions * outputs,)], forward)


def mean_in_dimension(sizes: Sequence[int]) -> np.ndarray:
    """[S, S] float32: a row [S] times this matrix has, in place of each number, the mean of its dimension."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    return ((of[:, None] == of) / np.repeat(sizes, sizes)).astype(np.float32)


class FlatNetwork(Network):
    """A trunk and a head whose weights all live in one vector `theta`.

    So Horovod averages one tensor per update. Broadcast, target copy, checksum and saving take one operation each.
    All weights start uniform in +-1/sqrt(fan in), as in PyTorch.
    """

    def __init__(
        self, trunk: Trunk, head: Head, preprocess: Preprocess, objective: Objective, rng: np.random.Generator
    ) -> None:
        self._shapes = [*trunk.shapes, *head.shapes]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self.theta = tf.Variable(_initial(self._shapes, rng), name="theta")

        def forward(inputs: tf.Tensor) -> tf.Tensor:
            parts = zip(tf.split(self.theta, self._sizes), self._shapes, strict=True)
            weights = [tf.reshape(part, shape) for part, shape in parts]
            own = len(trunk.shapes)
            return head.forward(weights[own:], trunk.forward(weights[:own], inputs))

        super().__init__([self.theta], forward, preprocess, objective)


class NumpyMlp(FlatNetwork):
    """An MLP with one output per action that acts in NumPy: a small batch costs a twentieth of a TensorFlow call."""

    def __init__(
        self,
        trunk: Trunk,
        head: Head,
        preprocess: Preprocess,
        objective: Objective,
        rng: np.random.Generator,
        sizes: Sequence[int] = (),
    ) -> None:
        super().__init__(trunk, head, preprocess, objective, rng)
        self._preprocess, self._dueling = preprocess, len(head.shapes) > 2
        self._mean_in_dimension = mean_in_dimension(sizes) if len(sizes) > 1 else None
        self._fetch = Graph(self.numpy_weights)
        self._arrays: list[np.ndarray] | None = None  # the weights, until they change

    def numpy_weights(self) -> list[tf.Tensor]:
        return [self.theta.value()]

    def refresh(self, numpy_weights: Sequence[np.ndarray] = ()) -> None:
        self._arrays = None
        for theta in numpy_weights:
            parts = np.split(theta, list(itertools.accumulate(self._sizes))[:-1])
            self._arrays = [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def q_values(self, observation: np.ndarray) -> np.ndarray:
        if self._arrays is None:
            self.refresh(self._fetch())
        weights = self._arrays or []
        x = self._preprocess.array(observation).reshape(len(observation), -1)
        own = len(weights) - (4 if self._dueling else 2)
        for kernel, bias in zip(weights[:own:2], weights[1:own:2], strict=True):
            x = np.maximum(x @ kernel + bias, 0.0)
        if not self._dueling:
            return x @ weights[-2] + weights[-1]
        value_features, advantage_features = np.split(x, 2, axis=1)
        advantage = advantage_features @ weights[-2] + weights[-1]  # [B, A]
        value = value_features @ weights[-4] + weights[-3]  # [B, 1]
        if self._mean_in_dimension is not None:
            return value + advantage - advantage @ self._mean_in_dimension
        return value + advantage - advantage.mean(axis=1, keepdims=True)


def build_network(
    name: str,
    preprocess: Preprocess,
    actions: int,
    objective: Objective,
    *,
    hidden: Sequence[int],
    dueling: bool,
    rng: np.random.Generator,
    sizes: Sequence[int] = (),
) -> Network:
    """Makes the network called `name` for the outputs of `preprocess`. See the setting `agent.network` for names.

    If actions have several dimensions of these `sizes`, `actions` is their sum.
    """
    if ":" in name:
        return _keras_network(name, preprocess, actions, objective, rng)
    if dueling and not hidden:
        raise InputError(
            "--agent.dueling splits the last hidden layer in two: give --agent.hidden at least one hidden layer."
        )
    inputs, widths = preprocess.input_shape, [*hidden]
    if dueling:
        widths[-1] *= 2  # one half feeds the value, the other the advantages
    if name in CONVOLUTIONS:
        trunk = _for_images(name, preprocess, widths)
    elif name == "mlp":
        trunk = mlp(math.prod(inputs), widths)
    else:
        raise InputError(
            f"--agent.network must be mlp, {', '.join(CONVOLUTIONS)} or module:function. Received: {name!r}."
        )
    end = head(trunk.features, actions, objective.outputs, dueling=dueling, sizes=sizes)
    parameters = sum(math.prod(shape) for shape in (*trunk.shapes, *end.shapes))
    if parameters > MOST_PARAMETERS:
        raise InputError(
            f"The network would have {parameters:,} parameters, but the limit is {MOST_PARAMETERS:,}. "
            "Lower --agent.hidden, or make observations smaller in a wrapper."
        )
    if name == "mlp" and objective.outputs == 1:
        return NumpyMlp(trunk, end, preprocess, objective, rng, sizes)
    return FlatNetwork(trunk, end, preprocess, objective, rng)


def _for_images(name: str, preprocess: Preprocess, widths: Sequence[int]) -> Trunk:
    layout, inputs = preprocess.layout, preprocess.input_shape
    for part in layout.parts:
        if part.unsure:
            named = f"`{part.name}` " if part.name else ""
            raise InputError(
                f"--agent.network {name} needs images [H, W, C], and it cannot be told whether the channels of observations "
                f"{named}of shape {list(part.unsure)} are the first or the last axis. Move them in a wrapper, such as "
                "gymnasium.wrappers.TransformObservation with numpy.moveaxis, or choose --agent.network mlp."
            )
    if not layout.is_packed:
        if len(inputs) != 3:
            raise InputError(
                f"--agent.network {name} needs images [H, W, C]. Received observations of shape {list(inputs)}. "
                "Choose --agent.network mlp."
            )
        return cnn(CONVOLUTIONS[name], inputs, widths)
    images = [part.name for part in layout.parts if part.is_image]
    if len(images) != 1:
        received = f"{len(images)} ({', '.join(images)})" if images else "none"
        raise InputError(
            f"--agent.network {name} needs exactly one image among the observations. Received: {received} in "
            f"{', '.join(part.name for part in layout.parts)}. Choose --agent.network mlp"
            + (", or drop others with the wrapper gymnasium.wrappers.FilterObservation." if images else ".")
        )
    found = preprocess.image()
    assert found is not None
    begin, image = found
    return cnn(CONVOLUTIONS[name], image, widths, begin, inputs[0] - math.prod(image))


def _keras_network(
    name: str, preprocess: Preprocess, actions: int, objective: Objective, rng: np.random.Generator
) -> Network:
    """A network around the user's model, of Keras 3 on TensorFlow or of tf_keras."""
    model = _call_builder(name, preprocess.input_shape, actions, int(rng.integers(2**31)))
    # Keras 3 wraps TensorFlow's variables, or arrays of another backend.
    variables = [v if isinstance(v, tf.Variable) else v.value for v in model.trainable_variables]
    if not all(isinstance(variable, tf.Variable) for variable in variables):
        raise InputError(f"The model of {name} runs on another backend than TensorFlow. Unset KERAS_BACKEND.")
    if model.non_trainable_weights:  # unlike `non_trainable_variables`, without the states of random generators
        raise InputError(
            f"The model of {name} has variables that are not trained ({model.non_trainable_weights[0].name}, ...). "
            "Batch statistics would differ between ranks: use LayerNormalization instead of BatchNormalization."
        )
    if model.losses:
        raise InputError(
            f"The model of {name} has losses of its own (a regularizer's). DQN's loss has none of them: leave them out."
        )
    return Network(variables, model, preprocess, objective)


def _call_builder(name: str, input_shape: Shape, actions: int, seed: int) -> Any:
    module, function = name.split(":", 1)
    try:
        builder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--agent.network {name} cannot be imported: {error}. Expected: an importable module:function."
        ) from None
    # The weights follow from `seed`. The caller's own random generators stay as they were.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        for keras in _loaded_keras():
            keras.utils.set_random_seed(seed)
        model = builder(input_shape, actions)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    if not any(isinstance(model, keras.Model) for keras in _loaded_keras()):
        raise InputError(
            f"{name}(observation_shape, actions) must return a keras.Model. Received: {type(model).__name__}."
        )
    out = model(tf.zeros((1, *input_shape)))
    if tuple(out.shape) != (1, actions):
        raise InputError(
            f"The model of {name} must map [B, {', '.join(map(str, input_shape))}] to [B, {actions}], one value per "
            f"action, or per choice in each dimension. Received: an output of shape {tuple(out.shape)} for B = 1."
        )
    return model


def _loaded_keras() -> list[Any]:
    """The Keras that TensorFlow itself uses, and tf_keras if the user's module has imported it."""
    return [tf.keras, *filter(None, [sys.modules.get("keras"), sys.modules.get("tf_keras")])]


def _initial(shapes: Sequence[Shape], rng: np.random.Generator) -> np.ndarray:
    """Initial values of weights, which come in pairs of a kernel and its bias, as one vector."""
    parts = []
    for kernel, bias in zip(shapes[::2], shapes[1::2], strict=True):
        bound = 1.0 / math.sqrt(math.prod(kernel[:-1]))
        # Biases too: otherwise all kinks of the first layer's ReLUs would pass through the origin, which is the centre
        # of the states of low-dimensional control problems.
        parts += [rng.uniform(-bound, bound, math.prod(shape)) for shape in (kernel, bias)]
    return np.concatenate(parts).astype(np.float32)


def _least_side(convolutions: Sequence[tuple[int, int, int]]) -> int:
    """The smallest square image that has a pixel left after the convolutions."""
    side = 1
    for kernel, stride, _ in reversed(convolutions):
        side = (side - 1) * stride + kernel
    return side
