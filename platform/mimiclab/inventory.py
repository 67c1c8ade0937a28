"""What lies in a folder of runs: how each run stands, and what it takes of the disk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.table import Table

from mimiclab import runs
from mimiclab.errors import UserError
from mimiclab.lease import last_holder
from mimiclab.ledger import Ledger
from mimiclab.references import SEARCH_FILE, Stores, in_threads, place_of_runs
from mimiclab.runs import EXPERIMENT, Run
from mimiclab.storage import MissingError, Storage

Sort = Literal["name", "best", "size", "age"]


@dataclass(frozen=True)
class Item:
    """A run, or a search beside its trials."""

    name: str
    status: str
    """Of a run its own word, but "stopped" where it says "running" and no driver lives; or "search", or "unbegun"."""
    step: int | None = None
    """Of its newest checkpoint."""
    metric: str | None = None
    """`eval.metric`, of its best evaluation."""
    best: float | None = None
    """The value of that."""
    size: int | None = None
    """Bytes in its folder; None where it has none."""
    worked: float | None = None
    """When it was last worked on, in seconds since 1970."""
    tracking: str | None = None
    """MLflow's address."""
    mlflow_run_id: str | None = None
    mlflow: str | None = None
    """Its status there, "deleted", "missing", or None where MLflow was not asked or did not answer."""


def take_stock(storage: str, tracking: str | None, project: str, stores: Stores) -> tuple[list[Item], list[str]]:
    """List the runs in a folder, in order of name, and those that MLflow alone has.

    Args:
        storage: folder, or URI, that holds runs.
        tracking: MLflow's address, whose runs without a folder are listed too; None lists those with folders alone.
        project: the MLflow experiment to list.
        stores: where MLflow is asked.

    Returns:
        The runs, and what is to be said of stores that do not answer.

    Raises:
        UserError: the folder cannot be read, or the store at `tracking`.
    """
    place = place_of_runs(storage)
    try:
        names = sorted(place.folders())
    except MissingError as error:
        raise UserError(f"{place.name}: it is a file, expected a folder of runs") from error
    looked = in_threads(_look, [place / name for name in names])
    items, notes = _ask_mlflow([each for each in looked if each is not None], stores)
    if tracking is not None:
        known = {item.mlflow_run_id for item in items}
        records = stores.of(tracking).of_project(project)
        items += [
            Item(
                record.name,
                "-" if record.kind is None else record.kind,
                best=record.metrics.get("best/student/AP"),
                metric="student/AP" if "best/student/AP" in record.metrics else None,
                worked=record.started,
                tracking=record.uri,
                mlflow_run_id=record.run_id,
                mlflow=record.status,
            )
            for record in records
            if record.run_id not in known
        ]
    return items, notes


def is_unbegun(storage: Storage) -> bool:
    """Whether a folder holds only the experiment of a run: one that was never begun, or removed but for that."""
    visible = [name for name in storage.sizes() if not name.startswith(".")]
    return visible == [EXPERIMENT]


def size_of(storage: Storage) -> int:
    """Bytes of all files in a folder and in those below."""
    sizes = storage.sizes()
    return sum(size_of(storage / name) if size is None else size for name, size in sizes.items())


def in_order(items: Iterable[Item], sort: Sort) -> list[Item]:
    """Sorted by name; or with the best, the largest, or the one that was worked on last first."""
    by_name = sorted(items, key=lambda item: item.name)
    if sort == "name":
        return by_name
    key = {"best": "best", "size": "size", "age": "worked"}[sort]
    return sorted(by_name, key=lambda item: -1.0 if (value := getattr(item, key)) is None else value, reverse=True)


def table(items: Sequence[Item], title: str) -> Table:
    """For people."""
    shown = Table(title=title, title_justify="left")
    for name in ("run", "status", "step", "best", "size", "worked on", "MLflow"):
        shown.add_column(name, justify="right" if name in ("step", "best", "size") else "left", overflow="fold")
    for item in items:
        shown.add_row(
            item.name,
            item.status,
            "-" if item.step is None else str(item.step),
            "-" if item.best is None else f"{item.best:.3f} {item.metric}",
            "-" if item.size is None else in_bytes(item.size),
            "-" if item.worked is None else f"{_age(time.time() - item.worked)} ago",
            item.mlflow or "-",
        )
    return shown


def to_json(items: Iterable[Item]) -> list[dict[str, Any]]:
    """For programs: every field, None where nothing is known."""
    return [asdict(item) for item in items]


def in_bytes(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _look(storage: Storage) -> Item | None:
    """What a folder is, None where it is neither a run nor a search."""
    name = storage.name.rpartition("/")[2]
    try:
        run = runs.read(storage)
    except UserError:
        return Item(name, "damaged", size=size_of(storage))
    if run is not None:
        return _item(run)
    if SEARCH_FILE in storage.sizes():
        return Item(name, "search", size=size_of(storage))
    return Item(name, "unbegun", size=size_of(storage)) if is_unbegun(storage) else None


def _item(run: Run) -> Item:
    from mimiclab import checkpoint

    holder = last_holder(run.storage)
    lives = holder is not None and holder.is_alive()
    newest = checkpoint.latest(run.checkpoints, warn=lambda _: None, deep=False)
    best = newest.meta["best"] if newest is not None else None
    return Item(
        run.name,
        "running" if lives else "stopped" if run.status == "running" else run.status,
        step=None if newest is None else newest.step,
        metric=best and best.get("metric"),
        best=best and best["value"],
        size=size_of(run.storage),
        worked=holder.heartbeat if holder is not None else _last_work(run),
        tracking=run.tracking,
        mlflow_run_id=run.mlflow_run_id,
    )


def _last_work(run: Run) -> float | None:
    ledger = Ledger.from_record(run.ledger)
    times = [session.end or session.start for session in ledger.sessions]
    times += [attempt.last_step or attempt.start for attempt in ledger.attempts]
    return max(times, default=None)


def _ask_mlflow(items: Sequence[Item], stores: Stores) -> tuple[list[Item], list[str]]:
    """The same with what MLflow says of each; a store that cannot be asked hides nothing of what lies here."""
    notes = []
    status: dict[str, str] = {}
    for uri in dict.fromkeys(item.tracking for item in items if item.tracking is not None):
        ids = [item.mlflow_run_id for item in items if item.tracking == uri and item.mlflow_run_id is not None]
        try:
            found = stores.of(uri).by_ids(ids)
        except UserError as error:
            notes.append(str(error))
            continue
        for run_id in ids:
            record = found.get(run_id)
            status[run_id] = "missing" if record is None else "deleted" if record.deleted else record.status
    return [replace(item, mlflow=status.get(item.mlflow_run_id or "")) for item in items], notes


def _age(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
