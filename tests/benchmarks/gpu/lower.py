"""Lowers whole phases of the learner to XLA's own form, which a GPU without TensorFlow can run (`phase.py`).

`python -m tests.benchmarks.gpu.lower FOLDER` writes for each case the program (some 150 KB), the weights that it starts
from, and the sums that TensorFlow returns for it on this machine's CPU.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
import tensorflow as tf

from hvd_dqn.agent.learner import Learner
from hvd_dqn.agent.networks import FlatNetwork, Network, build_network, encode
from hvd_dqn.ranks.world import Solo
from tests.benchmarks.gpu.phase import arguments, cases, weights


def network(case: dict[str, Any]) -> Network:
    made = build_network(
        case["network"], tuple(case["observation"]), None, case["actions"], hidden=case["hidden"], dueling=False,
        rng=np.random.default_rng(1),
    )  # fmt: skip
    if case["type"] == "bfloat16":
        assert isinstance(made, FlatNetwork)

        def values(observation: tf.Tensor) -> tf.Tensor:
            theta = tf.cast(made.theta, tf.bfloat16)
            parts = zip(tf.split(theta, made._sizes), made._shapes, strict=True)
            x = tf.cast(encode(observation, None), tf.bfloat16)
            return tf.cast(made._forward([tf.reshape(part, shape) for part, shape in parts], x), tf.float32)

        made._values = values
    return made


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in cases().items():
        learner = Learner(
            lambda case=case: network(case), Solo(), double=True, loss="huber", xla=True, max_gradient_norm=10.0
        )
        function = tf.function(learner._take_updates, jit_compile=True, autograph=False)
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
