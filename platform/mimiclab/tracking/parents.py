"""A run in MLflow that others are shown under: of a search, or of one experiment over several seeds."""

from collections.abc import Mapping
from typing import Literal

from mimiclab.tracking.client import connect, explained
from mimiclab.tracking.runs import open_run

PARENT_TAG = "mlflow.parentRunId"
"""Of a child run: MLflow's id of its parent."""
KIND_TAG = "mimiclab.kind"
NOTE_TAG = "mlflow.note.content"

Kind = Literal["search", "seeds"]
Status = Literal["FINISHED", "FAILED", "KILLED"]


def open_parent(
    uri: str, project: str, kind: Kind, name: str, identity: str, params: Mapping[str, str], note: str
) -> str:
    """Find or start a parent run, as `open_run` does; `note` is its description, in Markdown."""
    return open_run(uri, project, name, identity, params, tags={KIND_TAG: kind, NOTE_TAG: note})


@explained
def end_parent(uri: str, run_id: str, status: Status, metrics: Mapping[str, float]) -> None:
    """Mark a parent run as over and record what came of its children; a value that it has stays as it is."""
    client = connect(uri)
    known = client.get_run(run_id).data.metrics
    for key, value in metrics.items():
        if known.get(key) != value:
            client.log_metric(run_id, key, value)
    client.set_terminated(run_id, status=status)
