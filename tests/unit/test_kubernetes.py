"""The manifests: by the schemas of Kubernetes, and beside what the product itself does.

No cluster has run them. JobSet's own fields are compared with a list, the Job in it by its schema.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from elastic_ckpt.cli.app import group
from elastic_ckpt.cli.run.command import parse
from elastic_ckpt.errors import ExitCode, UsageError
from elastic_ckpt.protocol.rendezvous import DEFAULT_PORT, parse_endpoint, parse_nodes
from elastic_ckpt.util.units import parse_duration
from tests.kubernetes import FILES, FOLDER, Workload, documents, of_kind, workloads

pytestmark = pytest.mark.one_torch

VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
"""From the first with all that is used here."""

JOBSET = {
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "failurePolicy": {"maxRestarts": int},
    "replicatedJobs": [{"name": str, "replicas": int, "template": dict}],
}
"""Those fields of a JobSet's spec (v1alpha2) that are used here, and their types."""

WORKLOADS = workloads()
each_workload = pytest.mark.parametrize("work", WORKLOADS, ids=[one.file for one in WORKLOADS])
several = pytest.mark.parametrize(
    "work",
    [one for one in WORKLOADS if one.first_pod],
    ids=[one.file for one in WORKLOADS if one.first_pod],
)


def built_in(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document, or the Job of a JobSet, which Kubernetes has a schema for."""
    if document["kind"] != "JobSet":
        return document
    (replicated,) = document["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
    return {**job, **replicated["template"]}


# -- schemas -----------------------------------------------------------------------------------


def schemas() -> Any:
    return pytest.importorskip(
        "kubernetes_validate",
        reason="no schemas of Kubernetes: pip install -r requirements/kubernetes.txt",
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifest_is_valid(path: Path, version: str) -> None:
    """Strictly: a field that the schema does not have is an error."""
    validator = schemas()
    found = documents(path)
    assert found
    for document in found:
        assert validator.validate(built_in(document), version, strict=True) == version


def test_misspelt_field_is_found() -> None:
    """The test above can fail."""
    validator = schemas()
    document = documents(FOLDER / "job.yaml")[0]
    document["spec"]["podFailurePolicies"] = document["spec"].pop("podFailurePolicy")
    with pytest.raises(validator.ValidationError, match="podFailurePolicies"):
        validator.validate(document, VERSIONS[-1], strict=True)


def misfits(value: Any, shape: Any, where: str = "spec") -> list[str]:
    """Return which fields are not of their type, or not in the list."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [where]
        known = [one for key in shape if key in value
                 for one in misfits(value[key], shape[key], f"{where}.{key}")]  # fmt: skip
        return [f"{where}.{key}" for key in value if key not in shape] + known
    if isinstance(shape, list):
        return [one for item in value for one in misfits(item, shape[0], f"{where}[]")]
    return [] if type(value) is shape else [where]


@pytest.mark.parametrize("document", of_kind("JobSet"))
def test_jobset_has_known_fields(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert misfits(document["spec"], JOBSET) == []
    (replicated,) = document["spec"]["replicatedJobs"]
    assert misfits({"networks": {}, **document["spec"]}, JOBSET) == ["spec.networks"]
    assert misfits({"network": {"subdomain": 1}}, JOBSET) == ["spec.network.subdomain"]
    longest = f"{document['metadata']['name']}-{replicated['name']}-0-99-abcde"
    assert len(longest) <= 63 and re.fullmatch(r"[a-z][a-z0-9-]*", longest)


# -- the command --------------------------------------------------------------------------------


@each_workload
def test_command_is_one_that_run_takes(
    work: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ELASTIC_CKPT_DIR", raising=False)
    name, *arguments, script = work.arguments(NAMESPACE="default", NODE_NAME="node-1")
    assert name == "run" and script == "/app/train.py"
    (tmp_path / "train.py").touch()  # in place of the image's
    arguments.append(str(tmp_path / "train.py"))
    assert "$(" not in " ".join(arguments)
    shown = CliRunner().invoke(group, ["run", "--print-config", *arguments])
    assert shown.exit_code == 0, shown.output
    for option, value in work.options.items():
        assert re.search(rf"^{option} += .*# flag", shown.output, re.MULTILINE), (option, value)
    with pytest.raises(UsageError):
        parse([arguments[0].replace("--dir", "--directory"), *arguments[1:]])


@each_workload
def test_grace_fits_into_the_pods(work: Workload) -> None:
    grace = parse_duration(work.options["grace"])
    assert grace < work.pod["terminationGracePeriodSeconds"] <= grace + 30
    assert "lifecycle" not in work.container  # a preStop hook would take from it


@each_workload
def test_exit_codes(work: Workload) -> None:
    actions: dict[int, str] = {}
    for rule in work.job["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            assert (codes["containerName"], codes["operator"]) == (work.container["name"], "In")
            for code in codes["values"]:
                actions.setdefault(code, rule["action"])
    assert actions == {
        ExitCode.USAGE: "FailJob",
        ExitCode.DATA: "FailJob",
        ExitCode.FAILED: "FailJob",
        ExitCode.PREEMPTED_SAVED: "Ignore",
        ExitCode.PREEMPTED_UNSAVED: "Ignore",
    }
    assert set(ExitCode) - set(actions) == {ExitCode.FINISHED, ExitCode.UNAVAILABLE}
    last = work.job["podFailurePolicy"]["rules"][-1]
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    assert (last["action"], last["onPodConditions"]) == ("Ignore", disrupted)
    assert work.pod["restartPolicy"] == "Never" and work.job["podReplacementPolicy"] == "Failed"


@each_workload
def test_ports(work: Workload) -> None:
    ports = {one["name"]: one["containerPort"] for one in work.container["ports"]}
    assert work.options["metrics"] == f"0.0.0.0:{ports['metrics']}"
    probe = work.container["readinessProbe"]["httpGet"]
    assert (probe["path"], probe["port"]) == ("/metrics", "metrics")
    assert not {"livenessProbe", "startupProbe"} & set(work.container)
    (policy,) = of_kind("NetworkPolicy")
    own, monitoring = policy["spec"]["ingress"]
    assert [one["port"] for one in monitoring["ports"]] == [ports["metrics"]]
    assert "ports" not in own  # all of them
    if work.first_pod:
        assert ports["hub"] == DEFAULT_PORT
        assert parse_endpoint(work.options["rdzv-endpoint"])[1] == DEFAULT_PORT


# -- several nodes -------------------------------------------------------------------------------


@several
def test_nodes_meet_at_the_first_pod(work: Workload) -> None:
    host, _ = parse_endpoint(work.options["rdzv-endpoint"])
    assert host == f"{work.first_pod}.{work.subdomain}.namespace.svc.cluster.local"
    sources = {one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"]
               for one in work.container["env"] if "valueFrom" in one}  # fmt: skip
    assert sources == {"NAMESPACE": "metadata.namespace", "NODE_NAME": "spec.nodeName"}


@several
def test_number_of_pods(work: Workload) -> None:
    least, most = parse_nodes(work.options["nnodes"])
    assert work.job["parallelism"] == work.job["completions"] == most
    assert work.job["completionMode"] == "Indexed"
    assert work.job["successPolicy"] == {"rules": [{"succeededCount": 1}]}
    (budget,) = of_kind("PodDisruptionBudget")
    assert least <= budget["spec"]["minAvailable"] == most - 1


def test_selectors_find_the_pods() -> None:
    selectors = [one["spec"]["selector"]["matchLabels"] for one in of_kind("PodDisruptionBudget")]
    selectors += [one["spec"]["podSelector"]["matchLabels"] for one in of_kind("NetworkPolicy")]
    selectors += [one["spec"]["selector"] for one in of_kind("Service")]
    assert len(selectors) == 3
    for selector in selectors:
        assert all(selector.items() <= work.labels.items() for work in WORKLOADS)
    (service,) = of_kind("Service")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["ports"] == [{"name": "hub", "port": DEFAULT_PORT}]
    named = {work.subdomain for work in WORKLOADS if work.file == "indexed-job.yaml"}
    assert named == {service["metadata"]["name"]}


# -- volumes and rights --------------------------------------------------------------------------


@each_workload
def test_paths_are_on_volumes(work: Workload) -> None:
    """The root file system is read-only."""
    volumes = {one["name"]: one for one in work.pod["volumes"]}
    mounted = {one["mountPath"]: volumes[one["name"]] for one in work.container["volumeMounts"]}
    assert len(mounted) == len(volumes)
    place = work.options["dir"]
    if "://" in place:
        assert "emptyDir" in mounted[work.options["local-dir"]]
    else:
        claim = mounted["/" + place.split("/")[1]]["persistentVolumeClaim"]["claimName"]
        (found,) = documents(FOLDER / f"{'shared-' if work.first_pod else ''}volume.yaml")
        assert found["metadata"]["name"] == claim
        mode = "ReadWriteMany" if work.first_pod else "ReadWriteOnce"
        assert found["spec"]["accessModes"] == [mode]
    options = parse(work.arguments()[1:])
    memory = mounted[options["memory_dir"]]["emptyDir"]
    assert memory["medium"] == "Memory"
    limit = work.container["resources"]["limits"]["memory"]
    assert 2 * gibibytes(memory["sizeLimit"]) < gibibytes(limit)  # what is there counts in it
    home = next(one["value"] for one in work.container["env"] if one["name"] == "HOME")
    assert "emptyDir" in mounted[home]


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


@each_workload
def test_least_privilege(work: Workload) -> None:
    assert work.container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    pod = work.pod["securityContext"]
    users = re.findall(r"^USER (\d+):(\d+)$", (FOLDER.parent / "Dockerfile").read_text(), re.M)
    assert [(str(pod["runAsUser"]), str(pod["runAsGroup"]))] == users
    assert pod["runAsNonRoot"] and pod["fsGroup"] == pod["runAsGroup"]
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert work.pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(work.pod)


@each_workload
def test_spot_nodes_of_each_cloud(work: Workload) -> None:
    needed = work.pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    labels = {one["key"]: one["values"] for term in needed["nodeSelectorTerms"]
              for one in term["matchExpressions"]}  # fmt: skip
    assert labels == {
        "cloud.google.com/gke-spot": ["true"],
        "karpenter.sh/capacity-type": ["spot"],
        "eks.amazonaws.com/capacityType": ["SPOT"],
        "kubernetes.azure.com/scalesetpriority": ["spot"],
    }
    for taint in work.pod["tolerations"]:
        if taint["key"] != "nvidia.com/gpu":
            assert [taint["value"]] == labels[taint["key"]]
