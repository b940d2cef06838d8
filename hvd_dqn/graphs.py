"""Calls of TensorFlow graphs from NumPy arrays to NumPy arrays."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf


class Graph:
    """`function` of tensors, traced in its first call; later ones may have other leading dimensions.

    The graph itself fetches the arrays and delivers the results, so that no eager tensor is made: TensorFlow 2.15 loses 48
    bytes with each of them under Python 3.11 (its issue 62551), and converting them takes most of the time of a small call.
    With `autograph` the function may have loops and branches over tensors, with `compiled` XLA compiles it.
    """

    def __init__(
        self, function: Callable[..., Sequence[tf.Tensor]], *, autograph: bool = False, compiled: bool = False
    ) -> None:
        # Autograph reads the source of all that it calls, which takes a second and more: only where it is asked for.
        self._function = tf.function(function, autograph=autograph, jit_compile=compiled or None)
        self._arguments: list[np.ndarray] = []
        self._results: list[np.ndarray] = []
        # Partial: TensorFlow takes the same method of other instances for one that is traced time and again, and warns.
        self._run = tf.function(functools.partial(self._body), autograph=False)

    def __call__(self, *arguments: np.ndarray | np.generic) -> list[np.ndarray]:
        self._arguments = [np.asarray(argument) for argument in arguments]
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
