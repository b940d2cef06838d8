#!/usr/bin/env bash
# Checks hvd_dqn on this machine's NVIDIA GPUs, or on its CPU if it has none: set-up, then tests/gpu/check.py.
#   tests/gpu/check.sh [--out FILE.json]      under ten minutes after the set-up; writes gpu-check.json and prints a table
# Results are welcome: attach both to an issue.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
gpu=()
if command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU; then gpu=(--gpu); fi
./launch/setup.sh ${gpu[@]+"${gpu[@]}"}
export PATH=$PWD/.venv/bin:$PATH
exec python -m tests.gpu.check "$@"
