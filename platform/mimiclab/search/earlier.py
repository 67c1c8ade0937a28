"""What an earlier driver, or an earlier search of the same name, has left: taken up, refused, or removed."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from mimiclab import runs
from mimiclab.errors import UserError
from mimiclab.experiment import differences, flatten, identity
from mimiclab.lease import STALE_S, last_holder
from mimiclab.schema import Experiment
from mimiclab.search.budget import run_of
from mimiclab.search.course import plan_event
from mimiclab.search.record import RECORD, Event, Record, check
from mimiclab.search.report import REPORT
from mimiclab.search.story import loaded_of, resolved_of
from mimiclab.search.trials import Plan, Trial, with_repeats
from mimiclab.storage import Storage
from mimiclab.tracking import runs as tracking

SEARCH, BEST, TUNE = "search.yaml", "best.yaml", "tune"
"""Files of a search's folder besides its record, and Tune's own folder in it."""

# Processes of a driver that was killed end within seconds; of those on other machines that is known later.
_PATIENCE_S = STALE_S + 30.0
_POLL_S = 0.5
# How much is tried, and how fast: nothing of what was found so far depends on these.
_FREE = {f"search.{key}" for key in ("trials", "max_concurrent", "budget", "workers_per_trial", "seeds_per_trial")}


def search_identity(experiment: Experiment) -> str:
    """Hash what a search finds: 12 hex digits over what a run is, its epochs, and the search less its size."""
    text = json.dumps([identity(experiment), _search_leaves(experiment)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_record(plan: Plan, trials: Sequence[Trial], folder: Storage) -> Record:
    """The record of the search in a folder, empty where there is none; this search may go on with it.

    Raises:
        UserError: the folder, or that of a trial, holds something else, or a search that is not this one, or a record
            from which its decisions do not follow, or cannot be read.
    """
    root = runs.root_of(plan.experiment)
    try:
        found, folders = folder.sizes(), root.folders()
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error
    record = Record(folder)
    name = f"search {plan.experiment.name}"
    strange = []
    if record.events:
        _refuse_changes(name, record.events, plan, trials)
        check(record, name)
    elif SEARCH in found:  # of a version that kept no record
        strange = [folder.where(SEARCH)]
    elif any(not file.startswith(".") and file != RECORD for file in found):
        raise UserError(f"{name}: {folder.name} holds something that is no search; expected another name")
    begun = {run_of(event) for event in record.events if "trial" in event}
    others = [run.experiment.name for run in with_repeats(trials) if run.name not in begun]
    strange += [root.where(each) for each in others if each in folders]
    if strange:
        raise UserError(
            f"{name}: it was run before, {strange[0]} exists; expected another name, or --fresh, which removes its "
            "trials and starts anew"
        )
    return record


def wait_for_drivers(trials: Sequence[Trial], console: Console) -> None:
    """Wait until the processes that train these trials for a driver that died have ended as well.

    Raises:
        UserError: one of them does not end.
    """
    deadline = time.monotonic() + _PATIENCE_S
    said = False
    for trial in with_repeats(trials):
        storage = runs.storage_of(trial.experiment)
        while (holder := last_holder(storage)) is not None and holder.is_alive():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{trial.name}: {holder} still trains it, {_PATIENCE_S:.0f} s after this search was begun again; "
                    "expected no other driver: stop that one first"
                )
            if not said:
                console.print(f"{trial.name}: waiting for {holder} to end, whose search was killed", highlight=False)
                said = True
            time.sleep(_POLL_S)


def remove(experiment: Experiment, trials: Sequence[Trial], folder: Storage, uri: str) -> None:
    """Remove an earlier search of this name with its trials; what MLflow has of it stays there as history."""
    root, project = runs.root_of(experiment), experiment.where.project
    own = re.compile(re.escape(experiment.name) + r"-trial-\d{2,}(-seed-\d+)?")
    known = {run.experiment.name: identity(run.experiment) for run in with_repeats(trials)}
    try:
        folders = list(filter(own.fullmatch, root.folders()))
        for name in folders:
            # The earlier search may have had more trials, or other values.
            if (run := runs.read(root / name)) is not None:
                known[name] = run.identity
        # In this order: what is interrupted here is neither found again in MLflow nor gone on with.
        tracking.forget_run(uri, project, experiment.name, search_identity(experiment))
        for name, each in known.items():
            tracking.forget_run(uri, project, name, each)
        folder.delete(RECORD)
        for name in folders:
            root.delete_folder(name)
        folder.delete(BEST)
        folder.delete_folder(TUNE)
        folder.delete_folder(REPORT)
        folder.delete(SEARCH)
    except UserError as error:
        raise UserError(f"where.storage: {error}") from error


def _refuse_changes(name: str, events: Sequence[Event], plan: Plan, trials: Sequence[Trial]) -> None:
    last = next(event for event in reversed(events) if event["event"] == "search")
    before = loaded_of(events).experiment
    old, new = _search_leaves(before), _search_leaves(plan.experiment)
    changed = differences(resolved_of(events), plan.experiment) + _changes(old, new)
    if not changed:  # else the values follow from what was changed
        assert before.search is not None
        _refuse_fewer(name, "trials", len(last["trials"]), len(trials))
        _refuse_fewer(name, "seeds_per_trial", before.search.seeds_per_trial, plan.config.seeds_per_trial)
        now = json.loads(json.dumps(plan_event(plan, trials)["trials"]))
        if plan.config.algorithm != "optuna":  # its values follow from the record, and are taken from there
            for trial, values in last["trials"].items():
                changed += [f"{trial}: {text}" for text in _changes(values, now[trial])]
    if changed:
        raise UserError(
            f"{name}: it was started from another experiment. What changed:\n  "
            + "\n  ".join(changed)
            + "\nGive the new one another name, or start anew with --fresh, which removes the old one and its trials."
        )


def _refuse_fewer(name: str, key: str, before: int, now: int) -> None:
    if now < before:
        raise UserError(
            f"{name}: found {now} {key} where {before} were planned before; expected as many or more (search.{key}), "
            "or another name, or --fresh"
        )


def _search_leaves(experiment: Experiment) -> dict[str, Any]:
    leaves = {key: value for key, value in flatten(experiment).items() if key.startswith(("search.", "optim.epochs"))}
    # What the schema gained later counts where it is used.
    usual = {("search.unit", "epochs")}
    return {key: value for key, value in leaves.items() if key not in _FREE and (key, str(value)) not in usual}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    def show(leaves: Mapping[str, Any], key: str) -> str:
        return json.dumps(leaves[key], ensure_ascii=False) if key in leaves else "nothing"

    pairs = [(key, show(old, key), show(new, key)) for key in {**old, **new}]
    return [f"{key}: {before} -> {now}" for key, before, now in pairs if before != now]
