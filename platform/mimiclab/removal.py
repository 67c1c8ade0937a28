"""Removing runs: what they hold on disk and in MLflow.

MLflow's record goes first, since the folder says where that is; then the folder's content, and what makes the folder
that of a run or a search last of all. So a removal that was interrupted is gone on with by the same command.

A run that a driver trains is refused. There is no lock against one that starts at the very moment of removal: to write
one may be what a full disk no longer allows.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mimiclab.errors import UserError
from mimiclab.experiment import load_experiment
from mimiclab.inventory import in_bytes, is_unbegun, size_of
from mimiclab.lease import last_holder
from mimiclab.references import (
    SEARCH_FILE,
    Found,
    Meant,
    Stores,
    around,
    distinct,
    find,
    group_of,
    in_threads,
    place_of_runs,
    with_records,
)
from mimiclab.runs import RUN
from mimiclab.storage import Storage
from mimiclab.tracking.address import sqlite_path

if TYPE_CHECKING:
    from mimiclab.tracking.records import Record

# These go last: by them a run and a search are found.
_MARKS = (RUN, SEARCH_FILE)
# So many ids fit a line that somebody is to copy.
_IDS_SHOWN = 5


@dataclass(frozen=True)
class Target:
    """Something to remove."""

    name: str
    storage: Storage | None = None
    """Its folder, if it has one."""
    record: Record | None = None
    """What MLflow has of it, if that goes too."""
    size: int = 0
    """Bytes in the folder."""

    def __str__(self) -> str:
        parts = [self.name]
        if self.storage is not None:
            parts.append(f"{in_bytes(self.size)} in {self.storage.name}")
        if self.record is not None:
            parts.append(f"MLflow's run {self.record.run_id}")
        return ", ".join(parts)


def targets(
    references: Sequence[str], storage: str, stores: Stores, *, files_only: bool
) -> tuple[list[Target], list[str]]:
    """What references stand for, in the order in which it is to go: groups after their runs.

    MLflow keeps a run that somebody has registered a model of: its collector would take the model's metrics, or files.

    Args:
        references: names of runs, of searches and of groups of seeds, MLflow ids, folders, URIs.
        storage: folder, or URI, that holds runs.
        stores: where MLflow is asked.
        files_only: leave MLflow alone.

    Returns:
        What is to go, and a line for each record that stays for the sake of a registered model.

    Raises:
        UserError: a reference means nothing, or several things, or what a driver is at work on; or a place, or MLflow,
            cannot be read.
    """
    place = place_of_runs(storage)
    unbegun = [each for each in references if "/" not in each and is_unbegun(place / each)]
    meant = find([each for each in references if each not in unbegun], storage, stores)
    found = distinct(meant.values())
    if not files_only:
        found = with_records(found, stores)
    answer = [
        Target(
            each.name,
            None if each.run is None else each.run.storage,
            None if files_only or each.record is None or each.record.deleted else each.record,
        )
        for each in found
    ]
    answer += [Target(each, place / each) for each in unbegun]
    if not files_only:
        answer += _groups_in_mlflow(meant.values(), found, stores)
    answer += [Target(each.search.name.rpartition("/")[2], each.search) for each in meant.values() if each.search]
    for target in answer:
        refuse_at_work(target)
    answer, stays = _without_registered(answer, stores)
    sizes = in_threads(lambda target: size_of(target.storage) if target.storage is not None else 0, answer)
    answer = [replace(target, size=size) for target, size in zip(answer, sizes, strict=True)]
    return [target for target in answer if target.storage is not None or target.record is not None], stays


def remove(wanted: Sequence[Target], stores: Stores, say: Callable[[str], object]) -> None:
    """Remove targets in their order, and say how MLflow frees what it keeps of them.

    Raises:
        UserError: one of them cannot be removed, or a driver has begun to work on it.
    """
    for target in wanted:
        refuse_at_work(target)
        if target.record is not None:
            stores.of(target.record.uri).delete(target.record.run_id)
        if target.storage is not None:
            _remove_folder(target.storage)
        say(f"removed {target}")
    for uri, run_ids in _by_store(wanted).items():
        say(_how_to_collect(uri, run_ids))


def refuse_at_work(target: Target) -> None:
    """Make sure that no driver is at work on a target, or on the search that it is a trial of.

    Raises:
        UserError: one is.
    """
    if target.storage is None:
        return
    place, name = around(target.storage)
    group = group_of(name)
    for folder in (target.storage, *([place / group] if group else [])):
        holder = last_holder(folder)
        if holder is not None and holder.is_alive():
            raise UserError(f"run {target.name}: {holder} is at work in {folder.name}; expected it to be stopped first")


def _without_registered(wanted: Sequence[Target], stores: Stores) -> tuple[list[Target], list[str]]:
    """The same without the records of runs that registered models are of, and of their groups; and why each stays."""
    why: dict[str, str] = {}
    for uri, run_ids in _by_store(wanted).items():
        for run_id, versions in stores.of(uri).registered(run_ids).items():
            why[run_id] = f"{', '.join(versions)} was registered from it"
    for target in wanted:
        if target.record is not None and target.record.run_id in why and target.record.parent is not None:
            why.setdefault(target.record.parent, f"{target.name} does")
    answer, stays = [], []
    for target in wanted:
        if target.record is not None and target.record.run_id in why:
            stays.append(f"{target.name} stays in MLflow: {why[target.record.run_id]}")
            target = replace(target, record=None)
        answer.append(target)
    return answer, stays


def _by_store(wanted: Iterable[Target]) -> dict[str, list[str]]:
    """MLflow's ids of what goes from each store."""
    answer: dict[str, list[str]] = {}
    for target in wanted:
        if target.record is not None:
            answer.setdefault(target.record.uri, []).append(target.record.run_id)
    return answer


def _groups_in_mlflow(meant: Iterable[Meant], found: Sequence[Found], stores: Stores) -> list[Target]:
    """The records of the groups that were named, each after those of its runs that have no folder."""
    groups: dict[str, Record] = {}
    # A group's runs say which it is.
    members = {each.record.parent: each for each in found if each.group and each.record and each.record.parent}
    for parent, each in members.items():
        assert each.record is not None
        record = stores.of(each.record.uri).by_ids([parent]).get(parent)
        if record is not None and record.name == each.group:
            groups[parent] = record
    for one in meant:
        if one.parent is not None:
            groups[one.parent.run_id] = one.parent
        elif one.search is not None and not one.runs:  # removed in part before, or all of its trials failed
            groups |= _searches(one.search, stores)
    known = {each.record.run_id for each in found if each.record is not None}
    answer = []
    for run_id, record in groups.items():
        if not record.deleted:
            left = [child for child in stores.of(record.uri).children(run_id) if child.run_id not in known]
            answer += [Target(each.name, record=each) for each in (*left, record)]
    return answer


def _searches(folder: Storage, stores: Stores) -> dict[str, Record]:
    """MLflow's records of the search that a folder was made for."""
    with tempfile.TemporaryDirectory(prefix="mimiclab-") as place:
        file = Path(place) / SEARCH_FILE
        file.write_bytes(folder.read(SEARCH_FILE))
        experiment = load_experiment(file).experiment
    records = stores.of(experiment.where.tracking).by_names([experiment.name])
    return {
        each.run_id: each
        for each in records
        if each.kind == "search" and each.project == experiment.where.project and not each.forgotten
    }


def _remove_folder(storage: Storage) -> None:
    """Remove a folder; as long as something of it can be seen, it is still a run or a search."""
    for name, size in storage.sizes().items():
        if not name.startswith(".") and name not in _MARKS:
            (storage.delete_folder if size is None else storage.delete)(name)
    place, name = around(storage)
    place.delete_folder(name)


def _how_to_collect(uri: str, run_ids: Sequence[str]) -> str:
    which = f" --run-ids {','.join(run_ids)}" if len(run_ids) <= _IDS_SHOWN else ""
    runs = f"{len(run_ids)} run{'s' if len(run_ids) > 1 else ''}"
    place, store = ("", shlex.quote(uri)) if sqlite_path(uri) is not None else (", on the server's machine", "STORE")
    return (
        f"MLflow at {uri} marks {runs} as deleted; to free what it keeps{place}: "
        f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow gc --backend-store-uri {store}{which}"
    )
