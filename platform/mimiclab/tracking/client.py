"""The one door to MLflow: loads it quietly, with calls that fail within seconds and say what a user can mend."""

import contextlib
import errno
import functools
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from mimiclab.errors import UserError
from mimiclab.tracking.address import absolute_uri, read_sqlite, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

P = ParamSpec("P")
Result = TypeVar("Result")

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
    # It prints the traceback of an error of the database that it raises all the same.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def connect(uri: str) -> "MlflowClient":
    """A client of the store at ``uri``.

    Raises:
        UserError: The store is a sqlite file that another version of MLflow made, or that cannot be made.
    """
    load()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(uri)
    _check_tables(path)
    try:
        with refusals_explained(uri):
            return MlflowClient(absolute_uri(uri))
    except MlflowException as error:
        if "database schema" in error.message:
            raise _another_version(path, error.message.partition(".")[0]) from error
        raise


@contextlib.contextmanager
def refusals_explained(uri: str) -> Iterator[None]:
    """Tell of what a store refuses, or cannot do, as of a mistake that a user can mend.

    Raises:
        UserError: A server does not know the user, does not allow that, does not answer or does not reach what it
            stands on; a sqlite store cannot be written; or the run was deleted.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = mistake(uri, error)
        if found is None:
            raise
        raise UserError(f"where.tracking: {uri} {found}") from error


def explained(function: Callable[Concatenate[str, P], Result]) -> Callable[Concatenate[str, P], Result]:
    """`refusals_explained` for all of a function, whose first argument is the address of the store."""

    @functools.wraps(function)
    def wrapped(uri: str, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with refusals_explained(uri):
            return function(uri, *args, **kwargs)

    return wrapped


def mistake(uri: str, error: Exception) -> str | None:
    """What is wrong with a store, if a user can mend what raised this error; it goes on after the address."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    path = sqlite_path(uri)
    if path is not None:
        for cause in _causes(error):
            if isinstance(cause, sqlite3.OperationalError):
                return (
                    f"cannot be used: {cause}; expected {path} to be a file that may be written to, on a disk with room"
                )
            if isinstance(cause, OSError) and cause.errno in _UNWRITABLE:
                return f"cannot take a file: {cause}; expected a folder that may be written to, on a disk with room"
    if isinstance(error, RequestException):  # on the way to the artifacts
        return f"did not take or give a file: {_line(error)}; expected a server that reaches where its artifacts are"
    if not isinstance(error, MlflowException):
        return None
    if deleted := _DELETED.search(error.message):
        return f"has the run {deleted[1]} as deleted; expected it restored: mlflow runs restore --run-id {deleted[1]}"
    if path is not None:
        return None
    status = error.get_http_status_code()
    if status == 401:
        return f"answers 401 to {_who()}; expected one of its users and that one's password, {_CREDENTIALS}"
    if status == 403:
        body = _BODY.search(error.message)
        return (
            f"answers 403 to {_who()}: {_line(body[1] if body else error.message)}; expected a user who may do "
            f"that, {_CREDENTIALS}"
        )
    if failed := _FAILED.search(error.message):
        return f"answers {failed[1]}; expected a server that reaches its database"
    if _UNANSWERED.search(error.message):
        return "does not answer any more; expected a running MLflow server"
    return None


_CREDENTIALS = (
    "in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), or in ~/.mlflow/credentials"
)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# How MLflow's client words these.
_DELETED = re.compile(r"run (\w+) must be in the 'active' state")
_BODY = re.compile(r"Response body: '(.*)'", re.DOTALL)
_FAILED = re.compile(r"too many (5\d\d) error responses")
_UNANSWERED = re.compile(r"failed with (timeout )?exception|Max retries exceeded")


def _who() -> str:
    from mlflow.utils.credentials import read_mlflow_creds

    name = read_mlflow_creds().username
    return f"the user {name!r}" if name else "a request without a user"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


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
