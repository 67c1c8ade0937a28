"""Tags of a run, for a person who may have the run and not its store."""

from mimiclab.tracking.address import sqlite_path
from mimiclab.tracking.client import connect


def known_tags(uri: str, run_id: str) -> dict[str, str]:
    """The tags of a run; none where the store cannot be reached, or does not have the run."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():  # it would be made
        return {}
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_run(run_id).data.tags)
    except MlflowException:
        return {}
