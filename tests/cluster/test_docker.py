"""The container files: what they promise each other, and, where they have changed, the image itself (image.sh)."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from hvd_dqn.cli import COMMANDS
from tests import ranks

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE = shutil.which("docker-compose")


def fake(path, body):
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


# A plan is made where a job is submitted, outside of containers: in one it is `hvd-dqn plan`.
@pytest.mark.parametrize("command", [*(command for command in COMMANDS if command != "plan"), "--help"])
def test_the_entry_point_gives_its_commands_to_hvd_dqn_and_becomes_it(tmp_path, command):
    fake(tmp_path / "hvd-dqn", 'echo "$$ $*"')
    started = subprocess.Popen(
        [DOCKER / "entrypoint.sh", command, "two words"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert started.communicate(timeout=60)[0] == f"{started.pid} {command} two words\n"


def test_the_entry_point_starts_other_programs():
    done = ranks.run([DOCKER / "entrypoint.sh", "echo", "train"])
    assert (done.returncode, done.stdout) == (0, "train\n")


@pytest.mark.parametrize(("words", "says"), [
    ([],                            "expected `worker` or `head HOSTS COMMAND...`"),
    (["tail"],                      "received `tail`"),
    (["head"],                      "expected hosts and a command"),
    (["head", "worker1,worker2"],   "received `head worker1,worker2`"),
])  # fmt: skip
def test_bad_words_for_a_cluster_are_one_line_and_exit_code_2(words, says):
    done = ranks.run([DOCKER / "cluster.sh", *words])
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert says in done.stderr


def test_what_the_image_is_made_from_may_enter_the_build():
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    for path in " ".join(copied).replace(" . ", " ").split():
        assert (ROOT / path).exists(), path
        assert path == "." or path in admitted or path.split("/")[0] in admitted, path
    assert all((ROOT / path).exists() for path in admitted)


def test_what_runs_is_not_root_and_copies_through_shared_memory():
    last = (DOCKER / "Dockerfile").read_text().split("AS runtime")[1]
    assert re.findall("^USER (.*)$", last, flags=re.MULTILINE) == ["hvd"]
    assert "OMPI_MCA_btl_vader_single_copy_mechanism=none" in last


@pytest.mark.skipif(COMPOSE is None, reason="docker-compose is not installed")
def test_compose_takes_its_file_and_would_not_take_a_wrong_one(tmp_path):
    assert ranks.run([COMPOSE, "-f", DOCKER / "compose.yaml", "config"]).returncode == 0
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("hostname:", "host_name:"))
    assert ranks.run([COMPOSE, "-f", wrong, "config"]).returncode != 0


def test_the_head_names_all_workers_and_all_share_key_and_runs():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    workers = [name for name in services if name != "head"]
    assert services["head"]["entrypoint"][-1].split(",") == workers == services["head"]["depends_on"]
    assert all(service["hostname"] == name for name, service in services.items())
    assert len({str(service["volumes"]) for service in services.values()}) == 1


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Replica(Strict):
    replicas: int
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: dict  # a pod's


class RunPolicy(Strict):
    cleanPodPolicy: Literal["All", "Running", "None"] | None = None
    ttlSecondsAfterFinished: int | None = None
    activeDeadlineSeconds: int | None = None
    backoffLimit: int | None = None
    suspend: bool | None = None


class Replicas(Strict):
    Launcher: Replica
    Worker: Replica


class Spec(Strict):
    slotsPerWorker: int | None = None
    sshAuthMountPath: str
    mpiImplementation: Literal["OpenMPI"] | None = None
    runPolicy: RunPolicy
    mpiReplicaSpecs: Replicas


class MPIJob(Strict):
    """What the MPI Operator's v2beta1 knows of a job, without what we have no use for."""

    apiVersion: Literal["kubeflow.org/v2beta1"]
    kind: Literal["MPIJob"]
    metadata: dict[str, str]
    spec: Spec


def test_the_mpi_job_is_one_of_the_operators_and_fits_the_image():
    claim, job = yaml.safe_load_all((DOCKER / "mpijob.yaml").read_text())
    spec = MPIJob.model_validate(job).spec
    image = (DOCKER / "Dockerfile").read_text()
    assert f"-m 700 {spec.sshAuthMountPath}" in image
    for replica in [spec.mpiReplicaSpecs.Launcher, spec.mpiReplicaSpecs.Worker]:
        pod = replica.template["spec"]
        assert f"--uid {pod['securityContext']['runAsUser']} " in image
        (container,) = pod["containers"]
        assert container["command"][container["command"].index("--") + 1] == "/opt/hvd_dqn/docker/cluster.sh"
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
    volumes = spec.mpiReplicaSpecs.Worker.template["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_apptainer_starts_what_the_image_starts():
    definition = (DOCKER / "apptainer.def").read_text()
    arguments = dict(
        re.findall(r"^    (\w+)=(.*)$", definition.split("%arguments")[1].split("%")[0], flags=re.MULTILINE)
    )
    assert set(re.findall(r"{{ (\w+) }}", definition)) == set(arguments)
    entry = re.search(r"exec (\S+)", definition.split("%runscript")[1]).group(1)
    assert entry in (DOCKER / "Dockerfile").read_text()


def test_a_dry_run_shows_the_build_and_each_proof_and_makes_nothing():
    done = ranks.run([ROOT / "tests/cluster/image.sh", "--dry-run", "--base", "some:image"])
    assert done.returncode == 0
    shown = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
    assert "--build-arg BASE=some:image" in shown[1]
    assert sum("train identity" in line for line in shown) >= 5


def test_an_unknown_option_of_the_proof_is_one_line_and_exit_code_2():
    done = ranks.run([ROOT / "tests/cluster/image.sh", "--fast"])
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "received --fast" in done.stderr


@pytest.mark.timeout(4000)
def test_the_image_was_proved_as_it_is_or_is_proved_now():
    done = ranks.run([ROOT / "tests/cluster/image.sh", "--if-changed"], timeout=3900)
    if "apt-get install" in done.stderr or "to run as root" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
