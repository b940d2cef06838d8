"""Runs the phases that `lower.py` wrote on a GPU, by JAX. Needs JAX and NumPy, no TensorFlow.

`python phase.py FOLDER --convert`, on any machine with JAX 0.10, makes StableHLO of them (0.11 converts them no more), and
`python phase.py FOLDER` runs that.

Prints one line of JSON for the device and one per case: microseconds per update (arguments on the device, median of ten
phases after two), the sums of losses, values and gradient norms beside those that TensorFlow returned on the CPU, and the
part of the card's peak that the floating-point operations of the network's products reach.
"""

import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

MLP = {"network": "mlp", "observation": [4], "actions": 2, "updates": 32}
CNN = {"network": "cnn", "hidden": [512], "observation": [84, 84, 4], "actions": 6}
TYPES = ("float32", "bfloat16")


def cases():
    """Each case by its name: a network, its batch, the updates of a phase, the type it computes in."""
    made = {}
    for kind in TYPES:
        for width in (64, 256):
            for batch in (64, 512, 2048):
                made[f"mlp-{width}-{width}-{batch}-{kind}"] = {
                    **MLP,
                    "hidden": [width, width],
                    "batch": batch,
                    "type": kind,
                }
        for batch in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            # Fewer updates of large batches: 4 * 2048 * 2 * 28,224 B = 460 MB of images.
            updates = 16 if batch <= 128 else 4 if batch <= 1024 else 2
            made[f"nature-cnn-{batch}-{kind}"] = {**CNN, "batch": batch, "updates": updates, "type": kind}
    return made


def weights(name):
    """The name under which the weights are kept that this case starts from: the same for all batches and types."""
    return name.rsplit("-", 2)[0]


def arguments(case):
    """A phase's learning rate, target copies, ends and batch: the same numbers under every NumPy."""
    draw = np.random.RandomState(7)
    lead = (case["updates"], case["batch"])
    shape = (*lead, *case["observation"])

    def observations():
        if case["network"] == "cnn":
            return draw.bytes(int(np.prod(shape))), shape
        return draw.standard_normal(shape).astype(np.float32)

    def array(drawn):
        return np.frombuffer(drawn[0], np.uint8).reshape(drawn[1]) if isinstance(drawn, tuple) else drawn

    batch = [
        array(observations()), draw.randint(0, case["actions"], size=lead).astype(np.int64),
        draw.standard_normal(lead).astype(np.float32), np.full(lead, 0.99, np.float32), array(observations()),
    ]  # fmt: skip
    return [np.float32(1e-3), np.zeros(lead[0], bool), np.zeros(0, np.int32), *batch]


def flops(case):
    """Of the products of one update: forward and backward of s, forward of s' by both networks, two per multiplication."""
    if case["network"] == "mlp":
        widths = [*case["observation"], *case["hidden"], case["actions"]]
        forward = sum(2 * a * b for a, b in itertools.pairwise(widths))
    else:
        forward, side, channels = 0, 84, 4
        for kernel, stride, filters in ((8, 4, 32), (4, 2, 64), (3, 1, 64)):
            side = (side - kernel) // stride + 1
            forward += 2 * side * side * filters * kernel * kernel * channels
            channels = filters
        forward += 2 * side * side * channels * 512 + 2 * 512 * case["actions"]
    return 5 * forward * case["batch"]


def convert(folder):
    from jax._src.interpreters import mlir as contexts
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    for program in folder.glob("*.hlo"):
        with contexts.make_ir_context():
            module = ir.Module.parse(xla_client._xla.mlir.hlo_to_stablehlo(program.read_bytes()))
        # JAX 0.11 does not know `mhlo.copy`, and a conversion to the same type does the same.
        text = re.sub(r"mhlo\.copy (%\S+) : (\S+)", r"stablehlo.convert \1 : (\2) -> \2", str(module))
        program.with_suffix(".mlir").write_text(text)


def main(folder):
    import jax
    from jax._src.interpreters import mlir as contexts
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    jax.config.update("jax_enable_x64", True)
    device = jax.devices()[0]
    about = {"jax": jax.__version__, "device": str(device.device_kind), "platform": device.platform}
    if device.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    print(json.dumps(about), flush=True)
    for name, case in cases().items():
        known, theta = np.load(folder / f"{name}.sums.npy"), np.load(folder / f"{weights(name)}.npy")
        with contexts.make_ir_context():
            module = ir.Module.parse((folder / f"{name}.mlir").read_text())
            executable = device.client.compile_and_load(
                module, xla_client.DeviceList((device,)), xla_client.CompileOptions()
            )
        # The arguments: the batch (`ends` is unused and dropped by the compiler), then the variables in order of capture.
        rate, copies, _, *batch = arguments(case)
        moments = np.zeros_like(theta), np.zeros_like(theta)
        given = [rate, copies, *batch, np.float32(1e-3), theta, theta, np.int64(0), *moments]
        constant = [jax.device_put(x, device) for x in given[:7]]
        seconds = []
        for _ in range(12):
            placed = constant + [jax.device_put(x, device) for x in given[7:]]
            for x in placed:
                x.block_until_ready()
            began = time.perf_counter()
            result = executable.execute(placed)
            for x in result:
                x.block_until_ready()
            seconds.append(time.perf_counter() - began)
        update = float(np.median(seconds[2:])) / case["updates"]
        print(json.dumps({
            "case": name, "batch": case["batch"], "type": case["type"], "updates_per_phase": case["updates"],
            "microseconds_per_update": round(1e6 * update, 2),
            "lowest": round(1e6 * min(seconds[2:]) / case["updates"], 2),
            "teraflops_per_second": round(flops(case) / update / 1e12, 4),
            "sums": [round(float(x), 5) for x in np.asarray(result[0])[:3]],
            "sums_of_tensorflow_on_cpu": [round(float(x), 5) for x in known[:3]],
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    (convert if "--convert" in sys.argv else main)(Path(sys.argv[1]))
