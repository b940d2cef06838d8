// Horovod 0.28.1 includes this path, where the header was until TensorFlow 2.17.
#include "tensorflow/compiler/xla/hlo/builder/xla_builder.h"
