"""A search in MLflow: a parent run that tells of the search, and a child run for each trial."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mimiclab.tracking.client import connect, explained
from mimiclab.tracking.keys import metric_keys
from mimiclab.tracking.parents import KIND_TAG, NOTE_TAG, PARENT_TAG, Status, end_parent, open_parent
from mimiclab.tracking.runs import FORGOTTEN_TAG, set_tags

__all__ = [
    "OUTCOME_TAG",
    "PARENT_TAG",
    "Search",
    "Status",
    "best_key",
    "end_search",
    "end_trial",
    "newest_search",
    "open_search",
]

OUTCOME_TAG = "trial.outcome"

_ERROR_TAG = "trial.error"
_BEST_TAG = "search.best_trial"


class Search(NamedTuple):
    """A search as MLflow knows it."""

    name: str
    experiment_id: str
    trials: list[str]
    """MLflow's ids of the child runs, in order of their start."""


def open_search(uri: str, project: str, name: str, identity: str, params: Mapping[str, str], note: str) -> str:
    """Find or start the parent run of a search, as `open_parent` does; `note` is its description, in Markdown."""
    return open_parent(uri, project, "search", name, identity, params, note)


def best_key(metric: str, *, is_sum: bool = False) -> str:
    """The key under which a parent run has the history of the best value so far.

    Args:
        metric: Its name, in which that of a class may hold any character.
        is_sum: Whether it is a sum of several, whose slashes would group it by the first of them.
    """
    name = f"best/{metric.replace(' + ', ' plus ') if is_sum else metric}"
    return metric_keys([name], num_groups=1 if is_sum else 3)[name]


@explained
def end_search(
    uri: str, run_id: str, status: Status, best: str | None, metrics: Mapping[str, float], note: str
) -> None:
    """Mark a search as over, and say what it found.

    Args:
        uri: The tracking store.
        run_id: MLflow's id of the parent run.
        status: How it ended.
        best: The best trial's name, if any trial was evaluated.
        metrics: More of the parent, as what was spent; the history of the best value is sent as it grows.
        note: The parent's new description, in Markdown.
    """
    set_tags(uri, run_id, {NOTE_TAG: note} if best is None else {NOTE_TAG: note, _BEST_TAG: best})
    end_parent(uri, run_id, status, metrics)


@explained
def end_trial(
    uri: str, run_id: str, outcome: str, status: Status, values: Mapping[str, Any], error: str | None
) -> None:
    """Mark a trial as over; its searched values become metrics where they are numbers, for charts and filters.

    A second call changes what is said of its end, and logs no value again.
    """
    client = connect(uri)
    before = client.get_run(run_id).data
    set_tags(uri, run_id, {OUTCOME_TAG: outcome} if error is None else {OUTCOME_TAG: outcome, _ERROR_TAG: error})
    if error is None and _ERROR_TAG in before.tags:
        client.delete_tag(run_id, _ERROR_TAG)
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and before.metrics.get(key) != value:
            client.log_metric(run_id, key, value)
    client.set_terminated(run_id, status=status)


def newest_search(uri: str, project: str) -> Search | None:
    """The search of a project that was started last and not discarded, None if there is none."""
    client = connect(uri)
    experiment = client.get_experiment_by_name(project)
    if experiment is None:
        return None
    where, order = [experiment.experiment_id], ["attributes.start_time DESC"]
    query = f"tags.`{KIND_TAG}` = 'search' AND tags.`{FORGOTTEN_TAG}` IS NULL"
    parents = client.search_runs(where, query, order_by=order, max_results=1)
    if not parents:
        return None
    parent = parents[0].info
    trials = client.search_runs(
        where, f"tags.`{PARENT_TAG}` = '{parent.run_id}'", order_by=["attributes.start_time ASC"]
    )
    return Search(parent.run_name, experiment.experiment_id, [trial.info.run_id for trial in trials])
