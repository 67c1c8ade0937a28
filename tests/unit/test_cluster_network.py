"""Who reaches what on Kubernetes: the network policies of cluster/kuberay, read as Kubernetes reads them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "cluster" / "kuberay"
DOCUMENTS = [each for path in FOLDER.glob("*.yaml") for each in yaml.safe_load_all(path.read_text())]
POLICIES = [each["spec"] for each in DOCUMENTS if each["kind"] == "NetworkPolicy"]

RAY = {"ray.io/cluster": "mimiclab", "ray.io/node-type": "worker"}
MLFLOW = {"app": "mimiclab-mlflow"}
SUBMITTER = {"batch.kubernetes.io/job-name": "mimiclab-train"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"}
STRANGER = {"app": "notebook"}


def reaches(port: int, of: dict[str, str], whom: dict[str, str], same_namespace: bool = True) -> bool:
    """Whether a pod with some labels may connect to a port of one with others."""
    policies = [each for each in POLICIES if selects(each["podSelector"], of) and "Ingress" in each["policyTypes"]]
    rules = [rule for policy in policies for rule in policy["ingress"]]
    return not policies or any(
        port in [each["port"] for each in rule.get("ports", [{"port": port}])]
        and any(is_peer(peer, whom, same_namespace) for peer in rule["from"])
        for rule in rules
    )


def is_peer(peer: dict[str, Any], labels: dict[str, str], same_namespace: bool) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}
    return (same_namespace or peer.get("namespaceSelector") == {}) and selects(peer["podSelector"], labels)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    assert all(each["operator"] == "Exists" for each in selector.get("matchExpressions", []))
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        each["key"] in labels for each in selector.get("matchExpressions", [])
    )


@pytest.mark.parametrize("port", [6379, 8076, 8265, 10001, 12345, 44217, 52365])
def test_pods_of_ray_reach_one_another_and_are_reached_by_no_stranger(port: int) -> None:
    assert reaches(port, RAY, RAY)
    assert not reaches(port, RAY, RAY, same_namespace=False)
    assert not reaches(port, RAY, STRANGER)
    assert not reaches(port, RAY, STRANGER, same_namespace=False)
    assert not reaches(port, RAY, MLFLOW)


def test_who_submits_jobs_reaches_the_job_server_and_nothing_else() -> None:
    assert reaches(8265, RAY, SUBMITTER)
    assert not reaches(8265, RAY, SUBMITTER, same_namespace=False)
    assert reaches(8265, RAY, OPERATOR, same_namespace=False)
    for port in (6379, 10001, 12345):
        assert not reaches(port, RAY, SUBMITTER)
        assert not reaches(port, RAY, OPERATOR, same_namespace=False)


def test_mlflow_is_reached_by_pods_of_ray_only() -> None:
    assert reaches(5000, MLFLOW, RAY)
    for whom in (STRANGER, SUBMITTER, OPERATOR):
        assert not reaches(5000, MLFLOW, whom)


def test_the_labels_are_those_of_the_files() -> None:
    [mlflow] = [each for each in DOCUMENTS if each["kind"] == "Deployment"]
    assert mlflow["spec"]["template"]["metadata"]["labels"] == MLFLOW
    [job] = [each for each in DOCUMENTS if each["kind"] == "RayJob"]
    assert job["spec"]["submissionMode"] == "K8sJobMode"
    assert job["metadata"]["name"] == SUBMITTER["batch.kubernetes.io/job-name"]
