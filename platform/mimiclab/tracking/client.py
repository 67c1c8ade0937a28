"""The one door to MLflow: loads it quietly, with calls that fail within seconds and say what a user can mend."""

import contextlib
import functools
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mimiclab.errors import UserError
from mimiclab.tracking.address import absolute_uri, read_sqlite, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Alembic's migrations, "Creating initial MLflow database tables", links after every run.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # By default a call to a server that is down blocks for minutes. The writer keeps its rows and retries.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""MLflow's settings; what the user has set in the environment comes first."""

# Longer than one step of the migrations by which another process may be making the store.
_MIGRATION_S = 2.0


def load() -> None:
    """Import MLflow, which takes seconds; in the main thread, so that no other import is under way."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    # Something else may have imported it before the environment was set.
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])


def connect(uri: str) -> "MlflowClient":
    """A client of the store at ``uri``.

    Raises:
        UserError: The store is a sqlite file that another version of MLflow made.
    """
    load()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(uri)
    _check_tables(path)
    try:
        return MlflowClient(absolute_uri(uri))
    except MlflowException as error:
        if "database schema" in error.message:
            raise _another_version(path, error.message.partition(".")[0]) from error
        raise


@contextlib.contextmanager
def refusals_explained(uri: str) -> Iterator[None]:
    """Tell of a server that refuses calls, or does not answer them, as of a mistake that a user can mend.

    Raises:
        UserError: The user is not known there or may not do that, or nothing answers any more.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        start = f"where.tracking: {uri}"
        status = error.get_http_status_code()
        if status in (401, 403):
            raise UserError(
                f"{start} answers {status}: {error.message}; expected a user who may read it, named by "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
            ) from error
        if "Max retries exceeded" in error.message:  # its way to say that the connection failed
            raise UserError(f"{start} does not answer any more; expected a running MLflow server") from error
        raise


@functools.cache
def _check_tables(path: Path) -> None:
    """Refuse a store in which a table is missing: MLflow would migrate it, unasked and without a backup."""
    from mlflow.store.db.base_sql_model import Base

    expected = set(Base.metadata.tables)
    found = _tables(path)
    while found and expected - found:
        time.sleep(_MIGRATION_S)
        before, found = found, _tables(path)
        if found == before:
            raise _another_version(path, f"it lacks the table {min(expected - found)}")


def _another_version(path: Path, found: str) -> UserError:
    return UserError(
        f"where.tracking: {path} was made by another version of MLflow: {found}; expected one that this version made. "
        f"Copy the file as a backup, then: mlflow db upgrade sqlite:///{path}"
    )


def _tables(path: Path) -> set[str]:
    # A file that is not there, or locked, is for MLflow to make or to wait for.
    with contextlib.suppress(sqlite3.OperationalError):
        return {row[0] for row in read_sqlite(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    return set()
