"""Tags of a run, for a person who may have the run and not its store."""

from mimiclab.tracking.address import sqlite_path
from mimiclab.tracking.client import connect


def known_tags(uri: str, run_id: str) -> dict[str, str]:
    """The tags of a run; none where the store cannot be reached, or does not have the run."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():  # it would be made
        return {}
    try:
        return dict(connect(uri).get_run(run_id).data.tags)
    except Exception:  # MLflow's, of HTTP or of SQL
        return {}
