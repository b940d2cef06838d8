"""TensorFlow graphs, called with NumPy arrays for NumPy arrays, and what is put into them: loops, gradients and clocks."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

SUMMED_BY_ONE_THREAD = 65_536  # numbers; TensorFlow shares out the sum of 200,000 among threads


class Graph:
    """`function` of tensors, traced in its first call; later ones may have other leading dimensions.

    The graph itself fetches the arrays and delivers the results, so that no eager tensor is made: TensorFlow 2.15 loses 48
    bytes with each of them under Python 3.11 (its issue 62551), and converting them takes most of the time of a small call.
    With `compiled` XLA compiles it. Loops and branches over tensors are TensorFlow's own: autograph would read the source of
    all that is called, which takes longer than all the rest of a start. Several threads may call it: they take turns.
    """

    def __init__(self, function: Callable[..., Sequence[tf.Tensor]], *, compiled: bool = False) -> None:
        self._function = tf.function(function, autograph=False, jit_compile=compiled or None)
        self._arguments: list[np.ndarray] = []
        self._results: list[np.ndarray] = []
        self._run: Callable[[], None] | None = None
        self._turn = threading.Lock()

    def __call__(self, *arguments: np.ndarray | np.generic) -> list[np.ndarray]:
        with self._turn:
            self._arguments = [np.asarray(argument) for argument in arguments]
            if self._run is None:
                # The one trace itself: looking for it in each call would take a third of a small one.
                self._run = tf.function(self._body, autograph=False).get_concrete_function()
            self._run()
            self._arguments = []
            return self._results

    def _body(self) -> None:
        dtypes = [argument.dtype for argument in self._arguments]
        tensors = tf.numpy_function(lambda: self._arguments, [], dtypes) if dtypes else []
        for tensor, argument in zip(tensors, self._arguments, strict=True):
            tensor.set_shape([None, *argument.shape[1:]] if argument.ndim else [])
        tf.numpy_function(self._deliver, list(self._function(*tensors)), [])

    def _deliver(self, *results: np.ndarray) -> None:
        self._results = [np.array(result) for result in results]  # copies: TensorFlow uses its memory again


def fold(step: Callable[[tf.Tensor, Any], Any], start: Any, begin: tf.Tensor | int, end: tf.Tensor | int) -> Any:
    """What `step(k, result)` makes of `start` for k = begin, ..., end - 1, in a loop of the graph."""
    loop = tf.while_loop(lambda k, _: k < end, lambda k, result: (k + 1, step(k, result)), (begin, start))
    return loop[1]


def global_norm(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The norm [] of all numbers together, the same to the last bit however many threads a rank has.

    TensorFlow shares out the sum of a large tensor among them: such a one is summed in parts, each by one thread.
    """
    halves = []
    for tensor in tensors:
        flat = tf.reshape(tensor, [-1])
        for begin in range(0, flat.shape[0], SUMMED_BY_ONE_THREAD):
            halves.append(tf.nn.l2_loss(flat[begin : begin + SUMMED_BY_ONE_THREAD]))
    return tf.sqrt(2 * tf.add_n(halves))


class DenseTape(tf.GradientTape):
    """Whose gradients are tensors: of an embedding too, and of what the result does not depend on."""

    def gradient(self, target: tf.Tensor, sources: Any) -> list[tf.Tensor]:
        gradients = super().gradient(target, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(gradient) for gradient in gradients]


class StampedTape(DenseTape):
    """Takes the time when its gradient is ready."""

    def gradient(self, target: tf.Tensor, sources: Any) -> list[tf.Tensor]:
        gradients = super().gradient(target, sources)
        self.ready = time_after(gradients)
        return gradients


def time_after(gradients: list[tf.Tensor]) -> tf.Tensor:
    """The time [] in seconds when these are there."""
    # Identities: whoever depends on the results of an inlined function otherwise only waits for what it must run.
    with tf.control_dependencies([tf.identity(part) for part in gradients]):
        return tf.timestamp()
