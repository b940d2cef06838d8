"""The place of one job, by which its processes are told from all others."""

import pytest

from tests.ranks import processes_of


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    for process in processes_of(tmp_path):
        process.kill()
