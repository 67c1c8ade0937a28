"""A run whose storage speaks S3's protocol, from its start over a death to its end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import bucket_server
from tinyruns import assert_same, quiet, said, tiny, workers

from mimiclab import runs
from mimiclab.train import train

pytestmark = [pytest.mark.cluster, pytest.mark.server]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URI of a folder in a bucket that lives as long as the server."""
    with bucket_server("tests") as address:
        yield f"s3://tests/place?endpoint_override={address}&scheme=http"


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_in_a_bucket_is_the_run_on_a_disk(undisturbed: runs.Run, root: Path, bucket: str) -> None:
    experiment = tiny(root, f"where.storage={bucket}", f"where.tracking=sqlite:///{root}/bucket.db")
    console = quiet()
    killed: list[int] = []

    def kill_once(text: str) -> None:
        if "epoch 2" in text and not killed:
            killed.extend(worker.pid for worker in workers())
            for worker in workers():
                worker.kill()

    write = console.file.write
    console.file.write = lambda text: (kill_once(text), write(text))[1]  # type: ignore[method-assign]
    run = train(experiment, console=console)
    assert killed
    assert "crash: " in said(console)
    assert run.status == "finished"
    assert run.storage.local is None
    assert_same(run, undisturbed)
    found = run.storage.sizes()
    assert {"run.json", "experiment.yaml", "progress.jsonl", "checkpoints", "pictures"} <= set(found)
    log = run.storage.read("progress.jsonl").decode()
    assert log.count('"kind": "evaluation"') >= 3
    assert '"kind": "failure"' in log
    assert train(experiment, console=quiet()).status == "finished"
