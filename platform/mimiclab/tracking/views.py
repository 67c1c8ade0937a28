"""What MLflow's page of runs shows of a project, written where that page looks for it.

MLflow keeps a view that somebody shares as a tag of the experiment: its name, and which runs, columns, order and charts
the page is to open with. That format is documented nowhere (it is read from version 3.17), so tests/browser opens what
is written here.
"""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mimiclab.tracking.runs import NOT_COMPARED

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

METRIC = "student/AP"
"""What runs are ordered by."""

# Columns, in this order, of what any run has.
_METRICS = ("student/AP", "student/AP50", "student/AP75", "teacher/AP", "gap/AP", "best/student/AP", "epoch")
_TAGS = ("trial.outcome",)
# Runs of earlier versions have the first ones too.
_NOT_COMPARED = (*NOT_COMPARED, "search")
_MAX_PARAMS = 8
_CHARACTER_PX, _MARGIN_PX = 8, 40
# The page of charts: these, each in a section with so many columns, and then what MLflow makes of every metric.
_CURVES = ("student/AP", "teacher/AP", "train/loss")
_SECTIONS = {"overview": 3, "parameters": 1, "validation": 2, "student": 3, "teacher": 3, "gap": 3}
_MAX_PICTURES = 4


def share(
    client: "MlflowClient",
    experiment_id: str,
    key: str,
    name: str,
    runs: "Sequence[Run]",
    search_filter: str = "",
) -> None:
    """Write a view of a project's runs, unless it is there already.

    Args:
        client: Of the store.
        experiment_id: MLflow's id of the project.
        key: What the view is found by; an earlier one of that key is replaced.
        name: What MLflow calls it.
        runs: What is to be seen well: columns and axes are chosen by what they have and where they differ.
        search_filter: Which runs are listed, in MLflow's language; all by default.

    Raises:
        mlflow.exceptions.MlflowException: The user may not change the experiment, or the store does not answer.
    """
    experiment = client.get_experiment(experiment_id)
    tag = f"mlflow.sharedViewState.{key}"
    pictures = _pictures(client, runs[0].info.run_id) if runs else []
    state = json.dumps({"searchFilter": search_filter, **view_of(runs, pictures)})
    # Written again and again, it has to be the same.
    value = json.dumps({"name": name, "createdAt": experiment.creation_time, "state": state})
    if experiment.tags.get(tag) != value:
        client.set_experiment_tag(experiment_id, tag, value)


def view_of(runs: "Sequence[Run]", pictures: Sequence[str] = ()) -> dict[str, Any]:
    """What the page is to show of these runs and of these pictures of theirs; all else is as MLflow has it."""
    params = differing_params(runs)
    metrics = _known(_METRICS, (run.data.metrics for run in runs))
    tags = _known(_TAGS, (run.data.tags for run in runs))
    groups = {"metrics": metrics, "tags": tags, "params": params}
    charts = _charts(params, _known(_CURVES, (run.data.metrics for run in runs)), pictures)
    # MLflow adds its own charts to sections of these names.
    filled = {chart["metricSectionId"] for chart in charts} | {metric.partition("/")[0] for metric in metrics}
    columns = {f"{kind}.`{name}`": len(name) for kind, names in groups.items() for name in names}
    return {
        "orderByKey": f"metrics.`{METRIC}`",
        "orderByAsc": False,
        "selectedColumns": [*columns, "attributes.`Models`"],
        "columnOrder": [*columns, "attributes.`Models`"],
        "columnWidths": {column: _CHARACTER_PX * length + _MARGIN_PX for column, length in columns.items()},
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": charts,
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": False, "columns": columns}
            for name, columns in _SECTIONS.items()
            if name in filled
        ],
        "isAccordionReordered": True,  # not the alphabet's order
    }


def differing_params(runs: "Sequence[Run]") -> list[str]:
    """The parameters in which runs differ, those first that a search has varied; at most 8."""
    keys = dict.fromkeys(key for run in runs for key in run.data.params if not key.startswith(_NOT_COMPARED))
    found = [key for key in keys if len({run.data.params.get(key) for run in runs}) > 1]
    # A searched number is a metric too.
    found.sort(key=lambda key: not any(key in run.data.metrics for run in runs))
    return found[:_MAX_PARAMS]


def _known(names: Sequence[str], runs: Iterable[dict[str, Any]]) -> list[str]:
    known = {name for run in runs for name in run}
    return [name for name in names if name in known]


def _pictures(client: "MlflowClient", run_id: str) -> list[str]:
    """The keys of a run's validation pictures, as MLflow names their files: images/KEY+step+..., slashes as "~"."""
    try:
        files = client.list_artifacts(run_id, "images")
    except Exception:  # of whatever storage it is: not to be reached from here is no reason to show no view
        return []
    names = (file.path.removeprefix("images/").partition("+")[0] for file in files)
    keys = dict.fromkeys(name.replace("~", "/") for name in names if name.startswith("validation"))
    return list(keys)[:_MAX_PICTURES]


def _charts(params: Sequence[str], curves: Sequence[str], pictures: Sequence[str]) -> list[dict[str, Any]]:
    line = {
        "type": "LINE",
        "metricSectionId": "overview",
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "selectedXAxisMetricKey": "",
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
    parallel = {"type": "PARALLEL", "metricSectionId": "parameters", "selectedMetrics": [METRIC], "showAllRuns": False}
    # Above each picture MLflow would write all of the run's parameters.
    picture = {"type": "IMAGE", "metricSectionId": "validation", "step": 0, "showRunParams": False}
    charts = [
        *({**line, "metricKey": metric} for metric in curves),
        *([{**parallel, "selectedParams": list(params)}] if params else []),
        *({**picture, "imageKeys": [key]} for key in pictures),
    ]
    common = {"runsCountToCompare": 20, "deleted": False, "isGenerated": False}
    return [{"uuid": f"chart-{number}", **common, **chart} for number, chart in enumerate(charts)]
