"""TensorFlow graphs that take and return NumPy arrays, and their building blocks: loops, gradients and clocks."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

SUMMED_BY_ONE_THREAD = 65_536  # numbers; TensorFlow uses several threads for a sum of 200,000


class Graph:
    """`function` of tensors, traced in its first call. Later calls may have other leading dimensions.

    The graph itself fetches the arrays and delivers the results, without eager tensors: a call with eight arrays, such as a
    phase of updates, takes four fifths of the time that converting each of them would take.
    With `compiled` XLA compiles the graph. Autograph is off, because it would read the source of all called functions,
    which dominates the start: use TensorFlow's own loops and branches. Several threads may call a graph in turns.
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
        self._results = [np.array(result) for result in results]  # copies: TensorFlow reuses its memory


def fold(step: Callable[[tf.Tensor, Any], Any], start: Any, begin: tf.Tensor | int, end: tf.Tensor | int) -> Any:
    """Applies `result = step(k, result)` for k = begin, ..., end - 1, from `start` on, in a loop of the graph."""
    loop = tf.while_loop(lambda k, _: k < end, lambda k, result: (k + 1, step(k, result)), (begin, start))
    return loop[1]


def global_norm(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The norm [] of all numbers together. It does not depend on the number of threads, to the last bit.

    TensorFlow sums a large tensor in several threads. So such a tensor is summed here in parts of one thread each.
    """
    halves = []
    for tensor in tensors:
        flat = tf.reshape(tensor, [-1])
        for begin in range(0, flat.shape[0], SUMMED_BY_ONE_THREAD):
            halves.append(tf.nn.l2_loss(flat[begin : begin + SUMMED_BY_ONE_THREAD]))
    return tf.sqrt(2 * tf.add_n(halves))


class DenseTape(tf.GradientTape):
    """A tape whose gradients are always dense tensors: also for embeddings, and zeros for unused variables."""

    def gradient(self, target: tf.Tensor, sources: Any) -> list[tf.Tensor]:
        gradients = super().gradient(target, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(gradient) for gradient in gradients]


class StampedTape(DenseTape):
    """Records the time at which its gradient is ready."""

    def gradient(self, target: tf.Tensor, sources: Any) -> list[tf.Tensor]:
        gradients = super().gradient(target, sources)
        self.ready = time_after(gradients)
        return gradients


def time_after(gradients: list[tf.Tensor]) -> tf.Tensor:
    """The time [] in seconds at which these gradients are ready."""
    # Identities: an operation that depends on an inlined function otherwise waits only for a part of that function.
    with tf.control_dependencies([tf.identity(part) for part in gradients]):
        return tf.timestamp()
