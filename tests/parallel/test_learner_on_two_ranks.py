"""Two real ranks: equal weights, true averages. One launch for each controller runs all checks of worker.py."""

import json
import re

import pytest

from tests.ranks import ROOT, horovodrun

WORKER = ROOT / "tests" / "parallel" / "worker.py"


def outcomes(gloo: bool) -> dict[str, str]:
    done = horovodrun(2, "python", WORKER, gloo=gloo, PYTHONPATH=str(ROOT))
    # horovodrun puts the rank before each piece of output, and may do so inside a line.
    text = re.sub(r"\[\d+(,\d+)?\]<std(out|err)>:", "", done.stdout)
    found = re.search(r"@@@(.*)@@@", text.replace("\n", ""))
    assert found, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(found.group(1))


@pytest.mark.parametrize("gloo", [pytest.param(False, id="mpi"), pytest.param(True, id="gloo", marks=pytest.mark.slow)])
def test_every_check_passes_on_two_ranks(gloo, subtests):
    results = outcomes(gloo)
    assert len(results) > 25
    for name, outcome in results.items():
        with subtests.test(name):
            assert outcome == "passed", outcome
