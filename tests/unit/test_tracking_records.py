"""What a store says of many runs at once, and what it says where it cannot be asked."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mimiclab.errors import UserError
from mimiclab.tracking import parents, runs
from mimiclab.tracking.client import connect
from mimiclab.tracking.records import Store


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def ids(uri: str) -> dict[str, str]:
    """A search with two trials, one of them deleted; and the same name in two projects."""
    parent = parents.open_parent(uri, "cells", "search", "hunt", "abc", {}, "")
    tags = {parents.PARENT_TAG: parent}
    found = {"hunt": parent}
    for name in ("hunt-trial-00", "hunt-trial-01"):
        found[name] = runs.open_run(uri, "cells", name, "abc", {"optim.lr": "0.1"}, tags)
    connect(uri).delete_run(found["hunt-trial-01"])
    connect(uri).log_metric(found["hunt-trial-00"], "student/AP", 0.25)
    found["x"] = runs.open_run(uri, "cells", "x", "abc", {}, {})
    found["other x"] = runs.open_run(uri, "scenes", "x", "def", {}, {})
    return found


def test_a_record_says_all_that_is_known_of_a_run(uri: str, ids: dict[str, str]) -> None:
    [record] = Store(uri).by_ids([ids["hunt-trial-00"]]).values()

    assert (record.name, record.project, record.status) == ("hunt-trial-00", "cells", "RUNNING")
    assert (record.deleted, record.forgotten, record.kind, record.parent) == (False, False, None, ids["hunt"])
    assert (record.params, record.metrics) == ({"optim.lr": "0.1"}, {"student/AP": 0.25})


def test_deleted_runs_are_found_by_id_and_name_but_are_no_children(uri: str, ids: dict[str, str]) -> None:
    store = Store(uri)

    assert [each.name for each in store.children(ids["hunt"])] == ["hunt-trial-00"]
    assert [each.deleted for each in store.by_names(["hunt-trial-01"])] == [True]
    assert store.by_ids([ids["hunt-trial-01"]])[ids["hunt-trial-01"]].deleted
    assert [each.name for each in store.of_project("cells")] == ["hunt", "hunt-trial-00", "x"]


@pytest.mark.parametrize("more", [[], [f"hunt-trial-{n}" for n in range(10)]])
def test_names_are_found_in_all_projects_and_no_others_are(uri: str, ids: dict[str, str], more: list[str]) -> None:
    found = Store(uri).by_names(["x", "hunt", "X", *more])

    assert sorted((each.name, each.project) for each in found) == [("hunt", "cells"), ("x", "cells"), ("x", "scenes")]


def test_ids_are_found_by_their_beginnings(uri: str, ids: dict[str, str]) -> None:
    assert [each.run_id for each in Store(uri).by_id_prefix(ids["x"][:12])] == [ids["x"]]
    assert Store(uri).by_ids(["0" * 32]) == {}


def test_deleting_twice_is_deleting_once(uri: str) -> None:
    run_id = runs.open_run(uri, "cells", "gone", "abc", {}, {})
    store = Store(uri)

    for _ in range(2):
        store.delete(run_id)
        assert store.by_ids([run_id])[run_id].deleted
    store.delete("0" * 32)


def test_a_store_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*/no\.db; expected one that holds runs"):
        Store(f"sqlite:///{tmp_path}/no.db")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def server(status: int) -> Iterator[str]:
    """Answers as MLflow with basic auth does: /health to anybody, all else with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            healthy = self.path == "/health"
            body = b"OK" if healthy else b"You may not."
            self.send_response(200 if healthy else status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            listening.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "user", "found"),
    [
        (401, "ada", "answers 401 to the user 'ada'; expected one of its users and that one's password"),
        (401, "", "answers 401 to a request without a user; expected one of its users and that one's password"),
        (403, "ada", "answers 403 to the user 'ada': You may not.; expected a user who may do that"),
    ],
)
def test_who_is_refused_is_told_where_credentials_are_expected(
    status: int, user: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with server(status) as uri, pytest.raises(UserError) as caught:
        Store(uri)

    assert str(caught.value) == (
        f"where.tracking: {uri} {found}, in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
        "MLFLOW_TRACKING_TOKEN), or in ~/.mlflow/credentials"
    )


def test_a_server_that_does_not_reach_its_database_is_named() -> None:
    with server(503) as uri, pytest.raises(UserError) as caught:
        Store(uri)

    assert str(caught.value) == f"where.tracking: {uri} answers 503; expected a server that reaches its database"


def test_a_server_that_is_gone_is_named() -> None:
    with pytest.raises(UserError, match=r"^where\.tracking: http://127\.0\.0\.1:9 does not answer within 5 s"):
        Store("http://127.0.0.1:9")
