#!/usr/bin/env bash
# Makes tests/benchmarks/.peers, the environment of the projects we compare with. Safe to repeat. PYTHON=/path/to/python
# chooses the interpreter (3.10 or later); arguments go to pip, for instance an index with torch's CPU builds.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
stamp=$here/.peers/requirements-installed.txt
cmp -s "$here/requirements-peers.txt" "$stamp" && exit 0

set -x
"${PYTHON:-python3}" -m venv "$here/.peers"
"$here/.peers/bin/pip" install --quiet -r "$here/requirements-peers.txt" "$@"
cp "$here/requirements-peers.txt" "$stamp"
