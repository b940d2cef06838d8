"""`hvd-dqn plan`: tells what a training on so many ranks would do and take, without starting them."""

import json
from collections.abc import Sequence
from typing import Any

from hvd_dqn.commands.options import PlanOptions, read_settings
from hvd_dqn.commands.words import asks_for_help
from hvd_dqn.config import Config
from hvd_dqn.errors import InputError
from hvd_dqn.loading import load_tensorflow, loading
from hvd_dqn.ranks.placement import cores
from hvd_dqn.ranks.world import World
from hvd_dqn.training.plan import Plan


def run(arguments: Sequence[str], world: World) -> None:
    options, name, config = read_settings(arguments, PlanOptions)
    plan = Plan(config, options.ranks)
    if options.check:
        return
    with loading():
        load_tensorflow()
        from hvd_dqn.bench import forecast

    per_node = options.ranks_per_node or min(options.ranks, _devices())
    found = {
        "preset": name,
        **forecast.forecast(plan, per_node, latency=options.latency, bandwidth=options.bandwidth),
    }
    if options.as_json:
        print(json.dumps(found))
        return
    from rich import print as show
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for heading, text in rows(found, config).items():
        table.add_row(heading, text)
    show(table)


def check_size(arguments: Sequence[str], ranks: int) -> None:
    """Raises InputError if so many ranks cannot carry out a training. It takes no part in how settings are refused.

    Every rank calls it before it is connected to the others, which takes a while. The plan depends on settings and
    number alone, so all come to the same answer; what is wrong on one host only is told later, when they are connected.
    """
    if asks_for_help(arguments):
        return
    try:
        _, _, config = read_settings(arguments)
    except InputError:
        return
    Plan(config, ranks)


def _devices() -> int:
    """How many ranks this machine is for: one for each GPU or, without any, for each core."""
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU")) or cores()


def rows(found: dict[str, Any], config: Config) -> dict[str, str]:
    """What was found, for display."""
    memory, disk, time, machine = found["memory"], found["disk"], found["time"], found["machine"]
    parts = ", ".join(f"{name} {_bytes(memory[name])}" for name in ("program", "networks", "replay", "minibatches"))
    on_nodes = f"{_bytes(memory['node'])} per node" + (f", on {found['nodes']} nodes" if found["nodes"] > 1 else "")
    network = found["network"]
    hops = f"{1e6 * network['latency']:.3g} µs and {1e-9 / network['seconds_per_byte']:.3g} GB/s between ranks"
    return found["plan"] | {
        "memory": f"{_bytes(memory['rank'])} per rank ({parts}); {on_nodes}",
        "disk": f"{_bytes(disk['run'])} at most: {config.checkpoint.keep} checkpoints of {_bytes(disk['checkpoint'])} "
        f"in {disk['files']:,} files, {_bytes(disk['per_rank'])} of each rank, and one more while it is written",
        "time": f"{_duration(time['seconds'])}, {time['steps_per_second']:,.0f} steps/s, without the start, evaluations and "
        f"{disk['checkpoints']:,} checkpoints",
        "efficiency": found["verdict"],
        "assumed": f"every rank as fast as one on {', '.join(machine['gpus']) or machine['cpu']}, where a phase took "
        f"{1e3 * found['phase']['seconds']:.3g} ms" + (f"; {hops}" if found["ranks"] > 1 else ""),
    }


def _bytes(number: float) -> str:
    power = next(power for power in (0, 3, 6, 9, 12) if number < 10 ** (power + 3) or power == 12)
    return f"{number / 10**power:,.3g} { {0: 'B', 3: 'kB', 6: 'MB', 9: 'GB', 12: 'TB'}[power] }"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
