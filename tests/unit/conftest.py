"""For unit tests: TensorFlow's threads, which the first test that computes would otherwise settle for all."""

import tensorflow as tf

# Some tests have ranks that are threads, and wait for each other inside graphs.
tf.config.threading.set_inter_op_parallelism_threads(4)
tf.zeros(1)
