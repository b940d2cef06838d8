"""Lowers whole phases of the learner to XLA's own form, which a GPU without TensorFlow can run (`phase.py`).

`python -m tests.benchmarks.gpu.lower FOLDER` writes for each case the program (some 150 KB), the weights that it starts
from, and the sums that TensorFlow returns for it on this machine's CPU.
"""

import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
import tensorflow as tf

from hvd_dqn.agent.layout import single
from hvd_dqn.agent.learner import Learner
from hvd_dqn.agent.networks import CONVOLUTIONS, FlatNetwork, Network, cnn, head, mlp
from hvd_dqn.agent.objectives import Dqn
from hvd_dqn.agent.preprocess import Preprocess
from hvd_dqn.ranks.world import Solo
from tests.benchmarks.gpu.phase import arguments, cases, weights

OBJECTIVE = Dqn(double=True, loss="huber")


def network(case: dict[str, Any], preprocess: Preprocess) -> Network:
    image = case["network"] == "cnn"
    trunk = (
        cnn(CONVOLUTIONS["cnn"], preprocess.input_shape, case["hidden"])
        if image
        else mlp(math.prod(preprocess.input_shape), case["hidden"])
    )
    end = head(trunk.features, case["actions"], 1, dueling=False)
    if case["type"] == "bfloat16":
        trunk = trunk._replace(forward=lambda w, x, forward=trunk.forward: forward(cast(w), tf.cast(x, tf.bfloat16)))
        end = end._replace(forward=lambda w, x, forward=end.forward: tf.cast(forward(cast(w), x), tf.float32))
    return FlatNetwork(trunk, end, preprocess, OBJECTIVE, np.random.default_rng(1))


def cast(weights: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return [tf.cast(weight, tf.bfloat16) for weight in weights]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in cases().items():
        shape = tuple(case["observation"])
        preprocess = Preprocess(single(shape, np.uint8, divisor=255) if len(shape) == 3 else single(shape))
        learner = Learner(
            partial(network, case, preprocess), preprocess, OBJECTIVE, Solo(), xla=True, max_gradient_norm=10.0
        )
        function = tf.function(learner._run_phase, jit_compile=True, autograph=False)
        batch = [tf.constant(x) for x in arguments(case)]
        (folder / f"{name}.hlo").write_bytes(function.experimental_get_compiler_ir(*batch)(stage="hlo_serialized"))
        np.save(folder / f"{weights(name)}.npy", learner.online.variables[0].numpy())
        # Of what takes too long here the sums are left out.
        few = case["network"] == "mlp" or case["batch"] <= 512
        sums = function(*batch)[0].numpy() if few else np.full(6, np.nan)
        np.save(folder / f"{name}.sums.npy", sums)
        print(name, sums[:3], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
