"""What is shipped in cluster/: by the rules of who reads it, as far as those can be had without a cloud."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import typer
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from mimiclab.cli import app as mimiclab

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"
CLOUDS = ("aws", "gcp")
FILES = [FOLDER / "Dockerfile", *sorted(FOLDER.rglob("*.yaml"))]
MANIFESTS = sorted((FOLDER / "kuberay").glob("*.yaml"))


def cloud_file(cloud: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / f"{cloud}-spot.yaml").read_text())
    return loaded


def spot_types(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: each for name, each in config["available_node_types"].items() if name != config["head_node_type"]}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_the_file(cloud: str) -> None:
    validate_config(prepare_config(cloud_file(cloud)))


def test_ray_would_refuse_a_key_that_it_does_not_know() -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config({**cloud_file("aws"), "max_worker": 3}))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_is_on_demand_and_takes_no_work(cloud: str) -> None:
    config = cloud_file(cloud)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["labels"]["ray.io/market-type"] == "on-demand"
    assert "spot" not in str(head["node_config"]).lower()
    assert any("--labels=ray.io/market-type=on-demand" in line for line in config["head_start_ray_commands"])


@pytest.mark.parametrize("cloud", CLOUDS)
def test_workers_are_gpus_on_spot_machines_of_several_types_that_are_watched(cloud: str) -> None:
    config = cloud_file(cloud)
    types = spot_types(config)
    assert len(types) >= 2
    for node in types.values():
        assert node["resources"]["GPU"] == 1
        assert node["labels"]["ray.io/market-type"] == "spot"
        assert node["min_workers"] == 0
    commands = config["worker_start_ray_commands"]
    assert any("--labels=ray.io/market-type=spot" in line for line in commands)
    [watch] = [line for line in commands if "spot-watch" in line]
    assert f"--cloud {cloud}" in watch
    assert "--address $RAY_HEAD_IP:6379" in watch


def test_every_machine_of_aws_is_what_ec2_takes() -> None:
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    config = cloud_file("aws")
    for name, node in config["available_node_types"].items():
        report = ParamValidator().validate({**node["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
        assert node["node_config"]["ImageId"]  # Ray's own is too old for the image
    options = shape.members["InstanceMarketOptions"].members
    for node in spot_types(config).values():
        market = node["node_config"]["InstanceMarketOptions"]
        assert market["MarketType"] == "spot"
        assert market["MarketType"] in options["MarketType"].enum
        kinds = options["SpotOptions"].members
        # Ray starts machines one by one, and a machine that is kept after its end costs on.
        assert market["SpotOptions"]["SpotInstanceType"] == "one-time"
        assert market["SpotOptions"]["SpotInstanceType"] in kinds["SpotInstanceType"].enum
        assert market["SpotOptions"]["InstanceInterruptionBehavior"] == "terminate"
    assert ParamValidator().validate({"InstanceTyp": "g5.xlarge", "MinCount": 1, "MaxCount": 1}, shape).has_errors()
    assert len(config["provider"]["availability_zone"].split(",")) >= 3


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_listens_beyond_loopback_is_only_what_workers_need(cloud: str) -> None:
    head = " ".join(cloud_file(cloud)["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in head
    assert "--allowed-hosts" in head
    assert cloud_file(cloud)["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
@pytest.mark.slow
def test_a_manifest_is_what_kuberay_defines(path: Path) -> None:
    if not SCHEMAS.is_dir():
        pytest.skip("KubeRay's definitions are not beside the project")
    for document in yaml.safe_load_all(path.read_text()):
        if not document["kind"].startswith("Ray"):
            continue
        validate(document)


def test_the_definitions_of_kuberay_catch_a_misspelt_key() -> None:
    if not SCHEMAS.is_dir():
        pytest.skip("KubeRay's definitions are not beside the project")
    document = yaml.safe_load((FOLDER / "kuberay" / "raycluster.yaml").read_text())
    document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["toleration"] = []
    with pytest.raises(jsonschema.ValidationError, match="toleration"):
        validate(document)


def validate(document: dict[str, Any]) -> None:
    # Not `jsonschema.validate`, which looks at the large schema itself first.
    for error in jsonschema.Draft202012Validator(strict_schema(document["kind"])).iter_errors(document["spec"]):
        raise error


@cache
def strict_schema(kind: str) -> dict[str, Any]:
    """The definition of a kind's spec as a schema that takes no other keys than those it names."""
    file = yaml.load((SCHEMAS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    [version] = [each for each in file["spec"]["versions"] if each["name"] == "v1"]
    spec: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return strict(spec)


def strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    return made


CLUSTERS = [
    yaml.safe_load((FOLDER / "kuberay" / "raycluster.yaml").read_text())["spec"],
    yaml.safe_load((FOLDER / "kuberay" / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"],
]


def test_a_job_gets_the_workers_of_the_standing_cluster() -> None:
    one, other = (cluster["workerGroupSpecs"][0] for cluster in CLUSTERS)
    assert one["template"] == other["template"]
    assert one["labels"] == other["labels"]
    assert one["resources"] == other["resources"]


@pytest.mark.parametrize("cluster", CLUSTERS, ids=("raycluster", "rayjob"))
def test_a_cluster_on_kubernetes_needs_a_token_and_drains_what_is_taken(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    [avoid] = cluster["headGroupSpec"]["template"]["spec"]["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]["nodeSelectorTerms"]
    for group in cluster["workerGroupSpecs"]:
        assert group["labels"]["ray.io/market-type"] == "spot"
        pod = group["template"]["spec"]
        [spot] = avoid["matchExpressions"]
        assert pod["nodeSelector"][spot["key"]] == spot["values"][0]
        assert spot["operator"] == "NotIn"
        assert {taint["key"] for taint in pod["tolerations"]} == {spot["key"], "nvidia.com/gpu"}
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:2] == ["mimiclab", "spot-watch"]
        assert command[-1] == str(pod["terminationGracePeriodSeconds"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_holds_no_secret_and_names_no_registry(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{64}\b|(?i:password|secret_access_key)\s*[:=]", text)
    assert not re.search(r"(image: +|FROM +)\S+\.\S+/", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_file_runs_of_this_project_can_be_run(path: Path) -> None:
    verbs = typer.main.get_command(mimiclab).commands  # type: ignore[attr-defined]
    shell = re.findall(r"mimiclab (spot-watch|train)\b([^>\n]*)", path.read_text())
    lists = re.findall(r"\[mimiclab, (spot-watch|train), ([^]]*)\]", path.read_text())
    for verb, arguments in [*shell, *((verb, text.replace(",", " ").replace('"', "")) for verb, text in lists)]:
        verbs[verb].make_context(verb, arguments.split())
    assert shell or lists or path.name in ("Dockerfile", "mlflow.yaml", "network.yaml")
