#!/usr/bin/env bash
# Makes .venv at the project's root: MPI, the packages pinned in constraints.txt, and Horovod built against both.
# Safe to repeat: a ready .venv is left as it is, a half-finished one is picked up. `--gpu` (or HVD_DQN_GPU=1) builds
# for NVIDIA GPUs, PYTHON=/path/to/python chooses the interpreter. Logs: .venv/setup-logs/.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
logs=$venv/setup-logs
supported="3.10 to 3.13"
gpu=${HVD_DQN_GPU:-$(cat "$venv/.gpu" 2>/dev/null || echo 0)} # what .venv was made for, unless said
child=
PATH=${PATH//"$venv/bin:"/} # an activated .venv must not be made from itself

say() { printf '%s\n' "$*" >&2; }
stop() { say "setup.sh: $*"; exit 1; }
have() { command -v "$1" >/dev/null; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

case "$*" in
    "") ;;
    --gpu) gpu=1 ;;
    *) say "usage: [PYTHON=python3.12] $0 [--gpu]"; exit 2 ;;
esac

# Without job control a child ignores Ctrl-C, so end it, and the compilers under it, by its process group.
trap '[ -z "$child" ] || kill -- "-$child" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Where a log has come to: cmake's percentage if there is one, else its last line.
progress() {
    tail -c 60000 "$1" | tr '\r' '\n' | tr -cd '[:print:]\n' \
        | awk '/\[ *[0-9]+%\]/ {done = $0} NF {last = $0} END {$0 = done ? done : last; $1 = $1; print}' | cut -c1-100
}

# The lines of a log that tell why: errors as pip, apt, cmake and compilers write them, else the end.
reason() {
    if grep -qaiE 'name resolution|failure resolving|could not resolve|unreachable|timed out|connection refused|proxyerror|max retries' "$1"; then
        echo "The network did not answer: check the connection, https_proxy, and pip's own settings (\`pip config list\`)."
    fi
    grep -aE 'error:|ERROR:|CMake Error|^E: |No space left|Killed|[A-Za-z]Error: ' "$1" | uniq | sed -n '1,6p;$p' | uniq | cut -c1-300 \
        || tail -n 8 "$1"
}

# run LOG COMMAND...: shows the command, then a sign of life while its output goes to the log; a failure ends the set-up.
run() {
    local log=$logs/$1.log start=$SECONDS shown=$SECONDS elapsed
    shift
    mkdir -p "$logs"
    say "      \$ ${*%%$'\n'*}"
    setsid "$@" >"$log" 2>&1 </dev/null &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        elapsed=$(printf '%d:%02d' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)))
        if [ -t 2 ]; then
            printf '\r\033[K      %s  %.*s' "$elapsed" "$(($(tput cols 2>/dev/null || echo 80) - 14))" "$(progress "$log")" >&2
        elif [ $((SECONDS - shown)) -ge 30 ]; then
            shown=$SECONDS
            say "      $elapsed  $(progress "$log")"
        fi
        sleep 0.3
    done
    [ ! -t 2 ] || printf '\r\033[K' >&2
    if ! wait "$child"; then
        child=
        say "FAILED: ${*%%$'\n'*}"
        reason "$log" | sed 's/^/    /' >&2
        stop "see the whole log: $log"
    fi
    child=
}

find_python() {
    local candidate candidates=(python3.12 python3.11 python3.13 python3.10 python3) version
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    python="" seen=""
    for candidate in "${candidates[@]}"; do
        # Run it: pyenv puts shims on PATH for versions that are not active, and they fail.
        version=$(version_of "$candidate") || continue
        case $version in
            3.1[0-3]) python=$candidate python_version=$version; return ;;
            *) seen+=" $candidate is $version." ;;
        esac
    done
}

# What a ready .venv was made from; it is ready only as long as this stays the same.
mpi_found() { command -v mpirun && mpirun --version 2>/dev/null; }
compat=$root/launch/horovod-compat
stamp() { { cat "$root"/launch/{setup.sh,constraints.txt} "$root/setup.cfg"; echo "$root $gpu"; mpi_found; } | sha256sum; }
horovod_stamp() {
    { grep -E '^tensorflow' "$root/launch/constraints.txt"; cat "$root/launch/horovod.txt"; find "$compat" -type f -exec cat {} +
        echo "$python_version $gpu ${CXX:-c++}"; mpi_found; "${CXX:-c++}" --version | sed -n 1p; } | sha256sum
}

venv_is_sound() {
    local version
    version=$(version_of "$venv/bin/python") && [[ $version =~ ^3\.1[0-3]$ && ${gpu} == $(cat "$venv/.gpu" 2>/dev/null || echo 0) ]] \
        && [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$version" ]] \
        && grep -qsF "$venv" "$venv/bin/activate" && "$venv/bin/python" -c 'import pip' 2>/dev/null # false where it was moved
}
# Packages of another version than the pinned one: somebody installed them since.
replaced() {
    find "$venv"/lib -maxdepth 3 -name '*.dist-info' -printf '%f\n' 2>/dev/null | awk -F- '
        function same(name) { gsub(/[.-]/, "_", name); return tolower(name) }
        NR == FNR { if (split($0, pin, "==") == 2) pinned[same(pin[1])] = pin[2]; next }
        { sub(/[.]dist-info$/, "") }
        same($1) in pinned && $2 != pinned[same($1)] { print $1 " " $2 " for " pinned[same($1)] }' "$root/launch/constraints.txt" -
}
ready() { [ -f "$venv/.ready" ] && venv_is_sound && [ "$(cat "$venv/.ready")" = "$(stamp)" ] && [ -z "$(replaced)" ]; }
done_already() { say "set-up: nothing to do, .venv is ready"; exit 0; }

! ready || done_already

# One set-up at a time. The lock is not in .venv, which may be deleted and made anew, and not on this script, which could not
# be started while it is open for writing. A pip that outlives a killed set-up keeps it.
exec 9>>"$root/launch/constraints.txt"
locked=0
flock -n -E 99 9 || locked=$?
if [ "$locked" = 99 ]; then
    say "Another set-up is running here: waiting for it."
    flock 9
    ! ready || done_already
elif [ "$locked" != 0 ]; then
    say "The file system of $root has no locks: start one set-up at a time."
fi

# ---- 1. Python, MPI and compilers ----
say "[1/5] Python $supported, MPI and a C++ compiler"
packages=()
find_python
if [ -z "$python" ] && [ -z "$seen${PYTHON:-}" ]; then
    packages+=(python3 python3-venv)
elif [ -z "$python" ]; then
    stop "Python $supported are supported (TensorFlow 2.21 has no later one, Gymnasium 1.4 no earlier one)." \
        "Found: ${seen:-$PYTHON does not run.}" "Install one of them, or name it: PYTHON=/path/to/python3.12 $0"
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    packages+=("python$python_version-venv")
fi
if ! have mpirun; then
    packages+=(openmpi-bin libopenmpi-dev openssh-client)
elif ! have mpicxx && dpkg -S "$(readlink -f "$(command -v mpirun)")" 2>/dev/null | grep -q openmpi; then
    packages+=(libopenmpi-dev)
elif ! have mpicxx; then
    stop "$(command -v mpirun) has no mpicxx beside it, which building Horovod needs. Install or load that MPI's development files."
fi
have c++ || packages+=(g++)
have make || packages+=(make)
have cmake || packages+=(cmake)
[ -e /etc/ssl/certs/ca-certificates.crt ] || ! have apt-get || packages+=(ca-certificates)

if [ ${#packages[@]} -gt 0 ]; then
    have apt-get || stop "missing on this machine, under Debian's names: ${packages[*]}. Install them, then run $0 again."
    [ "$(id -u)" = 0 ] || stop "some system packages are missing. Type this, then run $0 again:
    sudo apt-get update && sudo apt-get install -y ${packages[*]}"
    logs=$(mktemp -d "${TMPDIR:-/tmp}/hvd_dqn-setup.XXXXXX") # .venv cannot be made yet
    export DEBIAN_FRONTEND=noninteractive
    run apt-update apt-get update
    run apt-install apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 "${packages[@]}"
    rm -r "$logs"
    logs=$venv/setup-logs
    hash -r
    find_python
    [ -n "$python" ] || stop "Python $supported are supported, and this system's package manager has none of them.$seen" \
        "Install one of them and name it: PYTHON=/path/to/python3.12 $0"
fi
mpirun --version >/dev/null 2>&1 || stop "\`mpirun --version\` fails ($(command -v mpirun)): repair this MPI, or take it off PATH."
say "      $(command -v "$python") $python_version, $(command -v mpirun): $(mpirun --version 2>/dev/null | sed -n 1p)"

if [ "$gpu" != 0 ]; then
    [ -z "${CUDA_HOME:-}" ] || export HOROVOD_CUDA_HOME=${HOROVOD_CUDA_HOME:-$CUDA_HOME} # Horovod looks at no other
    have "${HOROVOD_CUDA_HOME:-/usr/local/cuda}/bin/nvcc" || have nvcc || stop \
        "a GPU build needs the CUDA 12 toolkit (nvcc) and NCCL's headers. Install them, or set HOROVOD_CUDA_HOME and HOROVOD_NCCL_HOME."
    export HOROVOD_GPU_OPERATIONS=NCCL
fi

made_from=$(stamp)

# ---- 2. The virtual environment ----
say "[2/5] $venv"
if ! venv_is_sound; then
    rm -rf "$venv"
    run venv "$python" -m venv "$venv"
    echo "$gpu" >"$venv/.gpu"
fi
python_version=$(version_of "$venv/bin/python")
export PATH=$venv/bin:$PATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off
install=(python -m pip install -c launch/constraints.txt)

# ---- 3. Pinned packages ----
say "[3/5] Pinned packages (TensorFlow alone is 200 MB)"
cd "$root"
# A package whose installation was cut off has no INSTALLER yet, but pip would take it for installed.
find "$venv"/lib -maxdepth 4 -name '*.dist-info' ! -exec test -e '{}/INSTALLER' ';' -prune -exec rm -r {} +
run build-tools "${install[@]}" setuptools wheel
# Whatever pip installs here later keeps to the pins, too. An address, since pip takes a path with blanks for two.
python -c 'import pathlib, sys; print("[install]\nconstraint =", pathlib.Path(sys.argv[1]).resolve().as_uri())' launch/constraints.txt >"$venv/pip.conf"
replaced | sed 's/^/      replaced since: /' >&2
# tensorflow and tensorflow-cpu have the same files: one beside the other must go before either is installed again.
case $(replaced) in *tensorflow*) run other-tensorflow python -m pip uninstall -y tensorflow tensorflow-cpu ;; esac
[ "$gpu" = 0 ] && kind=cpu || kind=gpu
# The second line is what Horovod and its build import.
run packages "${install[@]}" --no-build-isolation -e ".[$kind,box2d,dev]" mpi4py \
    cffi cloudpickle packaging psutil pyyaml

# ---- 4. Horovod, which exists as source only ----
say "[4/5] Horovod, built against this TensorFlow and this MPI (about six minutes on two cores)"
built=$(horovod_stamp)
if [ "$(cat "$venv/.horovod" 2>/dev/null)" = "$built" ]; then
    say "      built already"
else
    # pip would reuse a Horovod that was once built for another MPI or TensorFlow: keep one wheel cache per combination.
    cache=()
    if where=$(python -m pip cache dir 2>/dev/null); then cache=(--cache-dir "$where/hvd_dqn-${built:0:16}"); fi
    # Its source is from 2023 and stays as it is. It asks for CMake 2.8, which CMake 4 refuses unless told otherwise. It leaves
    # out headers that GCC 13 no longer includes by itself, includes headers of TensorFlow that later releases moved, and brings
    # a span that GCC 14 and clang refuse: horovod-compat/ has what is missing.
    headers=$(echo "$venv"/lib/python3*/site-packages/tensorflow/include)/external
    run horovod env "MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}" CMAKE_POLICY_VERSION_MINIMUM=3.5 \
        "CXXFLAGS=${CXXFLAGS:-} -include cstdint -include stdexcept -include string -DFLATBUFFERS_USE_STD_SPAN \
-I$headers/highwayhash -I$headers/farmhash_archive/src -I$compat" \
        HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 \
        python -m pip install -v --no-build-isolation --no-deps --force-reinstall ${cache[@]+"${cache[@]}"} \
        --require-hashes -r launch/horovod.txt
fi

# ---- 5. Proof ----
say "[5/5] Proof: what Horovod was built with, then two ranks that agree"
export TF_CPP_MIN_LOG_LEVEL=2 OMPI_MCA_mpi_yield_when_idle=1
run pip-check python -m pip check
run check-build horovodrun --check-build
for part in TensorFlow MPI Gloo $([ "$gpu" = 0 ] || echo NCCL); do
    grep -qF "[X] $part" "$logs/check-build.log" || { rm -f "$venv/.horovod"
        stop "Horovod was built without $part: see $logs/check-build.log and $logs/horovod.log"; }
done
mpi_version=$(mpirun --version 2>/dev/null | grep -oE '[0-9]+\.[0-9]+(\.[0-9]+)*' | sed -n 1p)
# Without GPUs: what is proved needs none, and NCCL refuses two ranks on one, which these would be.
run two-ranks env CUDA_VISIBLE_DEVICES= timeout 300 horovodrun -np 2 python -c "
from mpi4py import MPI
import horovod.tensorflow as hvd
import tensorflow as tf
hvd.init(comm=MPI.COMM_WORLD)
library = MPI.Get_library_version().strip().split(',')[0]
assert '$mpi_version' in library, f'mpi4py runs on {library}, mpirun is $mpi_version'
assert MPI.COMM_WORLD.size == hvd.size() == 2, f'size is {MPI.COMM_WORLD.size} in mpi4py, {hvd.size()} in Horovod, expected 2'
# Averaging has been known to do nothing, without a word: gradients of 2 and 4 take 3 from both ranks' weight.
weight = tf.Variable(10.0)
optimizer = hvd.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(1.0))
@tf.function
def step():
    loss = lambda: weight * (2.0 * hvd.rank() + 2.0)
    optimizer.apply_gradients(optimizer.compute_gradients(loss, [weight]))
step()
assert weight.numpy() == 7, f'an averaged step gave {weight.numpy()}, expected 7'
print(f'rank {hvd.rank()} of {hvd.size()}: mpi4py and Horovod agree on {library}')
"
horovod_stamp >"$venv/.horovod"
echo "$made_from" >"$venv/.ready"
say "Ready after $((SECONDS / 60)) min $((SECONDS % 60)) s: Horovod with TensorFlow, MPI and Gloo in $venv"
