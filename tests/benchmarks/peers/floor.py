"""The matrix products of one update, timed one by one: no update that makes them can be faster on this machine.

A convolution counts as the product that it is after im2col. Each product is made by NumPy's OpenBLAS, by PyTorch's `mm` (MKL)
and by oneDNN, and the fastest counts. Two floors come out: the sum over the products, each at the speed of its own shape, and
the operations divided by the best rate of all shapes.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import shared
import torch

CONVOLUTIONS = [(8, 4, 32), (4, 2, 64), (3, 1, 64)]  # size, stride, filters (Mnih et al. 2015)
SECONDS = 0.05  # for each product and library


def layers(case: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of each layer's product in one forward pass of a minibatch."""
    found, inputs = [], int(np.prod(case["observation"]))
    if case["network"] == "cnn":
        side, _, channels = case["observation"]
        for size, stride, filters in CONVOLUTIONS:
            side = (side - size) // stride + 1
            found.append((case["batch"] * side * side, size * size * channels, filters))
            channels = filters
        inputs = side * side * channels
    for outputs in (*case["hidden"], case["actions"]):
        found.append((case["batch"], inputs, outputs))
        inputs = outputs
    return found


def products(case: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(m, k, n) of all products of an update: two forward passes and one backward, which spares the observations."""
    found = []
    for i, (rows, inputs, outputs) in enumerate(layers(case)):
        found += [(rows, inputs, outputs)] * 2 + [(inputs, rows, outputs)]
        if i:
            found.append((rows, outputs, inputs))
    return found


def fastest(m: int, k: int, n: int) -> float:
    """Seconds of the product [m, k] x [k, n] by the fastest library."""
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    made = [lambda: torch.mm(a, b, out=c), lambda: np.matmul(a.numpy(), b.numpy(), out=c.numpy())]
    if torch.backends.mkldnn.is_available():
        a_dnn, b_dnn = a.to_mkldnn(), b.t().contiguous().to_mkldnn()
        made.append(lambda: torch.nn.functional.linear(a_dnn, b_dnn))
    return min(best(product) for product in made)


def best(product: Callable[[], Any]) -> float:
    product()
    found, end = float("inf"), time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        product()
        found = min(found, time.perf_counter() - start)
    return found


def learner() -> None:
    asked, results = shared.request(), {}
    times: dict[tuple[int, int, int], float] = {}
    for name, case in asked["cases"].items():
        wanted = products(case)
        times |= {shape: fastest(*shape) for shape in wanted if shape not in times}
        operations = sum(2 * m * k * n for m, k, n in wanted)
        seconds = sum(times[shape] for shape in wanted)
        peak = max(2 * m * k * n / times[m, k, n] for m, k, n in wanted)
        results[name] = {
            "megaflop": operations / 1e6,
            "gigaflops": operations / seconds / 1e9,
            "peak_gigaflops": peak / 1e9,
            "microseconds": 1e6 * seconds,
            "microseconds_at_peak": 1e6 * operations / peak,
        }
    shared.reply(
        versions=shared.versions("torch", "numpy"),
        products=results,
        **{what: {name: r[what] for name, r in results.items()} for what in ("microseconds", "microseconds_at_peak")},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    learner()
