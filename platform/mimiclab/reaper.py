"""Says of runs whose driver died that they ended: a dead driver cannot, and leaves them running for ever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from mimiclab.errors import UserError
from mimiclab.lease import Holder, last_holder

if TYPE_CHECKING:
    from rich.console import Console

    from mimiclab.runs import Run
    from mimiclab.schema import Experiment

ENDED_TAG = "mimiclab.ended"
"""Of a corrected run: how its end became known."""


def reap_beside(experiment: Experiment, console: Console) -> None:
    """`reap` of all runs in the folder that an experiment's run is in."""
    from mimiclab import runs

    place = runs.root_of(experiment)
    found = []
    for name in place.folders():
        with contextlib.suppress(UserError):  # of one that cannot be read its own command says so
            found.append(runs.read(place / name))
    reap(
        (run for run in found if run is not None),
        warn=lambda text: console.print(f"warning: {text}", highlight=False, markup=False),
    )


def reap(runs: Iterable[Run], warn: Callable[[str], None]) -> list[Run]:
    """Correct those runs that count as running while no driver has their lease.

    Each becomes killed, in MLflow with the time at which its driver was last heard of. MLflow is asked about such runs
    only. Where it does not answer, the run stays as it is for the next command to correct.

    No lease is taken for it: a driver that starts on the run meanwhile must not be refused. One that does so between
    the last look at its lease and the correction has its run shown as killed until it ends it.

    Args:
        runs: as their folders describe them.
        warn: gets a line for each run that could not be looked at, and for the first one of a silent tracking server.

    Returns:
        The corrected runs.
    """
    from mimiclab.runs import read

    corrected = []
    silent: set[str] = set()
    for run in runs:
        if run.status != "running" or run.tracking in silent:
            continue
        try:
            holder = last_holder(run.storage)
            if holder is not None and holder.is_alive():
                continue
            # Looked at again: its driver may have ended it since, and given the lease back.
            now = read(run.storage)
            if now is not None and now.status == "running" and _end(now, holder):
                corrected.append(now.with_status("killed"))
        except Exception as error:  # of the storage, or of MLflow, HTTP or SQL: none may stop the command
            if not isinstance(error, UserError):
                silent.add(run.tracking)
            warn(f"run {run.name}: its driver died, which could not be recorded at {run.tracking}: {error}")
    return corrected


def _end(run: Run, holder: Holder | None) -> bool:
    """Tell MLflow that a run ended; False if a driver has taken it up by now."""
    from mimiclab.tracking import runs as tracking

    recorded = tracking.unfinished_since(run.tracking, run.mlflow_run_id)
    if last_holder(run.storage) != holder:
        return False
    if recorded is not None:
        # Runs of earlier versions have no lease.
        who, heard = ("its driver", recorded) if holder is None else (str(holder), holder.heartbeat)
        tracking.set_tags(run.tracking, run.mlflow_run_id, {ENDED_TAG: f"{who} died; found out by a later command"})
        tracking.end_run(run.tracking, run.mlflow_run_id, "KILLED", heard)
    return True
