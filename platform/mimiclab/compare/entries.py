"""The runs of a comparison: what each was, and how it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mimiclab.errors import UserError
from mimiclab.references import Found, Stores, distinct, find, in_threads, with_records
from mimiclab.runs import Run

LEADING = "student/AP"

# Which run it is, where it went, and what a search drew from: no parameters of what was trained.
_NOT_COMPARED = ("name", "where", "search")
_EVALUATED = ("student", "student_topk", "teacher", "gap")


@dataclass(frozen=True)
class Entry:
    """A run of the comparison."""

    label: str
    """Its name; with the beginning of its id where others have the same."""
    run: Run | None
    """As its folder describes it, None where MLflow alone has it."""
    params: Mapping[str, str]
    """The resolved experiment under dotted keys, as MLflow has it."""
    step: int | None
    """Of the weights that were evaluated; None where MLflow alone has the metrics."""
    metrics: Mapping[str, float]
    """Such as `student/AP` and `student/AP/<class>`; empty where it was never evaluated."""


@dataclass(frozen=True)
class Entries:
    """Two runs or more, the first being what the others are compared with."""

    runs: tuple[Entry, ...]
    best: bool
    """Whether metrics are those of each run's best evaluation, which only folders have; else those of the last."""


def find_entries(references: Sequence[str], *, storage: str, tracking: str | None) -> Entries:
    """Find runs with what MLflow and their folders know of them, in few calls.

    Args:
        references: names, MLflow ids, folders and URIs of runs; a search stands for its trials and a group of seeds for
            its runs, the best first. What repeats a trial with other seeds has to be named itself.
        storage: folder, or URI, that holds runs.
        tracking: MLflow's address; None for that which each run was tracked at, and the default one for others.

    Raises:
        UserError: a reference names no run or several, MLflow cannot be asked or lacks a run, or there are not two.
    """
    stores = Stores(tracking)
    meant = [
        replace(each, runs=tuple(run for run in each.runs if not run.is_repeat))
        for each in find(references, storage, stores).values()
    ]
    found = with_records(distinct(meant), stores)
    for each in found:
        _refuse_lost(each, tracking)
    if len(found) < 2:
        names = ", ".join(each.name for each in found) or "none"
        raise UserError(f"compare: found {len(found)} run ({names}), expected two or more")
    best = in_threads(_best, found)
    known = all(each is not None for each in best)
    num = Counter(each.name for each in found)
    entries = []
    for each, at_best in zip(found, best, strict=True):
        record = each.record
        assert record is not None  # none is lost
        step, metrics = at_best if known and at_best else (None, _of_evaluations(record.metrics))
        label = each.name if num[each.name] == 1 else f"{each.name} ({record.run_id[:8]})"
        entries.append((each.group, Entry(label, each.run, _compared(record.params), step, metrics)))
    return Entries(_best_first(entries), known)


def _refuse_lost(found: Found, tracking: str | None) -> None:
    run, record = found.run, found.record
    if record is None:
        assert run is not None
        raise UserError(
            f"run {run.name}: MLflow at {tracking or run.tracking} does not have it (id {run.mlflow_run_id}); expected "
            "the store that it was tracked at, which --tracking names"
        )
    if record.deleted:
        raise UserError(
            f"run {found.name}: it was deleted in MLflow at {record.uri} (id {record.run_id}); expected one that is "
            f"there, or this one restored: mlflow runs restore --run-id {record.run_id}"
        )


def _best(found: Found) -> tuple[int, dict[str, float]] | None:
    """Step and metrics of the best evaluation, as the run's folder has them."""
    if found.run is None:
        return None
    try:
        best = found.run.best()
    except UserError:  # no checkpoint yet, or none that is sound
        return None
    return (best.step, best.meta["metrics"]) if best.meta.get("metrics") else None


def _of_evaluations(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.split("/")[0] in _EVALUATED}


def _compared(params: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if key.split(".")[0] not in _NOT_COMPARED}


def _best_first(entries: Sequence[tuple[str | None, Entry]]) -> tuple[Entry, ...]:
    """The runs of each group sorted among themselves, where its first one was."""
    places: dict[str, int] = {}
    for position, (group, _) in enumerate(entries):
        places.setdefault(group or "", position)
    ordered = sorted(
        enumerate(entries),
        key=lambda item: (places[item[1][0]], -item[1][1].metrics.get(LEADING, -1.0)) if item[1][0] else (item[0], 0.0),
    )
    return tuple(entry for _, (_, entry) in ordered)
