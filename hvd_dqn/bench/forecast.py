"""What a job of many ranks will take: memory, disk and time, from a short measurement of one rank's share on this machine."""

import contextlib
import math
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import psutil

from hvd_dqn.bench.project import interconnect_with
from hvd_dqn.bench.projection import Interconnect, PhaseTime, cost, efficiency
from hvd_dqn.bench.results import provenance
from hvd_dqn.config import Config
from hvd_dqn.config_files import configure
from hvd_dqn.ranks.world import Solo
from hvd_dqn.training.plan import Plan
from hvd_dqn.training.worker import Worker

SECONDS = 3.0  # measured at least
MOST_SECONDS = 60.0  # measured at most, unless one phase takes longer
PHASES = 4  # measured at least, in less than MOST_SECONDS
UNMEASURED = 2  # phases, in which graphs are traced
MOST_SLOTS = 2_000  # of each environment's ring while measuring; the memory of the whole ring is computed
FAIR, GOOD = 0.5, 0.8  # efficiency
FEW_UPDATES = 1_000  # Stable-Baselines3's zoo solves CartPole in 6,000, and this program `identity` in 50
# As measured between two ranks of one host: tests/benchmarks/results/project-gradients.json.
IN_HOST = Interconnect(latency=2.9e-6, seconds_per_byte=1.9e-10, overhead=15e-6)
# Between hosts, chosen by us: TCP over Ethernet of 10 gigabits.
BETWEEN_HOSTS = Interconnect(latency=30e-6, seconds_per_byte=8e-10, overhead=15e-6)


class Share(NamedTuple):
    """One rank's share of a job, measured on this machine."""

    phase: PhaseTime
    cycle: float  # seconds to act and to step the environments once
    program: int  # bytes of the process without what follows
    networks: int  # bytes: weights of all networks, optimizer, gradient and message
    replay: int  # bytes of the whole rings
    minibatches: int  # bytes of a phase's, as NumPy's and as TensorFlow's arrays
    model: int  # bytes of the weights in a checkpoint
    rows: dict[str, str]  # of the plan, those that depend on the environment


def share_of(plan: Plan) -> Config:
    """The settings with which one process does what one of the plan's ranks does."""
    config, size = plan.config, plan.size
    period = plan.steps_per_phase // size
    start = max(plan.envs_per_rank * config.agent.n_step, min(plan.learn_start // size, 4 * period))
    averages_gradients = size > 1 and config.ranks.sync == "gradients"
    return configure(
        config,
        {
            "total_steps": max(plan.total_steps // size, 1),
            "env.envs_per_rank": plan.envs_per_rank,
            "replay.capacity": max(plan.envs_per_rank * min(plan.slots_per_env, MOST_SLOTS), start),
            "learner.batch_size": plan.batch_per_rank,
            "learner.learn_start": start,
            "learner.train_period": period,
            "learner.target_period": max(config.learner.target_period // size, 1),
            "learner.min_updates": 0,
            # Horovod: phases in which ranks communicate cannot be compiled.
            "learner.xla": False if averages_gradients else config.learner.xla,
            "ranks.scaling": "weak",
            "evaluation.episodes": math.ceil(config.evaluation.episodes / size),
            "checkpoint.save_replay": False,
        },
    )


def measure_share(plan: Plan, seconds: float = SECONDS) -> Share:
    """Trains one rank's share for some seconds. Raises InputError as `Worker` does."""
    with contextlib.closing(Worker(share_of(plan), Solo())) as worker:
        worker.begin_episodes()
        ends: list[float] = []
        cycle, first_cycle, acted, before = -1, 0, 0.0, 0.0
        while not _is_enough(ends, seconds):
            cycle += 1
            worker.step(cycle)
            if not worker.plan.learns_at(cycle):
                continue
            worker.finish_phase()  # with `overlap`, that of the cycles before
            worker.begin_phase(cycle)
            if worker.plan.finishes_phase_at(cycle):
                worker.finish_phase()
            ends.append(perf_counter())
            acted = worker.ledger.spent["act"] + worker.ledger.spent["env"]
            if len(ends) == UNMEASURED:
                first_cycle, before = cycle, acted
        worker.finish_phase()
        return _share(plan, worker, np.diff(ends[UNMEASURED - 1 :]), (acted - before) / (cycle - first_cycle))


def _is_enough(ends: list[float], seconds: float) -> bool:
    measured = len(ends) - UNMEASURED
    if measured < 1:
        return False
    lasted = ends[-1] - ends[UNMEASURED - 1]
    return lasted >= MOST_SECONDS or (measured >= PHASES and lasted >= seconds)


def _share(plan: Plan, worker: Worker, phases: np.ndarray, cycle: float) -> Share:
    message = int(sum(4 * math.prod(variable.shape) for variable in worker.learner.online.variables))
    model = sum(array.nbytes for array in worker.learner.state().values())
    networks = model + message * (2 if plan.size > 1 else 1)
    minibatches = plan.updates_per_phase * plan.batch_per_rank * plan.passes * _bytes_per_sample(worker)
    slots = worker.plan.slots_per_env
    process = psutil.Process()
    used = sum(_resident(each) for each in (process, *process.children(recursive=True)))
    rows = worker.describe()
    return Share(
        phase=PhaseTime(
            plan.batch_per_rank,
            plan.updates_per_phase,
            float(phases.mean()),
            float(phases.min()),
            float(phases.std()),
            message,
        ),
        cycle=cycle,
        program=max(used - worker.replay.nbytes - networks - minibatches, 0),
        networks=networks,
        replay=worker.replay.nbytes * plan.slots_per_env // slots,
        minibatches=minibatches,
        model=model,
        rows={name: rows[name] for name in ("observations", "network", "actions", "wrappers", "note") if name in rows},
    )


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _bytes_per_sample(worker: Worker) -> int:
    """Of one transition of a minibatch: NumPy's arrays, and TensorFlow's copy of them."""
    batch = worker.replay.gather(worker.replay.draw(1, 1))
    return 2 * sum(array.nbytes for array in batch if array is not None)


def forecast(
    plan: Plan, ranks_per_node: int, *, latency: float | None = None, bandwidth: float | None = None
) -> dict[str, Any]:
    """What the job will take. `latency` (µs) and `bandwidth` (GB/s) describe the network between its hosts."""
    share, config, size = measure_share(plan), plan.config, plan.size
    nodes = math.ceil(size / ranks_per_node)
    network = interconnect_with(IN_HOST if nodes == 1 else BETWEEN_HOSTS, latency, bandwidth)
    memory = {name: getattr(share, name) for name in ("program", "networks", "replay", "minibatches")}
    per_rank = sum(memory.values())
    replay_on_disk = share.replay if config.checkpoint.save_replay else 0
    checkpoint = replay_on_disk * size + share.model
    parts = cost(share.phase, network, size, config.ranks.sync)
    updates, _ = plan.updates_to_come()
    phases = updates / plan.updates_per_phase
    learning = phases * sum(parts.values())
    collecting = max(plan.cycles - phases * plan.steps_per_phase / plan.steps_per_cycle, 0) * share.cycle
    seconds = learning + collecting
    efficient = _largest_efficient(plan, share, network)
    return {
        **provenance(),
        "ranks": size,
        "nodes": nodes,
        "plan": plan.describe() | share.rows,
        "memory": memory | {"rank": per_rank, "node": per_rank * min(size, ranks_per_node)},
        "disk": {
            "checkpoint": checkpoint,
            "per_rank": replay_on_disk,
            "files": 2 * size + 3 if config.checkpoint.save_replay else 3,
            # One more exists while it is written, and the best weights are kept.
            "run": (config.checkpoint.keep + 1) * checkpoint + share.model,
            "checkpoints": plan.total_steps // config.checkpoint.period,
        },
        "network": network._asdict(),
        "phase": share.phase._asdict() | {"parts": parts},
        "time": {"seconds": seconds, "steps_per_second": plan.total_steps / seconds, "efficiency": efficiency(parts)},
        "efficient_ranks": efficient,
        "verdict": verdict(plan, efficiency(parts), updates, efficient),
    }


def _largest_efficient(plan: Plan, share: Share, network: Interconnect) -> int | None:
    """The largest power of two up to the plan's ranks with a good efficiency; None if unknown.

    Under strong scaling fewer ranks have larger shares, which were not measured.
    """
    if plan.config.ranks.scaling == "strong":
        return None
    sizes = [2**i for i in range(plan.size.bit_length())]
    return max(n for n in sizes if n == 1 or _efficiency_of(n, plan, share, network) >= GOOD)


def _efficiency_of(size: int, plan: Plan, share: Share, network: Interconnect) -> float:
    """Of fewer ranks: each update takes a rank as long, and a phase has more of them."""
    updates = Plan(plan.config, size).updates_per_phase
    more = updates / share.phase.updates
    phase = share.phase._replace(
        updates=updates,
        seconds=more * share.phase.seconds,
        least=more * share.phase.least,
        deviation=math.sqrt(more) * share.phase.deviation,
    )
    return efficiency(cost(phase, network, size, plan.config.ranks.sync))


def verdict(plan: Plan, efficient: float, updates: int, efficient_ranks: int | None) -> str:
    """Whether that many ranks make sense, in words."""
    if plan.size == 1:
        return "One rank waits for nobody."
    said = f"{efficient:.0%} of a rank's time is its own work, the rest is waiting for others and sending."
    if efficient >= GOOD:
        said += " That many ranks are used well."
    else:
        weak = "That is much for what it gains" if efficient >= FAIR else "Most of it is lost"
        fewer = f" up to {efficient_ranks} ranks keep {GOOD:.0%};" if (efficient_ranks or 1) > 1 else ""
        said += (
            f" {weak}:{fewer} larger --learner.batch-size"
            + (", --ranks.sync parameters" if plan.config.ranks.sync == "gradients" else "")
            + " or fewer ranks help."
        )
    if updates < FEW_UPDATES and plan.global_batch > plan.config.learner.batch_size:
        said += (
            f" But only {updates:,} updates of {plan.global_batch:,} transitions are taken, perhaps too few to learn from: "
            "take fewer ranks, a smaller --learner.batch-size or more --total-steps."
        )
    return said
