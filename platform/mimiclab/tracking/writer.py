"""Sends a run's history to MLflow without ever being in the way of training.

A step's rows are put into memory and a thread sends them about once a second. What makes the history exact
over crashes, outages and restarts:

* Rows leave in order of steps, and a step's rows in one transaction, up to 1,000 of them. So what the server
  has of a series is always a beginning of it, and its last step says everything: a row at or before that step is
  not sent again.
* A row keeps the time at which it was logged. A call whose answer was lost is made again with identical
  rows, which MLflow stores once.
* A row is given up only when the server has acknowledged it. Until then checkpoints carry it, or a page in the
  spool does, see `backlog`, and the next process resends it first.

Pictures and files follow the rows. What the server does not take is kept in the spool, a folder of the run, until
it does: for the next process too. What waits when a checkpoint is written is kept there first, so that a process that
is killed loses none that the next one does not make again. What is kept is read again when it is sent.
"""

import json
import logging
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mimiclab.tracking.backlog import Backlog
from mimiclab.tracking.client import connect, load, mistake
from mimiclab.tracking.protocol import Content, Row, Table, check_file, check_picture, make_rows
from mimiclab.tracking.spool import File, Item, Picture, Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from mimiclab.storage import Storage

_INTERVAL_S = 1.0
_MAX_BACK_OFF_S = 15.0
_CLOSING_BACK_OFF_S = 0.5

_log = logging.getLogger(__name__)


# Names the run's tables to MLflow's pages.
_TABLES_TAG = "mlflow.loggedArtifacts"


class MlflowTracker:
    """A `mimiclab.tracking.protocol.Tracker` that writes to one MLflow run.

    The constructor loads MLflow but does not wait for the server. One process at a time may write a series
    of a run.

    Args:
        uri: The tracking store.
        run_id: MLflow's id of the run, from `mimiclab.tracking.runs.open_run`.
        resend: Rows that the checkpoint carries because the server had not acknowledged them.
        spool: Folder for pictures, files and old rows that the server does not take; what is there already is sent.
            Without one pictures and files are lost with the process, and all rows stay in memory.
    """

    def __init__(self, uri: str, run_id: str, resend: Sequence[Row] = (), *, spool: "Storage | None" = None) -> None:
        self._uri = uri
        self._run_id = run_id
        self._lock = threading.Lock()
        self._backlog = Backlog(spool, resend)
        self._items: dict[str, Item] = {}
        self._spool = Spool(spool)
        self._tags: dict[str, str] = {}
        self._tables: set[str] | None = None
        self._client: MlflowClient | None = None
        self._last: dict[str, int] = {}
        self._pictures: set[tuple[str, int]] | None = None
        self._closing = threading.Event()
        self._deadline = float("inf")
        load()
        self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See `mimiclab.tracking.protocol.Tracker.log_metrics`."""
        rows = make_rows(step, values)
        with self._lock:
            self._check_open()
            self._backlog.add(rows)

    def log_picture(self, key: str, step: int, image: Image.Image) -> None:
        """See `mimiclab.tracking.protocol.Tracker.log_picture`."""
        check_picture(key, step)
        picture = Picture(key, step, image.convert("RGB").copy(), time.time_ns() // 1_000_000)
        self._put(picture)

    def log_file(self, name: str, content: Content) -> None:
        """See `mimiclab.tracking.protocol.Tracker.log_file`."""
        check_file(name)
        self._put(File(name, content))

    def log_table(self, name: str, table: Table) -> None:
        """See `mimiclab.tracking.protocol.Tracker.log_table`."""
        check_file(name)
        self._put(File(name, table.as_json(), is_table=True))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See `mimiclab.tracking.protocol.Tracker.set_tags`."""
        with self._lock:
            self._check_open()
            self._tags = {**self._tags, **tags}

    def unsent(self) -> list[Row]:
        """See `mimiclab.tracking.protocol.Tracker.unsent`."""
        return self._backlog.in_memory()

    def close(self, timeout_s: float) -> list[Row]:
        """See `mimiclab.tracking.protocol.Tracker.close`.

        A call that is under way at the deadline may still reach the server: a returned row can be resent
        all the same, since it would be the identical row.
        """
        with self._lock:
            self._deadline = min(self._deadline, time.monotonic() + timeout_s)
            self._closing.set()
        self._thread.join(timeout_s)
        if left := self.unsent_files():
            _log.warning("%d files could not be sent to MLflow at %s", left, self._uri)
        self.keep()
        return self.unsent()

    def unsent_files(self) -> int:
        """See `mimiclab.tracking.protocol.Tracker.unsent_files`."""
        with self._lock:
            return len(self._items) + self._backlog.num_pages()

    def keep(self) -> None:
        """See `mimiclab.tracking.protocol.Tracker.keep`."""
        self._backlog.keep()
        with self._lock:
            items = list(self._items.values())
        for item in items:
            self._spool.add(item)
            with self._lock:
                is_sent = self._items.get(item.id) is not item
            if is_sent:  # meanwhile
                self._forget(item)

    def _put(self, item: Item) -> None:
        with self._lock:
            self._check_open()
            # A newer file of a name takes the place of one that waits; a picture of a step is always the same.
            self._items[item.id] = item

    def _forget(self, item: Item) -> None:
        self._spool.remove(item, waits=lambda: item.id in self._items)

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise RuntimeError("the tracker is closed")

    # From here on: the thread.

    def _run(self) -> None:
        delay = _INTERVAL_S
        failing = False
        before = self._spool.items()
        with self._lock:
            self._items = {**{item.id: item for item in before}, **self._items}
        while True:
            closing = self._closing.wait(delay)
            try:
                self._send()
            except Exception as error:  # from MLflow, HTTP or SQL: whatever it was, nothing is acknowledged
                if not failing:
                    reason = mistake(self._uri, error) or error
                    _log.warning("MLflow at %s fails (%s); what is logged is kept", self._uri, reason)
                failing = True
                self.keep()
                delay = min(2 * delay, _MAX_BACK_OFF_S)
                if closing:
                    time.sleep(_CLOSING_BACK_OFF_S)
            else:
                if failing:
                    _log.warning("MLflow at %s answers again; what was kept is sent", self._uri)
                failing = False
                delay = _INTERVAL_S
                if closing:
                    return
            if time.monotonic() > self._deadline:
                return

    def _send(self) -> None:
        self._backlog.open()
        if self._client is None:
            client = connect(self._uri)
            self._last = _last_steps(client, self._run_id)
            self._client = client
        while (rows := self._backlog.take()) and time.monotonic() < self._deadline:
            self._send_unknown(self._client, rows)
            self._backlog.acknowledged(rows)
        self._send_tags(self._client)
        while (item := self._next_item()) and time.monotonic() < self._deadline:
            is_readable = self._send_item(self._client, item)
            with self._lock:
                is_newest = self._items[item.id] is item
                if is_newest:
                    del self._items[item.id]
            if is_newest and (is_readable or not item.is_kept):
                self._forget(item)

    def _send_unknown(self, client: "MlflowClient", rows: Sequence[Row]) -> None:
        """Send those rows that the server does not have."""
        last: dict[str, int] = {}
        unknown = []
        for row in rows:
            if row.step > last.get(row.key, self._last.get(row.key, -1)):
                last[row.key] = row.step
                unknown.append(row)
        if unknown:
            _send_rows(client, self._run_id, unknown)
            self._last.update(last)

    def _send_item(self, client: "MlflowClient", item: Item) -> bool:
        """Send a picture or a file; false where it cannot be read or drawn, which must not hold up the others."""
        try:
            send = (
                partial(self._send_picture, client, item, item.image())
                if isinstance(item, Picture)
                else partial(self._send_file, client, item, item.read())
            )
        except Exception as error:
            _log.warning("%s could not be made (%s)", item.name, error)
            return False
        send()
        return True

    def _next_item(self) -> Item | None:
        with self._lock:
            return next(iter(self._items.values()), None)

    def _send_tags(self, client: "MlflowClient") -> None:
        from mlflow.entities import RunTag

        tags = self._tags
        if tags:
            client.log_batch(self._run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)
            with self._lock:
                self._tags = {key: value for key, value in self._tags.items() if tags.get(key) != value}

    def _send_file(self, client: "MlflowClient", file: File, content: bytes) -> None:
        path = Path(file.name)
        with tempfile.TemporaryDirectory(prefix="mimiclab-") as folder:
            local = Path(folder) / path.name
            local.write_bytes(content)
            client.log_artifact(self._run_id, str(local), str(path.parent) if path.parent.name else None)
        if file.is_table:
            self._name_table(client, file.name)

    def _name_table(self, client: "MlflowClient", name: str) -> None:
        if self._tables is None:
            listed = json.loads(client.get_run(self._run_id).data.tags.get(_TABLES_TAG, "[]"))
            self._tables = {each["path"] for each in listed}
        if name not in self._tables:
            tables = sorted({*self._tables, name})
            value = json.dumps([{"path": each, "type": "table"} for each in tables])
            client.set_tag(self._run_id, _TABLES_TAG, value, synchronous=True)
            self._tables.add(name)

    def _send_picture(self, client: "MlflowClient", file: Picture, image: Image.Image) -> None:
        known = self._pictures if self._pictures is not None else _known_pictures(client, self._run_id)
        self._pictures = None  # unknown until this one has arrived
        if (file.key, file.step) not in known:
            client.log_image(
                self._run_id,
                image,
                key=file.key,
                step=file.step,
                timestamp=file.timestamp_ms,
                synchronous=True,
            )
        self._pictures = known | {(file.key, file.step)}


def _send_rows(client: "MlflowClient", run_id: str, rows: Sequence[Row]) -> None:
    from mlflow.entities import Metric

    # Of more than 1,000 MLflow's client would make several calls by itself, in the middle of a step.
    client.log_batch(run_id, metrics=[Metric(*row) for row in rows], synchronous=True)


def _last_steps(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """The last recorded step of each series, in one call however long the history is."""
    # MLflow's latest metric is the one with the greatest step; it is written in the rows' own transaction.
    return {metric.key: metric.step for metric in client.get_run(run_id).to_proto().data.metrics}


def _known_pictures(client: "MlflowClient", run_id: str) -> set[tuple[str, int]]:
    """(key, step) of the pictures that the run has, read from how MLflow names them."""
    # images/KEY+step+STEP+timestamp+..., slashes of the key as "~"; the compressed copy is written last.
    names = (file.path.removeprefix("images/").split("+") for file in client.list_artifacts(run_id, "images"))
    return {(name[0].replace("~", "/"), int(name[2])) for name in names if name[-1] == "compressed.webp"}
