"""launch/kubernetes: the manifests against the schemas of Kubernetes, and start.sh as in two pods.

There is no cluster here: what Kubernetes makes of exit codes is what its documentation says.
"""

import gzip
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import program
import pytest
import yaml

from moe_jax import exit_codes
from moe_jax.parallel.compiling import QUICK, as_flags
from moe_jax.report.metrics import read_rows

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch/kubernetes"
# The oldest one in which podReplacementPolicy is stable, and the newest of the schemas.
VERSIONS = ("1.34", kubernetes_validate.latest_version())
# The schema of JobSet is not a part of Kubernetes: a file of the release of JobSet.
CRD = os.environ.get("JOBSET_CRD", "")


# Manifests


def built(folder):
    """The resources of a folder as kustomize puts them together, by kind."""
    text = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=120
    )
    assert text.returncode == 0, text.stderr
    return {resource["kind"]: resource for resource in yaml.safe_load_all(text.stdout)}


def written(folder):
    """The same without kustomize: the files that its list names, as they are."""
    found = {}
    for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
        path = folder / name
        if path.is_dir():
            found |= written(path)
        else:
            resource = yaml.safe_load(path.read_text())
            found[resource["kind"]] = resource
    return found


def job_of(resources):
    """The Job, or the one that a JobSet makes."""
    if "Job" in resources:
        return resources["Job"]
    (replicated,) = resources["JobSet"]["spec"]["replicatedJobs"]
    metadata = {"name": replicated["name"]}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
    return job | {"spec": replicated["template"]["spec"]}


def check(resources):
    """Raises for what Kubernetes would refuse, a key that it does not know too."""
    for resource in [job_of(resources), *resources.values()]:
        if resource["kind"] == "JobSet":
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(resource, version, strict=True)
    if "JobSet" in resources and CRD:
        with gzip.open(CRD, "rt") if CRD.endswith(".gz") else open(CRD) as file:
            versions = next(yaml.safe_load_all(file.read().removeprefix("---")))["spec"]["versions"]
        schema = versions[0]["schema"]["openAPIV3Schema"]
        jsonschema.Draft7Validator(schema).validate(resources["JobSet"])


def pod_of(resources):
    return job_of(resources)["spec"]["template"]["spec"]


def env_of(resources):
    (container,) = pod_of(resources)["containers"]
    return {entry["name"]: entry.get("value") for entry in container["env"]}


@pytest.mark.parametrize("name", ["base", "jobset"])
def test_the_manifests_are_what_kubernetes_takes(name):
    resources = written(FOLDER / name)
    check(resources)
    job = job_of(resources)["spec"]
    processes = int(env_of(resources)["PROCESSES"])
    assert job["completions"] == job["parallelism"] == processes
    (container,) = pod_of(resources)["containers"]
    port = env_of(resources)["COORDINATOR"].rpartition(":")[2]
    assert [str(entry["containerPort"]) for entry in container["ports"]] == [port]
    assert (ROOT / container["command"][0].removeprefix("/app/")).stat().st_mode & 0o111
    # Only the pods of the run reach it.
    labels = job["template"]["metadata"]["labels"]
    policy = resources["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]


def test_the_coordinator_is_a_name_that_kubernetes_gives():
    job = written(FOLDER / "base")
    service = job["Service"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert (
        service["spec"]["selector"].items()
        <= job["Job"]["spec"]["template"]["metadata"]["labels"].items()
    )
    assert pod_of(job)["subdomain"] == service["metadata"]["name"]
    host = f"{job['Job']['metadata']['name']}-0.{service['metadata']['name']}"
    assert env_of(job)["COORDINATOR"].rpartition(":")[0] == host

    jobset = written(FOLDER / "jobset")
    name = jobset["JobSet"]["metadata"]["name"]
    (replicated,) = jobset["JobSet"]["spec"]["replicatedJobs"]
    host = f"{name}-{replicated['name']}-0-0.{name}"
    assert env_of(jobset)["COORDINATOR"].rpartition(":")[0] == host


def action(resources, code, disrupted=False):
    """What podFailurePolicy says of a pod: the first rule that fits."""
    for rule in job_of(resources)["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {"values": []})["values"]:
            return rule["action"]
        if disrupted and "onPodConditions" in rule:
            return rule["action"]
    return "default"


HOPELESS = (
    exit_codes.CONFIG,
    exit_codes.INTERNAL,
    exit_codes.NOT_FINITE,
    exit_codes.NO_CHECKPOINT,
    exit_codes.DRIFT,
)


def test_exit_codes_are_told_apart():
    job, jobset = written(FOLDER / "base"), written(FOLDER / "jobset")
    for code in HOPELESS:
        assert action(job, code) == action(jobset, code) == "FailJob"
    for code in (exit_codes.RETRY, 134, 137, 143):
        assert action(job, code) == "Count" and action(jobset, code) == "default"
    assert action(job, 130) == "Ignore" and action(job, 137, disrupted=True) == "Ignore"
    assert job["Job"]["spec"]["podReplacementPolicy"] == "Failed"
    # A JobSet starts all pods again when its Job fails by anything but the policy.
    assert job_of(jobset)["spec"]["backoffLimit"] == 0
    (rule,) = jobset["JobSet"]["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_a_wrong_key_is_found():
    resources = written(FOLDER / "jobset")
    job = resources["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["completion"] = job.pop("completions")
    with pytest.raises(kubernetes_validate.ValidationError, match="completion"):
        check(resources)


@pytest.fixture
def kubectl():
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed, which puts the folders of kustomize together")


@pytest.mark.parametrize("name", ["base", "jobset"])
def test_kustomize_leaves_them_as_they_are_written(kubectl, name):
    assert built(FOLDER / name) == written(FOLDER / name)


@pytest.mark.parametrize("name, device", [("gpu", "nvidia.com/gpu"), ("tpu", "google.com/tpu")])
def test_the_examples_have_devices_images_and_flags(kubectl, name, device):
    resources = built(FOLDER / "overlays" / name)
    check(resources)
    pod = pod_of(resources)
    (container,) = pod["containers"]
    assert int(container["resources"]["limits"][device]) > 0 and pod["nodeSelector"]
    assert [toleration["key"] for toleration in pod["tolerations"]] == [device]
    assert container["image"].startswith("REGION-docker.pkg.dev/")
    assert f"--workdir=/runs/{name}" in container["args"]


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_devices_can_be_added_to_a_job_too(kubectl, device, tmp_path):
    lines = {
        "resources": [os.path.relpath(FOLDER / "base", tmp_path)],
        "components": [os.path.relpath(FOLDER / device, tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(lines))
    resources = built(tmp_path)
    check(resources)
    assert "nodeSelector" in pod_of(resources)


# start.sh

PYTHON = """#!/usr/bin/env bash
echo "$* bind=${JAX_COORDINATOR_BIND_ADDRESS:-}"
"""
POD = {"COORDINATOR": "moe-jax-0.moe-jax:8476", "PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}


def start(folder, *flags, **env):
    program.write(folder / "python", PYTHON)
    env = program.first_on_path(folder) | env
    return subprocess.run(
        [FOLDER / "start.sh", *flags], env=env, capture_output=True, text=True, timeout=60
    )


def test_the_variables_of_a_pod_become_flags(tmp_path):
    words = "-m moe_jax.main --coordinator=moe-jax-0.moe-jax:8476 --num_processes=2 --process_id="
    assert start(tmp_path, "--a=b c", **POD).stdout == f"{words}1 --a=b c bind=\n"
    # Process 0 listens at the address of its pod.
    first = POD | {"JOB_COMPLETION_INDEX": "0", "POD_IP": "10.1.2.3"}
    assert start(tmp_path, **first).stdout == f"{words}0 bind=10.1.2.3:8476\n"
    first["POD_IP"] = "fd00::3"
    assert start(tmp_path, **first).stdout == f"{words}0 bind=[fd00::3]:8476\n"
    for name in POD:
        done = start(tmp_path, **(POD | {name: ""}))
        assert done.returncode == 64 and done.stderr.startswith("error: start.sh needs COORDINATOR")


FLAGS = """
--config=configs/debug.py --config.mesh.model=1 --config.model.repeats=1 --config.model.prefix=()
--config.train.steps=2000 --config.train.micro_batch_size=0 --config.eval.every=0
--config.checkpoint.every=0 --config.log.every=1 --config.log.histogram_every=10000
--config.log.tensorboard=False --config.simulate_devices=1
""".split()


@pytest.mark.full
def test_two_pods_that_are_drained_save_and_say_130(tmp_path):
    """SIGTERM reaches one of them. The other one, too, must not end as a pod that is done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PYTHON": sys.executable,
        "COORDINATOR": f"{socket.gethostname()}:{port}",
        "PROCESSES": "2",
        "POD_IP": "127.0.0.1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {as_flags(QUICK)}",
        # A proxy knows no way to process 0, and is not asked.
        "http_proxy": "http://127.0.0.1:1",
    }
    env.pop("PJRT_NPROC", None)
    command = [FOLDER / "start.sh", *FLAGS, f"--workdir={tmp_path}/run"]
    pods = []
    for process in ("0", "1"):
        own = env | {"JOB_COMPLETION_INDEX": process}
        with open(tmp_path / f"{process}.log", "w") as log:
            pods.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log))

    def said():
        return "\n".join((tmp_path / f"{process}.log").read_text()[-3000:] for process in (0, 1))

    metrics = tmp_path / "run/metrics.jsonl"
    end = time.monotonic() + 400
    try:
        while not (metrics.exists() and len(read_rows(metrics)) >= 3):
            assert time.monotonic() < end and pods[0].poll() is pods[1].poll() is None, said()
            time.sleep(0.2)
        pods[1].send_signal(signal.SIGTERM)
        codes = [pod.wait(timeout=200) for pod in pods]
    finally:
        for pod in pods:
            pod.terminate()
    assert codes == [130, 130], said()
    assert "process 1: SIGINT: heard" in said() and "saved step" in said()


def test_a_pod_whose_peer_does_not_come_is_started_again(tmp_path):
    env = os.environ | POD | {"PYTHON": sys.executable, "COORDINATOR": "127.0.0.1:9"}
    command = [FOLDER / "start.sh", *FLAGS, "--config.limits.join=5", f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == exit_codes.RETRY
    reason = "process 1: the 2 processes did not meet at 127.0.0.1:9 within 5 s (limits.join)"
    assert done.stderr.splitlines()[-1].startswith(reason)
