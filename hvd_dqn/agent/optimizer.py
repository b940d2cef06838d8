"""The optimizer."""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf


class Adam(tf.compat.v1.train.Optimizer):
    """Adam (Kingma & Ba 2015) of a few large variables, each updated by one operation.

    Horovod: `horovod.tensorflow.DistributedOptimizer` wraps TensorFlow's own optimizers. Its wrapper of Keras optimizers
    depends on the version of Keras, and does not average gradients under Keras 3.
    """

    beta_1, beta_2 = 0.9, 0.999

    def __init__(self, variables: Sequence[tf.Variable], *, epsilon: float) -> None:
        super().__init__(use_locking=False, name="Adam")
        self.epsilon = epsilon
        self.learning_rate = tf.Variable(0.0, trainable=False)
        self.iterations = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.slots = [self._slots_of(variable) for variable in variables]

    @staticmethod
    def _slots_of(variable: tf.Variable) -> tuple[tf.Variable, tf.Variable]:
        """Running means of the gradient and of its square."""
        zeros = tf.zeros(variable.shape, variable.dtype)
        return tf.Variable(zeros, trainable=False), tf.Variable(zeros, trainable=False)

    @property
    def state(self) -> list[tf.Variable]:
        """The variables that must be equal on all ranks, and are saved."""
        return [self.iterations, *(slot for slots in self.slots for slot in slots)]

    def compute_gradients(
        self, loss: tf.Tensor, var_list: Sequence[tf.Variable], tape: tf.GradientTape
    ) -> list[tuple[tf.Tensor, tf.Variable]]:
        return list(zip(tape.gradient(loss, var_list), var_list, strict=True))

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[tf.Tensor, tf.Variable]], global_step: Any = None, name: Any = None
    ) -> None:
        """Takes one step; the pairs are in the order of the variables that this was made for."""
        step = tf.cast(self.iterations + 1, tf.float32)
        for (gradient, variable), (m, v) in zip(grads_and_vars, self.slots, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=tf.pow(self.beta_1, step),
                beta2_power=tf.pow(self.beta_2, step),
                lr=self.learning_rate,
                beta1=self.beta_1,
                beta2=self.beta_2,
                epsilon=self.epsilon,
                grad=gradient,
            )
        self.iterations.assign_add(1)
