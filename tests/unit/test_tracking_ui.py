"""What `mimiclab ui` links to, the views that it writes, and what it says of a store that it cannot show."""

import contextlib
import http.server
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from mimiclab.errors import UserError
from mimiclab.tracking import pages, runs, searches, ui, views
from mimiclab.tracking.client import connect
from mimiclab.tracking.parents import PARENT_TAG
from mimiclab.tracking.protocol import make_rows
from mimiclab.tracking.writer import _send_rows

BASE = "http://head:5000/lab/"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('ui')}/mlflow.db"


def open_run(
    uri: str, project: str, name: str, ap: float | None = None, parent: str | None = None, **params: str
) -> str:
    tags = {} if parent is None else {PARENT_TAG: parent, "trial.outcome": "finished"}
    run = runs.open_run(uri, project, name, "abc", {"name": name, **params}, tags)
    if ap is not None:
        _send_rows(connect(uri), run, make_rows(5, {"student/AP": ap, "student/AP50": 2 * ap}))
    return run


def links(uri: str, project: str | None, base_url: str = BASE) -> dict[str, str]:
    said: list[str] = []
    ui._say_links(uri, base_url, project, said.append)
    return {name: f"http{link}" for name, _, link in (line.partition(": http") for line in said)}


def view(uri: str, project: str, key: str) -> dict:
    tags = connect(uri).get_experiment_by_name(project).tags
    envelope = json.loads(tags[f"mlflow.sharedViewState.{key}"])
    return {"name": envelope["name"], **json.loads(envelope["state"])}


def test_addresses_lie_below_the_path_of_the_server() -> None:
    table = pages.shared_view_page(BASE, "7", "best")
    assert table == "http://head:5000/lab/#/experiments/7/runs?viewStateShareKey=best&workflowType=machine_learning"
    assert pages.charts_of(table) == f"{table}&compareRunsMode=CHART"
    assert pages.runs_page(BASE, "7", "params.a = 'b'").startswith(
        "http://head:5000/lab/#/experiments/7/runs?searchFilter=params.a%20%3D%20%27b%27"
        "&orderByKey=metrics.%60student%2FAP%60&orderByAsc=false&"
    )
    assert pages.run_page("http://head:5000", "7", "ab").startswith("http://head:5000/#/experiments/7/runs/ab?")
    query = pages.compare_page(BASE, "7", ["a", "b"]).split("/#/compare-runs?")[1]
    assert '"' not in query
    assert {key: json.loads(value) for key, [value] in parse_qs(query).items()} == {
        "runs": ["a", "b"],
        "experiments": ["7"],
    }


def test_a_store_that_is_silent_at_the_end_of_a_command_is_no_reason_to_fail() -> None:
    assert ui.place_of("http://127.0.0.1:9", "a" * 32).startswith("http://127.0.0.1:9, which does not say now where ")


@pytest.mark.slow
def test_a_project_without_runs_has_no_dead_links(uri: str) -> None:
    open_run(uri, "others", "a")
    said: list[str] = []
    ui._say_links(uri, BASE, "cells", said.append)
    assert said == ["no runs in the project cells yet; there are others (--project)", f"MLflow: {BASE}"]
    assert links(uri, None) == {"MLflow": BASE}


def test_links_appear_as_there_is_something_to_see(uri: str) -> None:
    one = open_run(uri, "growing", "one")
    assert list(links(uri, "growing")) == ["leaderboard", "charts", "running run, one"]
    runs.end_run(uri, one, "FINISHED")
    open_run(uri, "growing", "two", ap=0.25)
    runs.end_run(uri, open_run(uri, "growing", "three"), "FINISHED")
    assert list(links(uri, "growing")) == ["leaderboard", "charts", "running run, two"]

    parent = searches.open_search(uri, "growing", "look", "abc", {}, "")
    trials = [open_run(uri, "growing", f"look-{n}", 0.3 + n / 10, parent, **{"optim.lr": str(n)}) for n in range(3)]
    open_run(uri, "growing", "look-3", parent=parent)
    found = links(uri, "growing")
    assert list(found) == ["leaderboard", "charts", "best 4", "trials of look", "running run, look-3"]
    assert all(link.startswith("http://head:5000/lab/#/experiments/") for link in found.values())
    best = view(uri, "growing", "best")["searchFilter"]
    assert [best.find(run) > 0 for run in (*reversed(trials), one)] == [True, True, True, False]
    assert view(uri, "growing", "search")["searchFilter"].startswith(f"tags.`{PARENT_TAG}` = '{parent}' AND ")


def test_what_was_discarded_is_neither_linked_nor_listed(uri: str) -> None:
    for name in ("one", "two"):
        open_run(uri, "fresh", name, ap=0.75)
        runs.forget_run(uri, "fresh", name, "abc")
    assert links(uri, "fresh")["MLflow"] == BASE

    new = open_run(uri, "fresh", "one", ap=0.25)
    assert list(links(uri, "fresh")) == ["leaderboard", "charts", "running run, one"]
    assert listed(uri, "fresh", "leaderboard") == [new]

    for name in ("old", "new"):
        parent = searches.open_search(uri, "fresh", name, "abc", {}, "")
        trials = [open_run(uri, "fresh", f"{name}-{n}", 0.3 + n / 10, parent) for n in range(3)]
        if name == "old":
            runs.forget_run(uri, "fresh", name, "abc")
    runs.forget_run(uri, "fresh", "new-2", "abc")
    links(uri, "fresh")
    assert listed(uri, "fresh", "search") == trials[1::-1]
    runs.forget_run(uri, "fresh", "new", "abc")
    assert "trials of " not in " ".join(links(uri, "fresh"))


def listed(uri: str, project: str, key: str) -> list[str]:
    """What MLflow finds by the filter of a view, the best first."""
    client = connect(uri)
    where = [client.get_experiment_by_name(project).experiment_id]
    found = client.search_runs(where, view(uri, project, key)["searchFilter"], order_by=["metrics.`student/AP` DESC"])
    return [run.info.run_id for run in found]


def test_columns_and_axes_are_what_the_runs_have_and_where_they_differ(uri: str) -> None:
    parent = searches.open_search(uri, "columns", "look", "abc", {}, "")
    for n in range(2):
        params = {"data.flip": str(n), "optim.lr": str(n), "optim.name": "sgd", "where.storage": str(n)}
        run = open_run(uri, "columns", f"t{n}", 0.1, parent, **params)
        searches.end_trial(uri, run, "finished", "FINISHED", {"optim.lr": n}, None)
    links(uri, "columns")
    found = view(uri, "columns", "search")
    assert found["name"] == "trials of look"
    assert found["selectedColumns"] == [
        *("metrics.`student/AP`", "metrics.`student/AP50`", "tags.`trial.outcome`"),
        *("params.`optim.lr`", "params.`data.flip`", "attributes.`Models`"),  # what was searched comes first
    ]
    assert (found["orderByKey"], found["orderByAsc"]) == ("metrics.`student/AP`", False)
    (parallel,) = (chart for chart in found["compareRunCharts"] if chart["type"] == "PARALLEL")
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (["optim.lr", "data.flip"], ["student/AP"])
    assert [section["name"] for section in found["compareRunSections"]] == ["overview", "parameters", "student"]


def test_a_view_that_is_there_is_not_written_again(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run(uri, "calm", "a", 0.5)
    open_run(uri, "calm", "b", 0.4)
    first = links(uri, "calm")
    written: list[str] = []
    client = type(connect(uri))
    monkeypatch.setattr(client, "set_experiment_tag", lambda self, experiment, key, value: written.append(key))
    assert links(uri, "calm") == first
    assert written == []
    open_run(uri, "calm", "c", 0.6, **{"optim.lr": "1"})
    links(uri, "calm")
    assert sorted(written) == ["mlflow.sharedViewState.best", "mlflow.sharedViewState.leaderboard"]


def test_a_view_of_many_runs_fits_one_tag(uri: str) -> None:
    for n in range(6):
        open_run(uri, "wide", f"r{n}", 0.1, **{f"model.{'x' * 60}.{k}": str(n) for k in range(60)})
    links(uri, "wide")
    assert len(view(uri, "wide", "best")["compareRunCharts"]) == 2
    assert len(json.dumps(view(uri, "wide", "best"))) < 10_000  # MLflow takes 20,000 characters


def test_artifacts_out_of_reach_cost_the_pictures_only(uri: str) -> None:
    connect(uri).create_experiment("remote", artifact_location="mlflow-artifacts:/1")  # those of a server
    open_run(uri, "remote", "a", 0.5)
    assert list(links(uri, "remote")) == ["leaderboard", "charts", "running run, a"]


def test_who_may_only_read_gets_pages_that_need_no_view(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import RestException

    def refuse(*args: object) -> None:
        raise RestException({"error_code": "PERMISSION_DENIED", "message": "no"})

    open_run(uri, "shared", "a", 0.5)
    open_run(uri, "shared", "b", 0.4)
    monkeypatch.setattr(views, "share", refuse)
    found = links(uri, "shared")
    assert "IS%20NULL&orderByKey=metrics.%60student%2FAP%60" in found["leaderboard"]
    assert found["charts"] == f"{found['leaderboard']}&compareRunsMode=CHART"
    assert "/#/compare-runs?" in found["best 2"]


@pytest.fixture(scope="module")
def old_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose revision no MLflow knows."""
    path = tmp_path_factory.mktemp("old") / "mlflow.db"
    open_run(f"sqlite:///{path}", "cells", "a")
    return path


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("UPDATE alembic_version SET version_num = '0123456789ab'", "found version 0123456789ab"),
        ("DROP TABLE logged_models", "it lacks the table logged_models"),
    ],
)
def test_a_store_of_another_mlflow_is_left_as_it_is(
    old_store: Path, tmp_path: Path, change: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimiclab.tracking.client._MIGRATION_S", 0.1)
    path = tmp_path / "old.db"
    path.write_bytes(old_store.read_bytes())
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute(change)
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        ui.serve(f"sqlite:///{path}")
    assert found in str(error.value)
    assert f"mlflow db upgrade sqlite:///{path}" in str(error.value)
    assert path.read_bytes() == before


def test_files_that_are_no_store_of_mlflow_are_named(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    with pytest.raises(UserError, match="is another program's sqlite file, with the table songs"):
        ui.serve(f"sqlite:///{other}")
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(other.read_bytes()[:100] + b"\xff" * 5000)
    with pytest.raises(UserError, match="cannot be read"):
        ui.serve(f"sqlite:///{damaged}")
    text = tmp_path / "notes.txt"
    text.write_text("not a database, whatever the address says")
    with pytest.raises(UserError, match="is no sqlite file"):
        ui.serve(f"sqlite:///{text}")
    with pytest.raises(UserError, match="there is no file"):
        ui.serve(f"sqlite:///{tmp_path}/none.db")


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server of MLflow's that does not know who asks."""

    def do_GET(self) -> None:
        healthy = self.path == "/health"
        self.send_response(200 if healthy else 401)
        self.end_headers()
        self.wfile.write(b"OK" if healthy else b"You are not authenticated.")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_wrong_credentials_and_no_server_are_one_message_each(refusing: str) -> None:
    with pytest.raises(UserError, match=r"answers 401.*MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        ui.serve(refusing, project="cells")
    with pytest.raises(UserError, match=r"does not answer within 5 s .*Connection refused"):
        ui.serve("http://127.0.0.1:9", project="cells")
