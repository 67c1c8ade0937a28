"""The cluster file of Google Cloud: by Google's own description of its API, and by what Ray's provider makes of it."""

import json
from pathlib import Path
from typing import Any

import googleapiclient
import jsonschema
import pytest
import yaml
from google.cloud import storage
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from ray.autoscaler._private.gcp import config as provider

CONFIG = yaml.safe_load((Path(__file__).parents[2] / "cluster" / "gcp-spot.yaml").read_text())
TYPES = {name: each["node_config"] for name, each in CONFIG["available_node_types"].items()}
SPOT = {name: each for name, each in TYPES.items() if name != CONFIG["head_node_type"]}


def compute_engine(name: str) -> jsonschema.Draft202012Validator:
    """What the API takes as an object of a kind, and no other keys."""
    document = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    kinds = json.loads(document.read_text())["schemas"]
    definitions = {kind: as_json_schema(each) for kind, each in kinds.items()}
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})


def as_json_schema(found: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in found:
        return {"$ref": f"#/$defs/{found['$ref']}"}
    made = {key: found[key] for key in ("type", "enum") if key in found}
    made |= {key: as_json_schema(found[key]) for key in ("items", "additionalProperties") if key in found}
    if "properties" in found:
        made["properties"] = {key: as_json_schema(each) for key, each in found["properties"].items()}
        made.setdefault("additionalProperties", False)
    if found.get("format") in ("int64", "uint64"):  # Google writes them as text, and reads numbers
        made["type"] = ["string", "integer"]
    return made


def test_every_machine_is_what_compute_engine_takes() -> None:
    instance = compute_engine("Instance")
    for name, machine in TYPES.items():
        assert [f"{name}: {error.message}" for error in instance.iter_errors(machine)] == []
        [disk] = machine["disks"]
        assert disk["boot"]
        assert disk["autoDelete"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"scheduling": [{"provisioningModel": "SPOT"}]},
        {"scheduling": {"provisioningModel": "S"}},
        {"disks": [{"bot": 1}]},
    ],
)
def test_compute_engine_would_refuse_what_is_wrong(wrong: dict[str, Any]) -> None:
    assert list(compute_engine("Instance").iter_errors(wrong))


def test_workers_are_spot_machines_that_end_when_they_are_taken() -> None:
    for machine in SPOT.values():
        assert machine["scheduling"] == {
            "provisioningModel": "SPOT",
            "instanceTerminationAction": "DELETE",
            "automaticRestart": False,
            "onHostMaintenance": "TERMINATE",
        }


def test_workers_have_the_account_that_ray_makes_for_the_head() -> None:
    email = provider.SERVICE_ACCOUNT_EMAIL_TEMPLATE.format(
        account_id=provider.DEFAULT_SERVICE_ACCOUNT_ID, project_id=CONFIG["provider"]["project_id"]
    )
    for machine in SPOT.values():
        assert machine["serviceAccounts"] == [
            {"email": email, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
        ]


def test_mlflow_has_what_its_artifacts_in_a_bucket_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # google-auth looks for a machine of Google's otherwise
    assert isinstance(get_artifact_repository("gs://bucket/mlflow").client, storage.Client)
