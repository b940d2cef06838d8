#!/usr/bin/env bash
# Checks the code (ruff, mypy, shellcheck if installed), then runs all tests but the slow ones, including those under `horovodrun -np 2`.
#   ./launch/test.sh [arguments of pytest...]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
./launch/setup.sh
export PATH=$PWD/.venv/bin:$PATH
# Environments that tests/fields trains on, and whoever only trains does not need.
python -c 'from importlib.util import find_spec
exit(not all(map(find_spec, ["ale_py", "highway_env", "icu_sepsis", "minatar", "minigrid", "mujoco"])))' \
    || python -m pip install --quiet --no-build-isolation -e '.[envs]'
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}

set -x
ruff check .
ruff format --check .
mypy
if command -v shellcheck >/dev/null; then shellcheck launch/*.sh launch/*/train* docker/*.sh .ci/run; fi
[ $# = 0 ] || exec pytest "$@"
failed=0
# These use one process each: one for every core. The others start jobs of two ranks, which wait for each other, for ends and
# for timeouts: two at a time.
pytest -n auto --maxprocesses 8 --dist loadfile tests/unit tests/fields || failed=$?
pytest -n 2 --dist loadfile --ignore tests/unit --ignore tests/fields || failed=$?
exit $failed
