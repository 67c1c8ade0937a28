"""What names on a command line stand for: runs in folders, runs that only MLflow has, and groups of either."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from mimiclab import runs
from mimiclab.errors import UserError
from mimiclab.runs import Run
from mimiclab.storage import MissingError, Storage
from mimiclab.tracking.address import sqlite_path

if TYPE_CHECKING:
    from mimiclab.tracking.records import Record, Store

DEFAULT_TRACKING = "sqlite:///mlflow.db"
"""Where runs without a folder are looked for; an experiment's default too."""

SEARCH_FILE = "search.yaml"
"""What makes a folder that of a search."""

_MEMBER = re.compile(r"(?P<group>.+?)-(trial-\d{2,}(?P<repeat>-seed-\d+)?|seed-\d+)")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_ID, _WHOLE_ID = re.compile(r"[0-9a-f]{6,32}"), re.compile(r"[0-9a-f]{32}")
# Files are asked for one by one; a bucket answers many at a time.
_THREADS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Found:
    """A run that somebody named."""

    name: str
    run: Run | None
    """As its folder describes it, if it has one."""
    record: Record | None = None
    """As MLflow has it, if it does."""
    group: str | None = None
    """The search or the group of seeds whose name stood for it."""

    @property
    def is_repeat(self) -> bool:
        """Whether the search whose name stood for it repeats a trial with it."""
        matched = _MEMBER.fullmatch(self.name)
        return matched is not None and matched["group"] == self.group and matched["repeat"] is not None


@dataclass(frozen=True)
class Meant:
    """What a reference stands for; nothing of it where it is unknown."""

    runs: tuple[Found, ...] = ()
    search: Storage | None = None
    """The folder of the search that it names."""
    parent: Record | None = None
    """The search or the group of seeds that MLflow has by that name, where MLflow had to be asked."""

    @property
    def is_known(self) -> bool:
        """Whether there is anything."""
        return bool(self.runs) or self.search is not None or self.parent is not None


class Stores:
    """Tracking stores, each opened when it is first asked for.

    Args:
        uri: takes the place of the address that a run was tracked at; None leaves every run its own.
    """

    def __init__(self, uri: str | None) -> None:
        self.uri = uri
        self._open: dict[str, Store] = {}

    def of(self, uri: str) -> Store:
        """The store of runs that were tracked at this address.

        Raises:
            UserError: it cannot be read.
        """
        from mimiclab.tracking.records import Store

        uri = self.uri or uri
        if uri not in self._open:
            self._open[uri] = Store(uri)
        return self._open[uri]


def in_threads(action: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What an action gives for each item, in order; many at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(action, items))


def place_of_runs(storage: str) -> Storage:
    """The folder that `--storage` names."""
    return Storage(storage if "://" in storage else Path(storage).absolute())


def find(references: Sequence[str], storage: str, stores: Stores) -> dict[str, Meant]:
    """What references stand for; groups with their runs in order of name.

    A folder comes before what MLflow alone has; MLflow is asked for what has no folder, all at once.

    Args:
        references: names of runs, of searches and of groups of seeds, MLflow ids or their beginnings, folders, URIs.
        storage: folder, or URI, that holds runs.
        stores: where MLflow is asked.

    Raises:
        UserError: a reference means nothing, or two things, or what was deleted, or a place cannot be read.
    """
    meant = in_folders(references, storage)
    unknown = [reference for reference, found in meant.items() if not found.is_known]
    if not unknown:
        return meant
    file = sqlite_path(DEFAULT_TRACKING)
    if stores.uri is None and file is not None and not file.exists():
        raise UserError(
            f"run {unknown[0]}: there is no such name, id or folder; looked in {place_of_runs(storage).name}, and "
            f"MLflow was not asked: there is no {file}, and --tracking names no other store"
        )
    return meant | in_mlflow(unknown, stores.of(DEFAULT_TRACKING), storage)


def in_folders(references: Sequence[str], storage: str) -> dict[str, Meant]:
    """The runs with folders that each reference stands for.

    Raises:
        UserError: a name means two things, a given folder holds no run, or a place cannot be read.
    """
    place = place_of_runs(storage)
    names = sorted(_folders(place))
    named = [each for each in dict.fromkeys(references) if each in names]
    known = dict(zip(named, in_threads(_in_folder, [place / name for name in named]), strict=True))
    answer: dict[str, Meant] = {}
    for reference in references:
        if "/" in reference:
            answer[reference] = _in_folder(folder := place_of_runs(reference))
            if not answer[reference].is_known:
                raise UserError(f"run {folder.name}: it holds no run, expected the folder of a run or a search")
            continue
        own = known.get(reference, Meant())
        if not own.is_known:
            members = _members(place, names, reference)
            own = Meant(members) if members else _in_folder(Storage(Path(reference).absolute()))
        elif own.search is None and (members := _members(place, names, reference)):
            raise UserError(
                f"run {reference}: it names a run, {place.where(reference)}, and a group of {len(members)} "
                f"({_some([each.name for each in members])}); expected the run's folder, or the names of those in the "
                "group"
            )
        answer[reference] = own
    ids = [each for each, meant in answer.items() if not meant.is_known and _ID.fullmatch(each)]
    every = in_threads(runs.read, [place / name for name in names]) if ids else []
    for reference in ids:
        matching = [run for run in every if run is not None and run.mlflow_run_id.startswith(reference)]
        if len(matching) > 1:
            raise UserError(
                f"run {reference}: several MLflow ids begin so ({_some([run.name for run in matching])}); expected "
                "a longer one, or a name"
            )
        answer[reference] = Meant(tuple(Found(run.name, run) for run in matching))
    return answer


def in_mlflow(references: Sequence[str], store: Store, storage: str) -> dict[str, Meant]:
    """The runs that MLflow has under each of these names, ids or beginnings of ids; a group's name stands for its runs.

    Args:
        references: what to look for.
        store: where to look.
        storage: where there is no such folder, for messages.

    Raises:
        UserError: there is no such run, there are several, or it was deleted.
    """
    usable = [reference for reference in references if _NAME.fullmatch(reference)]
    named = store.by_names(usable)
    whole = store.by_ids(each for each in usable if _WHOLE_ID.fullmatch(each))
    answer: dict[str, Meant] = {}
    for reference in references:
        matching = [each for each in named if each.name == reference and not each.forgotten]
        if not matching and reference in whole:
            matching = [whole[reference]]
        elif not matching and _ID.fullmatch(reference):
            matching = store.by_id_prefix(reference)
        record = _only(reference, matching, store, storage)
        if record.kind is None:
            answer[reference] = Meant((Found(record.name, None, record),))
        else:
            children = store.children(record.run_id)
            answer[reference] = Meant(
                tuple(Found(each.name, None, each, record.name) for each in children), parent=record
            )
    return answer


def distinct(meant: Iterable[Meant]) -> list[Found]:
    """The runs that were meant, each once, where it was named first."""
    answer: dict[str, Found] = {}
    for one in meant:
        for each in one.runs:
            answer.setdefault(_id(each), each)
    return list(answer.values())


def with_records(found: Sequence[Found], stores: Stores) -> list[Found]:
    """The same with what MLflow has of each, None where it has nothing; a call for hundreds of runs.

    Raises:
        UserError: a store cannot be read.
    """
    wanted: dict[str, list[str]] = {}
    for each in found:
        if each.run is not None and each.record is None:
            wanted.setdefault(each.run.tracking, []).append(each.run.mlflow_run_id)
    known = {uri: stores.of(uri).by_ids(ids) for uri, ids in wanted.items()}
    return [
        each
        if each.run is None or each.record is not None
        else replace(each, record=known[each.run.tracking].get(each.run.mlflow_run_id))
        for each in found
    ]


def group_of(name: str) -> str | None:
    """The search or the group of seeds that a run's name says it belongs to."""
    matched = _MEMBER.fullmatch(name)
    return matched["group"] if matched else None


def _id(found: Found) -> str:
    if found.run is not None:
        return found.run.mlflow_run_id
    assert found.record is not None
    return found.record.run_id


def _only(reference: str, matching: Sequence[Record], store: Store, storage: str) -> Record:
    active = [each for each in matching if not each.deleted]
    if len(active) > 1:
        each = ", ".join(f"{record.run_id} of {record.project}, {_day(record.started)}" for record in active)
        raise UserError(f"run {reference}: it means {len(active)} runs of {store.uri} ({each}); expected an id")
    if active:
        return active[0]
    if matching:
        run_id = matching[0].run_id
        raise UserError(
            f"run {reference}: it was deleted in MLflow at {store.uri} (id {run_id}); expected one that is there, or "
            f"this one restored: mlflow runs restore --run-id {run_id}"
        )
    raise UserError(
        f"run {reference}: there is no such name, id or folder; looked in {place_of_runs(storage).name} and in MLflow "
        f"at {store.uri}"
    )


def _in_folder(storage: Storage) -> Meant:
    """What a folder holds: a run, or a search whose trials lie beside it."""
    run = runs.read(storage)
    if run is not None:
        return Meant((Found(run.name, run),))
    try:
        if SEARCH_FILE not in storage.sizes():
            return Meant()
    except MissingError:  # a file
        return Meant()
    place, name = around(storage)
    return Meant(_members(place, sorted(_folders(place)), name), search=storage)


def _members(place: Storage, names: Sequence[str], group: str) -> tuple[Found, ...]:
    """The trials, with what repeats them, or the seeds of a group."""
    own = [name for name in names if group_of(name) == group]
    read = in_threads(runs.read, [place / name for name in own])
    return tuple(Found(run.name, run, group=group) for run in read if run is not None)


def around(storage: Storage) -> tuple[Storage, str]:
    """The folder around a folder, and the name of that in it."""
    if storage.local is not None:
        return Storage(storage.local.parent), storage.local.name
    parts = urlsplit(storage.uri)
    parent, _, name = parts.path.rstrip("/").rpartition("/")
    return Storage(urlunsplit(parts._replace(path=parent))), unquote(name)


def _folders(place: Storage) -> list[str]:
    try:
        return place.folders()
    except MissingError:  # a file
        return []


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="minutes")
