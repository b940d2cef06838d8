"""The projection: fitted to measurements that a known model made, it finds that model again; and what it refuses."""

import json

import pytest

from hvd_dqn.bench import project as bench
from hvd_dqn.bench import projection
from hvd_dqn.bench.projection import Interconnect, Line, PhaseTime, at_batch, cost, efficiency
from hvd_dqn.errors import InputError
from hvd_dqn.ranks.world import Solo

ORIGIN = {"commit": "0123456789", "machine": {"cpu": "a CPU", "cores": 64, "gpus": []}}
INTERCONNECT = Interconnect(latency=20e-6, seconds_per_byte=1e-9, overhead=80e-6)
PER_UPDATE = Line(100e-6, 4e-6)
PHASE = at_batch(PhaseTime(64, 4, 0.001, 0.0009, 0.00005, 18_440), PER_UPDATE, 64)


def job(ranks, batch, sync="gradients", **changes):
    """A row of `bench scaling` as the model has it."""
    phase = at_batch(PHASE, PER_UPDATE, batch)
    reached = efficiency(cost(phase, INTERCONNECT, ranks, sync))
    measured = {"count": 100, "message_bytes": phase.message}
    measured |= {name: getattr(phase, name) for name in ("updates", "seconds", "least", "deviation")}
    row = {"case": "cartpole-16", "ranks": ranks, "scaling": "weak", "sync": sync, "batch": batch, "envs": 16}
    row["phase"] = measured
    return row | {"oversubscribed": False, "efficiency": {"low": reached, "median": reached, "high": reached}} | changes


def allreduces(sizes=(4_096, 18_440, 271_368, 6_748_824, 67_108_864)):
    rows = []
    for size in sizes:
        seconds = INTERCONNECT.allreduce(2, size)
        raw = INTERCONNECT.latency + size * INTERCONNECT.seconds_per_byte
        rows.append({"bytes": size, "horovod": {"seconds": {"median": seconds}}, "mpi": {"seconds": {"median": raw}}})
    return {"benchmark": "allreduce", **ORIGIN, "ranks": 2, "results": rows}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Both the model and what it is held against wait by the same draws: fewer are as good, and take a tenth of the time."""
    monkeypatch.setattr(projection, "DRAWS", 20_000)
    projection._gamma_wait.cache_clear()
    yield
    projection._gamma_wait.cache_clear()


@pytest.fixture
def files(tmp_path):
    """Writes results as files."""

    def write(*results):
        for i, result in enumerate(results):
            (tmp_path / f"{i}.json").write_text(json.dumps(result))
        return [tmp_path / f"{i}.json" for i in range(len(results))]

    return write


SCALING = {"benchmark": "scaling", **ORIGIN, "results": [job(1, 64, sync="none"), job(2, 64), job(2, 32), job(2, 128)]}


def test_it_finds_the_model_again_that_made_the_measurements(files):
    result = bench.measure(Solo(), "cartpole-16", 512, files=files(SCALING, allreduces()))
    assert result["fit"]["seconds_per_update"] == pytest.approx(PER_UPDATE._asdict(), rel=1e-6)
    assert result["fit"]["network"] == pytest.approx(INTERCONNECT._asdict(), rel=1e-3)
    assert [row["ranks"] for row in result["results"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    for row in result["results"]:
        expected = efficiency(cost(PHASE, INTERCONNECT, row["ranks"], "gradients"))
        assert row["efficiency"] == pytest.approx(expected, rel=1e-3)
        assert row["times_one_rank"] == pytest.approx(row["ranks"] * expected, rel=1e-3)


def test_what_checks_it_was_not_fitted_to(files):
    late = job(2, 64, efficiency={"median": 0.5})
    slow = allreduces()
    slow["results"][1]["horovod"]["seconds"]["median"] *= 2  # 18,440 B: the second of four sizes that a case may send
    slow["results"][4]["horovod"]["seconds"]["median"] *= 2  # larger than any
    odd = job(2, 128, sync="none")  # the middle one of three batches
    odd["phase"]["seconds"] *= 2
    scaling = {"benchmark": "scaling", **ORIGIN, "results": [odd, late, job(2, 256), job(4, 64, oversubscribed=True)]}
    result = bench.measure(Solo(), "cartpole-16", 512, files=files(scaling, slow))
    # Neither the fit of the batches nor that of the messages has seen any of these...
    assert result["fit"]["seconds_per_update"] == pytest.approx(PER_UPDATE._asdict(), rel=1e-6)
    assert result["fit"]["network"] == pytest.approx(INTERCONNECT._asdict(), rel=1e-3)
    # ... and each is found to be off. A job of more ranks than cores is no check.
    checks = {check["what"]: check for check in result["checks"]}
    assert checks["one rank's update, batch 128"]["error"] == pytest.approx(-50, abs=0.1)
    assert checks["all-reduce of 18,440 B, 2 ranks"]["error"] == pytest.approx(-50, abs=0.1)
    assert checks["all-reduce of 67,108,864 B, 2 ranks"]["error"] == pytest.approx(-50, abs=0.1)
    expected = 100 * efficiency(cost(PHASE, INTERCONNECT, 2, "gradients"))
    assert checks["efficiency of 2 ranks, weak, batch 64"]["error"] == pytest.approx(expected - 50, abs=0.1)
    assert checks["efficiency of 2 ranks, weak, batch 256"]["error"] == pytest.approx(0, abs=0.1)
    assert not [what for what in checks if "4 ranks" in what]


def test_phases_of_another_mixture_are_left_out(files):
    fewer = job(1, 32, sync="none")
    fewer["phase"] |= {"updates": 8.0, "seconds": 1.0}
    other = job(1, 256, sync="none", envs=8)
    other["phase"]["seconds"] = 1.0
    scaling = {"benchmark": "scaling", **ORIGIN, "results": [job(1, 64, sync="none"), job(2, 128), fewer, other]}
    result = bench.measure(Solo(), "cartpole-16", 8, files=files(scaling, allreduces()))
    assert result["fit"]["seconds_per_update"] == pytest.approx(PER_UPDATE._asdict(), rel=1e-6)


def test_parameters_are_checked_with_jobs_that_averaged_parameters(files):
    scaling = {"benchmark": "scaling", **ORIGIN, "results": [*SCALING["results"], job(2, 64, sync="parameters")]}
    result = bench.measure(Solo(), "cartpole-16", 8, sync="parameters", files=files(scaling, allreduces()))
    checks = [check for check in result["checks"] if check["unit"] == "%"]
    assert len(bench.render(result).renderables) == 3
    assert [check["what"] for check in checks] == ["efficiency of 2 ranks, weak, batch 64"]
    assert checks[0]["error"] == pytest.approx(0, abs=0.1)


def test_another_network_is_projected_but_the_measured_one_checked(files):
    given = files(SCALING, allreduces())
    here, there = (bench.measure(Solo(), "cartpole-16", 24, files=given, latency=latency) for latency in (None, 100.0))
    assert there["checks"] == here["checks"]
    assert [row["ranks"] for row in there["results"]] == [1, 2, 4, 8, 16, 24]
    assert there["network"]["latency"] == pytest.approx(100e-6)
    assert there["network"]["overhead"] == pytest.approx(80e-6, rel=1e-3)
    assert there["results"][1]["efficiency"] < here["results"][1]["efficiency"] - 0.1
    assert bench.interconnect_with(INTERCONNECT, None, 10.0) == pytest.approx(
        INTERCONNECT._replace(seconds_per_byte=1e-10)
    )


def test_a_result_is_found_in_what_horovodrun_makes_of_it(tmp_path):
    path = tmp_path / "allreduce.json"
    path.write_text("[1,0]<stdout>:" + json.dumps(allreduces()) + "[1,0]<stdout>:\n")
    assert bench._read(path) == allreduces()


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ([SCALING], r"no all-reduces: add `horovodrun -np 2 hvd-dqn bench allreduce --json`"),
        ([allreduces()], r"nothing of one rank's cartpole-16 with its own batch of 64: add .hvd-dqn bench scaling"),
        ([{"benchmark": "learner"}], r"0.json: the result of bench learner"),
        ([[]], r"0.json: TypeError"),
        ([{"benchmark": "loop", **ORIGIN, "ranks": 1, "results": [{"case": "cartpole-16"}]}], r"KeyError: 'batch'"),
        (
            [SCALING, allreduces() | {"machine": {"cpu": "other"}}],
            r"of one machine. Received: .*'a CPU'.* and .*'other'",
        ),
    ],
)
def test_files_that_do_not_suffice_are_refused(results, line, files):
    with pytest.raises(InputError, match=line):
        bench.measure(Solo(), "cartpole-16", 512, files=files(*results))


def test_it_tells_where_and_with_which_code_it_was_measured(files):
    result = bench.measure(Solo(), "cartpole-16", 512, files=files(SCALING, allreduces() | {"commit": "abc"}))
    assert (result["machine"], result["measured_at"]) == (ORIGIN["machine"], ["0123456789", "abc"])


def test_one_core_cannot_measure_two_ranks(monkeypatch):
    monkeypatch.setattr(bench, "check_launcher", lambda: None)
    monkeypatch.setattr(bench, "cores", lambda: 1)
    with pytest.raises(InputError, match=r"two ranks with a core each.*give --files"):
        bench.measure(Solo(), "cartpole-16", 512)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--files takes what `bench loop`.*nothing.json: .*No such file"):
        bench.measure(Solo(), "cartpole-16", 512, files=[tmp_path / "nothing.json"])
