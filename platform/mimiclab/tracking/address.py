"""The address of a tracking store: a sqlite file on this machine, or an MLflow server."""

import contextlib
import os
import sqlite3
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from mimiclab.errors import UserError

_SQLITE = "sqlite:///"
_EXPECTED = "expected sqlite:///PATH or the http(s):// address of an MLflow server"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of a sqlite store's file; None for any other store."""
    # abspath, not resolve: a linked folder is meant to be followed at the time of writing.
    return Path(os.path.abspath(uri.removeprefix(_SQLITE))) if uri.startswith(_SQLITE) else None  # noqa: PTH100


def absolute_uri(uri: str) -> str:
    """The same store from any working directory: workers run in folders of their own."""
    path = sqlite_path(uri)
    return uri if path is None else f"{_SQLITE}{path}"


def artifact_folder(database: Path) -> Path:
    """Where the pictures and files of a sqlite store lie: next to it, at an absolute path."""
    return database.with_name(f"{database.stem}-artifacts")


def read_sqlite(path: Path, query: str) -> list[tuple[Any, ...]]:
    """The rows that a query finds in a sqlite file, which is not made or changed.

    Raises:
        sqlite3.DatabaseError: The file is none or damaged; an OperationalError if it is locked or lacks a table.
    """
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def check_tracking(uri: str, timeout_s: float = 5) -> None:
    """Make sure that runs can be tracked at this address, without loading MLflow.

    Raises:
        UserError: The address is of no known kind, the server does not answer as MLflow does within
            ``timeout_s`` seconds, it holds a password, or the sqlite file cannot be written.
    """
    path = sqlite_path(uri)
    if path is not None:
        _check_sqlite(uri, path)
        return
    try:
        scheme, place, *_ = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"where.tracking: {uri!r} is no tracking address ({error}); {_EXPECTED}") from error
    if "@" in place:  # not shown: a message may go into a log
        raise UserError(
            "where.tracking: found credentials in the address, which goes into every record of a run; expected them "
            "in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or in ~/.mlflow/credentials"
        )
    if scheme not in ("http", "https"):
        raise UserError(f"where.tracking: {uri!r} is no tracking address; {_EXPECTED}")
    _check_server(uri, timeout_s)


def _check_sqlite(uri: str, path: Path) -> None:
    start = f"where.tracking: {uri}"
    if path.is_dir() or path.name.startswith(":"):
        raise UserError(f"{start} names no file; expected sqlite:///PATH, for instance sqlite:///mlflow.db")
    if not path.parent.is_dir():
        raise UserError(f"{start}: the folder {path.parent} does not exist; expected one to hold {path.name}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        place = path if path.exists() else path.parent
        raise UserError(f"{start}: {place} cannot be written; expected a place that you may write to")
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise UserError(f"{start}: {path} is no sqlite file; expected one that MLflow made, or none")
        try:
            tables = {row[0] for row in read_sqlite(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
        except sqlite3.OperationalError:  # somebody writes for long: so it is in use
            return
        except sqlite3.DatabaseError as error:
            raise UserError(f"{start}: {path} cannot be read ({error}); expected a sqlite file in one piece") from error
        if tables and "alembic_version" not in tables and "experiments" not in tables:
            raise UserError(
                f"{start}: {path} is another program's sqlite file, with the table {min(tables)}; "
                "expected one that MLflow made, or none"
            )


def _check_server(uri: str, timeout_s: float) -> None:
    start = f"where.tracking: {uri}"
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s) as answer:
            found = answer.read(100).decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
        raise UserError(f"{start} answers {error.code} {error.reason} at /health; expected an MLflow server") from error
    except (OSError, ValueError) as error:  # refused, unresolved, timed out, or no address at all
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(
            f"{start} does not answer within {timeout_s:g} s ({reason}); expected a running MLflow server "
            "there, or sqlite:///PATH to do without one"
        ) from error
    if found != "OK":
        raise UserError(f"{start} answers {found!r} at /health; expected an MLflow server, which says 'OK'")
