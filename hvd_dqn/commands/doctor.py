"""`hvd-dqn doctor`: checks that machine, libraries and ranks work together, or an environment, and says how to fix it."""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from rich import box
from rich import print as show
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hvd_dqn import __version__
from hvd_dqn.agent.optimizer import Adam
from hvd_dqn.bench.allreduce import time_allreduce
from hvd_dqn.bench.results import count
from hvd_dqn.commands.host import (
    HOST_CHECKS,
    Ranks,
    Readable,
    by_host,
    describe_host,
    mpirun_version,
    notes,
    read_error,
    told_limits,
)
from hvd_dqn.commands.options import read_doctor
from hvd_dqn.graphs import DenseTape, Graph
from hvd_dqn.loading import versions
from hvd_dqn.printing import few_printed_lines
from hvd_dqn.ranks.lockstep import in_step
from hvd_dqn.ranks.placement import launched_ranks
from hvd_dqn.ranks.world import World, mpi_library
from hvd_dqn.training.examination import examine_environment

SETTINGS = ("HOROVOD_", "OMPI_MCA_", "OMP_", "TF_", "MALLOC_", "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK")
# Variables that launchers set for their own processes, such as addresses and keys. Users never set them.
INTERNAL = ("OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_shmem_", "OMPI_MCA_initial_wdir", "TF2_")
INTERNAL_PARTS = ("SECRET", "KEY", "_ADDR", "_PORT", "RANK", "SIZE", "HOSTNAME", "CLI_CONFIG")
FLOATS = (4_610, 1_687_206)  # numbers in the gradients of the 64-64 MLP and of the Nature CNN
ROUNDS = 5  # of all-reduces: few, so that the command is quick


def run(arguments: Sequence[str], world: World) -> None:
    options, config = in_step(world, lambda: read_doctor(arguments))
    if config is None:
        result = examine(world)
        print(json.dumps(result)) if options.as_json else show(render(result))
        return
    # The chief alone: the others wait for it here, so that its speed is that of a rank which has the machine to itself.
    with few_printed_lines():
        found = in_step(world, lambda: examine_environment(config) if world.rank == 0 else None)
    if found is not None:
        print(json.dumps(found)) if options.as_json else show(render_environment(found))


def examine(world: World) -> dict[str, Any]:
    """Collects a report from every rank and times all-reduces. A collective; all ranks return the same."""
    memory = Readable()
    places = world.gather((world.hostname, *memory.place))
    ranks = world.gather(_describe_rank(world) | {"read_error": _read_error(world, places)})
    return {
        "hvd_dqn": __version__,
        "ranks": ranks,
        "allreduce": [_time_allreduce(world, floats) for floats in FLOATS] if world.size > 1 else [],
        "notes": notes(ranks),
        "problems": problems(ranks),
    }


def _read_error(world: World, places: Sequence[tuple[str, int, int]]) -> str | None:
    """Why this rank may not read the memory of the next one on its host; None if it may, or if there is none."""
    others = [*places[world.rank + 1 :], *places[: world.rank]]
    return next((read_error(*place) for host, *place in others if host == world.hostname), None)


def _describe_rank(world: World) -> dict[str, Any]:
    """What one rank reports about itself."""
    mpi = mpi_library()  # loads it: only then Horovod can be found to use another one
    return {
        "rank": world.rank,
        "size": world.size,
        "local_rank": world.local_rank,
        "local_size": world.local_size,
        "host": world.hostname,
        "launched": launched_ranks(),
        "cores": sorted(os.sched_getaffinity(0)),
        "threads": int(os.environ.get("TF_NUM_INTRAOP_THREADS", 0)) or len(os.sched_getaffinity(0)),
        "gpus": gpus([gpu.name for gpu in tf.config.get_visible_devices("GPU")], os.environ),
        "versions": versions(),
        "horovod": world.describe(),
        "settings": steering_variables(os.environ),
        "mpi": mpi,
        "mpirun": mpirun_version() if world.rank == 0 else None,
        **describe_host(),
        "averaged": _step(world),
    }


def gpus(names: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The host's numbers or ids of TensorFlow's GPUs. TensorFlow itself counts within CUDA_VISIBLE_DEVICES."""
    numbers = [int(name.rsplit(":", 1)[1]) for name in names]
    visible = [word.strip() for word in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return [visible[number] if number < len(visible) else str(number) for number in numbers]


def steering_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that control threads, Horovod and Open MPI."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(SETTINGS)
        and not name.startswith(INTERNAL)
        and not any(part in name for part in INTERNAL_PARTS)
    }


def _time_allreduce(world: World, floats: int) -> dict[str, float]:
    """The microseconds of one all-reduce, and its megabytes per second."""
    found = time_allreduce(world, floats, ROUNDS)
    microseconds = {name: 1e6 * seconds for name, seconds in found["seconds"].items()}
    return {"bytes": 4 * floats, **microseconds, "megabytes_per_second": found["bytes_per_second"] / 1e6}


def _step(world: World) -> tuple[float, float]:
    """One step of the optimizer on the gradient rank + 1: the averaged gradient, and the weight. A collective."""
    weight = tf.Variable([0.0])
    adam = Adam([weight], epsilon=1e-7)
    adam.learning_rate.assign(1e-3)
    averaging = world.wrap(adam, "none")

    def step() -> list[tf.Tensor]:
        with DenseTape() as tape:
            loss = (world.rank + 1.0) * tf.reduce_sum(weight)
        averaged = averaging.compute_gradients(loss, [weight], tape)
        averaging.apply_gradients(averaged)
        return [averaged[0][0][0], weight[0]]

    gradient, stepped = Graph(step)()
    return float(gradient), float(stepped)


def problems(ranks: Ranks) -> list[str]:
    """Every problem in the reports of the ranks, each with the way out."""
    return list(dict.fromkeys(complaint for check in CHECKS for complaint in check(ranks)))


def _unconnected_ranks(ranks: Ranks) -> Iterator[str]:
    for rank in ranks:
        if rank["size"] == 1 and rank["launched"] > 1:
            yield (
                f"The launcher started {rank['launched']} ranks, but this one is not connected to the others: mpi4py "
                f"uses another MPI ({rank['mpi']}) than the launcher's. Run launch/setup.sh with one mpirun on "
                "PATH and start the job with that mpirun; srun needs --mpi=pmix."
            )


def _no_horovod(ranks: Ranks) -> Iterator[str]:
    missing = [name for name in ("horovod", "mpi4py") if name not in ranks[0]["versions"]]
    if missing:
        yield f"A single process works, but several ranks need {' and '.join(missing)}: run launch/setup.sh."
    elif "horovod_error" in ranks[0]["horovod"]:
        yield (
            "Horovod is installed but cannot be used. It must be built after TensorFlow and against it: "
            f"run launch/setup.sh. The reason: {ranks[0]['horovod']['horovod_error']}"
        )


def _no_averaging(ranks: Ranks) -> Iterator[str]:
    expected = (ranks[0]["size"] + 1) / 2
    averages, weights = zip(*(rank["averaged"] for rank in ranks), strict=True)
    # Horovod multiplies the sum by 1 / size, which is exact for some sizes only.
    if not all(math.isclose(average, expected, rel_tol=1e-5) for average in averages) or len(set(weights)) > 1:
        yield (
            f"Horovod does not average gradients: the mean of 1 to {ranks[0]['size']} is {expected}, and the ranks received "
            f"{', '.join(map(str, averages[:8]))}. Weights would differ. Run launch/setup.sh again."
        )


def _shared_cores(ranks: Ranks) -> Iterator[str]:
    for host, neighbours in by_host(ranks):
        threads = sum(rank["threads"] for rank in neighbours)
        cores = len({core for rank in neighbours for core in rank["cores"]})
        quota = neighbours[0]["limits"]["quota"]
        if threads > min(cores, quota or cores) and (len(neighbours) > 1 or quota):
            share = max(1, int(min(cores, quota or cores)) // len(neighbours))
            allowed = count(cores, "core") if not quota or quota > cores else f"a CPU quota of {quota:.4g}"
            yield (
                f"{count(len(neighbours), 'rank')} on {host} run {threads} threads on {allowed} and so wait "
                f"for each other: set OMP_NUM_THREADS and TF_NUM_INTRAOP_THREADS to {share}"
                + (", start fewer ranks" if min(cores, quota or cores) < len(neighbours) else "")
                + ", or let the launcher give more cores (mpirun --bind-to none, srun --cpus-per-task)."
            )


def _shared_gpu(ranks: Ranks) -> Iterator[str]:
    for host, neighbours in by_host(ranks):
        owners = defaultdict(list)
        for rank in neighbours:
            for gpu in rank["gpus"]:
                owners[gpu].append(str(rank["rank"]))
        for gpu, names in owners.items():
            if len(names) > 1:
                yield (
                    f"Ranks {', '.join(names)} share GPU {gpu} on {host}, which NCCL does not allow: start one rank "
                    "per GPU, and let each rank see only its own GPU (srun --gpus-per-task=1) or all GPUs."
                )


def _no_nccl(ranks: Ranks) -> Iterator[str]:
    if len(ranks) > 1 and any(rank["gpus"] for rank in ranks) and not ranks[0]["horovod"].get("nccl_built", False):
        yield (
            "There are GPUs, but Horovod was built without NCCL, so every gradient goes through the host's memory: "
            "run launch/setup.sh --gpu, which builds with HOROVOD_GPU_OPERATIONS=NCCL."
        )


def _different_versions(ranks: Ranks) -> Iterator[str]:
    for name in sorted({name for rank in ranks for name in rank["versions"]}):
        counts = Counter(rank["versions"].get(name, "none") for rank in ranks)
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0]
            odd = next(rank for rank in ranks if rank["versions"].get(name, "none") != usual)
            here = odd["versions"].get(name, "none")
            yield (
                f"The ranks have different versions of {name}: {here} on {odd['host']} and {usual} elsewhere. "
                "Let all hosts share one .venv, or run launch/setup.sh on each host."
            )


CHECKS: tuple[Callable[[Ranks], Iterator[str]], ...] = (
    _unconnected_ranks,
    _no_horovod,
    _no_averaging,
    _shared_cores,
    _shared_gpu,
    _no_nccl,
    _different_versions,
    *HOST_CHECKS,
)


def render(report: dict[str, Any]) -> RenderableType:
    """The report for display: what is installed and built, a row per rank, the all-reduces, and the problems."""
    chief = report["ranks"][0]
    about = Table.grid(padding=(0, 2))
    about.add_row("versions", _pairs({"hvd_dqn": report["hvd_dqn"], **chief["versions"]}))
    build = {k.replace("_", " "): v for k, v in chief["horovod"].items() if k.endswith(("_built", "_error"))}
    about.add_row("Horovod", _pairs(build) if build else "not installed")
    about.add_row("settings", _pairs(chief["settings"], "="))
    about.add_row("limits", Text("\n".join(told_limits(report["ranks"])), overflow="fold"))
    for row in report["allreduce"]:
        spread = f"{row['median']:,.0f} µs (quartiles {row['low']:,.0f} and {row['high']:,.0f})"
        about.add_row(
            "all-reduce", f"{row['bytes'] / 1e3:,.0f} kB in {spread}: {row['megabytes_per_second']:,.0f} MB/s"
        )
    ranks = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title in ("rank", "host", "local\nrank", "cores", "threads", "device", "MPI", "thread\nlevel", "controller"):
        # On a narrow terminal long texts are folded, never cut off.
        ranks.add_column(title, overflow="fold", no_wrap=title not in ("host", "cores", "device", "MPI"))
    for rank in report["ranks"]:
        horovod = rank["horovod"]
        ranks.add_row(
            f"{rank['rank']}/{rank['size']}",
            rank["host"],
            f"{rank['local_rank']}/{rank['local_size']}",
            _ranges(rank["cores"]),
            str(rank["threads"]),
            ", ".join(f"GPU {gpu}" for gpu in rank["gpus"]) or "CPU",
            " ".join(horovod.get("mpi_library", "none").split()),
            horovod.get("mpi_thread_level", "none"),
            next((name for name in ("MPI", "Gloo") if horovod.get(f"{name.lower()}_enabled")), "none"),
        )
    said = Table.grid(padding=(0, 1))
    for note in report["notes"]:
        said.add_row("-", Text(note, overflow="fold"))
    complaints = Table.grid(padding=(0, 1))
    for complaint in report["problems"]:
        complaints.add_row("!", Text(complaint, overflow="fold"))
    return Group(
        about, ranks, *([said] if report["notes"] else []), complaints if report["problems"] else "No problem found."
    )


def render_environment(report: dict[str, Any]) -> RenderableType:
    """The report on an environment for display."""
    rows = {"environment": report["id"]}
    if report["kwargs"]:
        rows["arguments"] = json.dumps(report["kwargs"])
    if report["wrappers"]:
        rows["wrappers"] = ", ".join(report["wrappers"])
    rows |= {"observations": report["spaces"]["observation"], "actions": report["spaces"]["action"]}
    if "network" in report:
        network, replay, play = report["network"], report["replay"], report["random_play"]
        rows["network sees"] = (
            f"{_shape(network['shape'])} {network['dtype']} from {network['low']:.4g} to {network['high']:.4g}"
        )
        rows["and chooses"] = network["choices"]
        rows["replay keeps"] = (
            f"{_shape(replay['shape'])} {replay['dtype']}, {replay['bytes_per_transition']:,} bytes per transition"
        )
        rows["random play"] = (
            f"{count(play['episodes'], 'episode')} in {play['steps']} steps, "
            + (
                f"mean return {play['return_mean']:.4g}, mean length {play['length_mean']:.4g}, "
                if play["episodes"]
                else ""
            )
            + count(play["rewards"], "different reward")
        )
        rows["action mask"] = report["action_mask"] or "none"
        rows["after a resume"] = (
            "the run continues exactly"
            if report["resumes_exactly"]
            else "new episodes begin: its state cannot be saved"
        )
    for speed in report.get("steps_per_second", []):
        copies = "1 copy" if speed["copies"] == 1 else f"{speed['copies']} copies"
        rows[f"speed of {copies}"] = f"{speed['steps']:,.0f} steps/s on one rank"
    about = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        about.add_row(name, Text(value, overflow="fold"))
    said = Table.grid(padding=(0, 1))
    for text in report.get("checker", []):
        said.add_row("-", Text(text, overflow="fold"))
    complaints = Table.grid(padding=(0, 1))
    for text in report["problems"]:
        complaints.add_row("!", Text(text, overflow="fold"))
    checked = ["\nGymnasium's checker:", said] if report.get("checker") else ["\nGymnasium's checker finds nothing."]
    return Group(
        about, *(checked if "checker" in report else []), complaints if report["problems"] else "No problem found."
    )


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _pairs(values: Mapping[str, Any], between: str = " ") -> Text:
    words = {True: "yes", False: "no"}
    pairs = ", ".join(f"{k}{between}{words[v] if isinstance(v, bool) else v}" for k, v in values.items())
    return Text(pairs, overflow="fold")


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
