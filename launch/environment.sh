#!/usr/bin/env bash
# Shared by ranks.sh and batch.sh; do not run it by itself. It finds the environment that has hvd_dqn: the one that
# HVD_DQN_BIN names, else an active one, else the clone's .venv. A script that sources it has set `root` and `stop`.
# shellcheck disable=SC2154 # set by the scripts
set -euo pipefail

program=''

# Sets `program` to the path of hvd-dqn, and makes its folder the first one of PATH unless PATH finds it already.
find_program() {
    local place
    if [ -n "${HVD_DQN_BIN:-}" ]; then
        place=$HVD_DQN_BIN
        [ -d "$place" ] || [ "$(basename "$place")" != hvd-dqn ] || place=$(dirname "$place")
        if [ "$place" != "$root/.venv/bin" ]; then # whose absence check_program explains
            [ -x "$place/hvd-dqn" ] || stop "HVD_DQN_BIN names the folder of hvd-dqn, and there is none that can be run in $place."
            place=$(cd "$place" && pwd)
        fi
        program=$place/hvd-dqn
    else
        for place in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin}"; do
            [ -n "$program" ] || [ -z "$place" ] || [ ! -x "$place/hvd-dqn" ] || program=$place/hvd-dqn
        done
        [ -n "$program" ] || program=$(type -P hvd-dqn) || program=$root/.venv/bin/hvd-dqn
        [[ $program == /* ]] || program=$PWD/$program
    fi
    [ "$(type -P hvd-dqn)" = "$program" ] || export PATH=${program%/*}:$PATH
}

# The way to a .venv that works.
cure() {
    if [ "$program" != "$root/.venv/bin/hvd-dqn" ]; then
        echo "Make that environment again, or name another one by HVD_DQN_BIN."
    elif [ -w "$root" ]; then
        echo "Run $root/launch/setup.sh${1:+ $1}."
    else
        echo "You cannot write $root: name another environment by HVD_DQN_BIN, or use a clone of your own."
    fi
}

# Stops in one line if hvd-dqn cannot be run here.
check_program() {
    local first='' second='' python='' above said venv=$root/.venv
    local me_here
    me_here=$(id -un 2>/dev/null || id -u)
    if [ ! -x "$program" ]; then
        if [ -d "$venv" ] && [ ! -x "$venv/bin" ]; then
            stop "$me_here may not read $venv: its owner can permit that by chmod -R go+rX. $(cure)"
        fi
        stop "found no hvd-dqn: activate an environment that has it, or name its folder by HVD_DQN_BIN. $(cure)"
    fi
    # The Python that it was made for, in the two forms that pip writes. Another program (Spack's, a wrapper) is trusted.
    { IFS= read -r first && IFS= read -r second; } <"$program" || true
    if [[ $first =~ ^#!\ ?(/[^ ]*python[^ /]*) ]] \
        || [[ $first == '#!/bin/sh' && $second =~ ^\'\'\'exec\'\ \"?(.*[^\"])\"?\ \"\$0\" ]]; then
        python=${BASH_REMATCH[1]}
    fi
    [ -n "$python" ] || return 0
    above=$python
    while [ ! -e "$above" ] && [ -n "$above" ]; do above=${above%/*}; done
    if [ ! -e "$python" ] && [ ! -L "$python" ] && [ -x "${above:-/}" ]; then # else it is only hidden from this user
        stop "$program needs $python, which is gone: this folder was moved. $(cure)"
    fi
    if [ "$program" = "$venv/bin/hvd-dqn" ] && [ -e "${python%/*}/../pyvenv.cfg" ] \
        && [ "$(cd "${python%/*}" && pwd -P)" != "$(cd "$venv/bin" && pwd -P)" ]; then
        stop "$program belongs to another checkout, that of $python: this one was copied. $(cure)"
    fi
    if [ ! -x "$python" ]; then
        stop "$me_here may not run $python ($(readlink "$python" || echo its file)). $(cure "with a PYTHON that you may run")"
    fi
    if ! said=$("$python" -c 'import hvd_dqn' 2>&1 </dev/null); then
        stop "$program cannot start: $(tail -n 1 <<<"$said"). $(cure)"
    fi
}
