"""Listing, comparing and removing runs in a bucket: moto's server on loopback speaks S3's protocol."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import bucket_server
from ended import PROJECT, detect, ended, experiment, write_data

from mimiclab.cli import main
from mimiclab.evaluate import score
from mimiclab.experiment import resolved_yaml
from mimiclab.references import SEARCH_FILE
from mimiclab.storage import Storage
from mimiclab.tracking import parents
from mimiclab.tracking.client import connect

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    with bucket_server("bucket") as address:
        yield f"s3://bucket/my%20runs?endpoint_override={address}&scheme=http&region=us-east-1"


def test_a_search_in_a_bucket_is_listed_compared_and_removed(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mimiclab(*args: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(args)
        out, err = capsys.readouterr()
        assert caught.value.code == 0, err
        return out

    monkeypatch.chdir(tmp_path)
    dataset = write_data(tmp_path)
    parent = parents.open_parent("sqlite:///mlflow.db", PROJECT, "search", "hunt", "abc", {}, "")
    for number, skill in enumerate((0.3, 1.0)):
        trial = experiment(tmp_path, f"hunt-trial-{number:02d}", f"where.storage={storage}", f"optim.lr=0.{number + 1}")
        found = score(dataset, [{"student": detect(dataset, skill, 1)}])
        tags = {parents.PARENT_TAG: parent}
        run = ended(trial, found.metrics, found.detections, dataset.columns.digest(), tags=tags)
    place = Storage(storage)
    (place / "hunt").write(SEARCH_FILE, resolved_yaml(trial).encode())
    place.write("mine.txt", b"")

    items = json.loads(mimiclab("runs", "list", "--json", "--storage", storage))
    text = mimiclab("compare", "hunt", "--storage", storage, "--markdown", "-", "--resamples", "20")
    by_folder = mimiclab("compare", *((place / item["name"]).uri for item in items[1:]), "--markdown", "-")
    out = mimiclab("runs", "rm", (place / "hunt").uri, "--yes")

    assert [(item["name"], item["status"], item["step"]) for item in items] == [
        ("hunt", "search", None),
        ("hunt-trial-00", "finished", 25),
        ("hunt-trial-01", "finished", 25),
    ]
    assert items[1]["size"] > 1000
    assert text.startswith("# hunt-trial-00 against hunt-trial-01\n\n- hunt-trial-00 (step 20) against")
    assert by_folder.startswith("# hunt-trial-01 against hunt-trial-00\n")
    assert out.count("removed ") == 4
    assert "key" not in out
    assert place.sizes() == {"mine.txt": 0}
    assert {connect(run.tracking).get_run(each).info.lifecycle_stage for each in (parent, run.mlflow_run_id)} == {
        "deleted"
    }
