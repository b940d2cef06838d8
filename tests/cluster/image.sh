#!/usr/bin/env bash
# Builds docker/'s CPU image and proves it: unit tests, training on one rank and two, stopping, several containers by ssh.
#   tests/cluster/image.sh [options]      as root, with the packages that .ci/run installs; about 15 minutes
#     --if-changed   does nothing when what the image is made from is as it was when this last passed (docker/PASSED)
#     --base IMAGE   build on this image; debian:12-slim unless said, or where no registry answers one by debootstrap
#     --cold         without pip's cache: Horovod is compiled, which takes six minutes more
#     --dry-run      prints the commands instead
# When it passes it renews docker/PASSED, to be committed. All it makes is in one temporary directory, a network and a
# process tree of its own, and gone at its end.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# What the image is made from, and how it is joined to others. All other code has tests of its own.
parts=(.dockerignore docker/{Dockerfile,cluster.sh,compose.yaml,entrypoint.sh,ssh_config,sshd_config}
    launch/{constraints.txt,horovod.txt,setup.sh} launch/horovod-compat/{span,tensorflow/compiler/xla/client/xla_builder.h}
    pyproject.toml setup.cfg)
passed=docker/PASSED
image=localhost/hvd-dqn
base='' cold='' dry_run=''

# Finds what must not be in the image: compilers, private keys, what the build was given of this machine.
unwanted='command -v gcc cc g++ c++ ||
    grep -rlI --include="*key*" --include="id_*" "PRIVATE KEY-----" /etc /home /opt/hvd_dqn ||
    find /mnt /srv /root/.cache /opt/hvd_dqn/.venv/setup-logs -type f 2>/dev/null | grep .'

say() { printf '%s\n' "$*" >&2; }
stop() { say "image.sh: $*"; exit "${code:-1}"; }
run() {
    say "+ $*"
    [ -n "$dry_run" ] || "$@"
}

# expect CODE PATTERN COMMAND...: the exit code and a line of what it says.
expect() {
    local expected=$1 pattern=$2 got=0
    shift 2
    say "+ $*"
    [ -z "$dry_run" ] || return 0
    timeout 900 "$@" >"$work/said" 2>&1 </dev/null || got=$?
    [ "$got" = "$expected" ] && grep -m 1 -E -e "$pattern" "$work/said" && return
    tail -n 60 "$work/said"
    stop "expected exit code $expected and a line like '$pattern', received $got and what stands above."
}

# The engine of this job alone. Limits are named since a sandbox may forbid to raise them, as engines otherwise do.
configure() {
    mkdir -p "$work/pip"
    cat >"$work/containers.conf" <<CONF
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_config_dir = "$work/networks"
CONF
    cat >"$work/storage.conf" <<CONF
[storage]
driver = "overlay"
graphroot = "$work/store"
runroot = "$work/run"
CONF
    # pip in the build is this machine's: its certificates and its index. /mnt and /srv are in every base: no empty mount
    # point stays in the image.
    cp -L "${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}" "$work/pip/certificates.crt"
    {
        echo "[global]"
        echo "cert = /mnt/certificates.crt"
        echo "cache-dir = /srv"
        for key in index-url trusted-host proxy; do
            if value=$(python3 -m pip config get "global.$key" 2>/dev/null); then echo "$key = $value"; fi
        done
    } >"$work/pip/pip.conf"
}

build() {
    local options=(--isolation chroot -f docker/Dockerfile -t "$image" -v "$work/pip:/mnt:ro") cache
    if [ -z "$base" ] && [ -z "$dry_run" ] && timeout 60 buildah pull -q debian:12-slim 2>/dev/null; then
        base=debian:12-slim
    elif [ -z "$base" ]; then
        base=localhost/debian:12
        run debootstrap --variant=minbase bookworm "$work/debian" >/dev/null
        say "+ tar -C $work/debian -c . | podman import -q - $base"
        [ -n "$dry_run" ] || tar -C "$work/debian" -c . | podman import -q - "$base"
        run rm -rf "$work/debian"
    fi
    if [ -z "$cold" ] && cache=$(python3 -m pip cache dir 2>/dev/null); then
        run mkdir -p "$cache"
        options+=(-v "$cache:/srv")
    fi
    run buildah bud "${options[@]}" --build-arg "BASE=$base" --build-arg "BUILD_BASE=$base" \
        --build-arg PIP_CONFIG_FILE=/mnt/pip.conf .
}

# stops ARGUMENTS...: a run without end by `podman run ARGUMENTS`, stopped as `docker stop` does, ends with 75. The
# containers in $first are told two seconds before.
stops() {
    run podman run -d --name stopped "$@" train identity --run-dir /home/hvd/runs/long --total_steps 1000000000 \
        --evaluation.target_return None --checkpoint.period 2000
    if [ -z "$dry_run" ]; then
        for _ in {1..300}; do ! podman logs stopped 2>&1 | grep -q 'checkpoint at' || break; sleep 1; done
    fi
    if [ -n "${first:-}" ]; then
        run podman kill -s USR1 "${first[@]}"
        run sleep 2
    fi
    run podman stop -t 60 stopped
    expect 0 '^75$' podman wait stopped
    expect 0 "stopped on request after" podman logs stopped
    run podman rm stopped
}

prove() {
    local compose=(podman-compose --no-ansi -f docker/compose.yaml)
    expect 0 '^hvd$' podman run --rm "$image" id -un
    expect 0 '^nothing$' podman run --rm --user root "$image" bash -c "$unwanted || echo nothing"
    expect 0 'identity: return 10.0 .* on 1 rank' podman run --rm "$image" train identity
    expect 0 'identity: return 10.0 .* on 2 ranks' podman run --rm "$image" horovodrun -np 2 hvd-dqn train identity
    # A user without a name, as with --user "$(id -u)", and runs in a directory of the host.
    run install -d -m 777 "$work/runs"
    expect 0 'identity: return 10.0 .* on 1 rank' podman run --rm --user 4321 \
        -v "$work/runs:/home/hvd/runs" "$image" train identity --run-dir runs/mine
    expect 0 'run.json' ls "$work/runs/mine"
    expect 2 'There is no preset' podman run --rm "$image" train nonsense
    for launcher in hvd-dqn "mpirun -np 2 --bind-to none hvd-dqn" "horovodrun -np 2 hvd-dqn"; do
        # shellcheck disable=SC2086 # words
        stops "$image" $launcher
    done

    # Three containers, joined by ssh.
    expect 0 'identity: return 10.0 .* on 2 ranks' "${compose[@]}" run --rm -T head train identity --run-dir runs/three
    expect 0 'worker2' "${compose[@]}" run --rm -T head doctor
    run "${compose[@]}" down -v
    expect 1 'expected an answer by ssh from nobody within 2 s' podman run --rm -e HVD_DQN_CLUSTER_SECONDS=2 \
        --entrypoint '["/opt/hvd_dqn/docker/cluster.sh", "head", "nobody"]' "$image" train identity

    # What Kubernetes' MPI Operator would give them, as docker/mpijob.yaml asks: a key that root owns and others may read,
    # in a folder without write access, a file of hosts, and these variables.
    local hosts=(hvd-dqn-worker-{0,1})
    local job=(--network job -v "$work/key:/home/hvd/.ssh:ro" -v "$work/runs:/home/hvd/runs")
    run install -d -m 1777 "$work/key"
    run ssh-keygen -q -t rsa -N '' -f "$work/key/id_rsa"
    run cp "$work/key/id_rsa.pub" "$work/key/authorized_keys"
    run chmod 644 "$work"/key/{id_rsa,id_rsa.pub,authorized_keys}
    [ -n "$dry_run" ] || printf '%s slots=1\n' "${hosts[@]}" >"$work/hostfile"
    run podman network create job
    for host in "${hosts[@]}"; do
        run podman run -d --name "$host" --hostname "$host" "${job[@]}" \
            --entrypoint '["tini", "--", "/opt/hvd_dqn/docker/cluster.sh", "worker"]' "$image"
    done
    job+=(-v "$work/hostfile:/etc/mpi/hostfile:ro" -e OMPI_MCA_orte_default_hostfile=/etc/mpi/hostfile
        -e OMPI_MCA_orte_keep_fqdn_hostnames=true -e "OMPI_MCA_plm_rsh_args=-o ConnectionAttempts=10"
        --entrypoint '["tini", "-g", "--", "/opt/hvd_dqn/docker/cluster.sh", "head", "/etc/mpi/hostfile"]' "$image")
    expect 0 'identity: return 10.0 .* on 2 ranks' podman run --rm "${job[@]}" train identity \
        --run-dir /home/hvd/runs/job
    # Deleted, all get the signal at once: here those on whose ranks the launcher waits get it first.
    local first=("${hosts[@]}")
    stops "${job[@]}"
    expect 0 '^0$' podman wait "${hosts[0]}"
    run podman rm -f -t 1 "${hosts[@]}"
}

# ---- Options ----
words=("$@") part='' work=/tmp/hvd_dqn-image.XXXXXX
while [ $# -gt 0 ]; do
    case $1 in
        --if-changed)
            if sha256sum --check --status "$passed" 2>/dev/null; then
                say "image.sh: nothing to do, what the image is made from is as it was when this last passed ($passed)"
                exit 0
            fi
            ;;
        --base)
            base=${2:-}
            [ -n "$base" ] || code=2 stop "--base needs the name of an image."
            shift
            ;;
        --cold) cold=1 ;;
        --dry-run) dry_run=1 ;;
        --part) part=$2 work=$3; shift 2 ;; # this script's own: what runs inside
        *) code=2 stop "expected --if-changed, --base IMAGE, --cold or --dry-run, received $1." ;;
    esac
    shift
done

case $part in
    engine) # in a process tree and with mounts of its own, which end with it
        for folder in /run/{containers,libpod,runc} /var/lib/{cni,containers}; do
            mkdir -p "$folder"
            mount -t tmpfs none "$folder"
        done
        configure
        export CONTAINERS_CONF=$work/containers.conf CONTAINERS_STORAGE_CONF=$work/storage.conf
        build
        unshare --net "$0" --part prove "$work"
        podman images --format '{{.Repository}}:{{.Tag}} {{.Size}}' >&2
        exit
        ;;
    prove) # in a network of its own, too
        ip link set lo up
        prove
        exit
        ;;
esac

if [ -n "$dry_run" ]; then build && prove && exit; fi
[ "$(id -u)" = 0 ] || stop "expected to run as root, who may mount, received $(id -un)."
for tool in buildah dnsmasq podman podman-compose runc debootstrap ip unshare; do
    command -v "$tool" >/dev/null || stop "there is no $tool: apt-get install --no-install-recommends buildah \
debootstrap golang-github-containernetworking-plugin-dnsname iproute2 podman podman-compose runc"
done
work=$(mktemp -d "${TMPDIR:-/tmp}/hvd_dqn-image.XXXXXX")
trap 'rm -rf "$work"; rmdir /sys/fs/cgroup/*/libpod_parent{/*,} 2>/dev/null || true' EXIT
sums=$(sha256sum "${parts[@]}") # of now: a change in the meantime was not proved
unshare --mount --pid --fork --kill-child --mount-proc "$0" --part engine "$work" "${words[@]}"
echo "$sums" >"$passed"
say "image.sh: passed after $((SECONDS / 60)) min. Commit $passed."
