"""The one door to MLflow: loads it quietly, with calls that fail within seconds."""

import logging
import os
from typing import TYPE_CHECKING

from mimiclab.tracking.address import absolute_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Alembic's migrations, "Creating initial MLflow database tables", links after every run.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # By default a call to a server that is down blocks for minutes. The writer keeps its rows and retries.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""MLflow's settings; what the user has set in the environment comes first."""


def load() -> None:
    """Import MLflow, which takes seconds; in the main thread, so that no other import is under way."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    # Something else may have imported it before the environment was set.
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])


def connect(uri: str) -> "MlflowClient":
    """A client of the store at ``uri``."""
    load()
    from mlflow import MlflowClient

    return MlflowClient(absolute_uri(uri))
