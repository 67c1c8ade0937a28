"""The addresses of MLflow's pages, as version 3.17 has them."""

import json
from collections.abc import Sequence
from urllib.parse import quote, urlencode

# Unless told, the side bar opens in its mode for language models.
_MODE = {"workflowType": "machine_learning"}


def runs_page(base_url: str, experiment_id: str, search_filter: str) -> str:
    """The table of those of a project's runs that MLflow finds by a filter, the best student first."""
    # Sorted by a metric, the trials of a search stand beside the other runs and do not collapse under their parent.
    best_first = {"orderByKey": "metrics.`student/AP`", "orderByAsc": "false"}
    return _page(base_url, f"experiments/{experiment_id}/runs", searchFilter=search_filter, **best_first)


def shared_view_page(base_url: str, experiment_id: str, key: str) -> str:
    """The table of a project's runs as a view that is kept in the project's tags shows it."""
    return _page(base_url, f"experiments/{experiment_id}/runs", viewStateShareKey=key)


def charts_of(table: str) -> str:
    """The charts of the runs that a page with a table of runs lists."""
    return f"{table}&compareRunsMode=CHART"


def run_page(base_url: str, experiment_id: str, run_id: str) -> str:
    """The page of one run."""
    return _page(base_url, f"experiments/{experiment_id}/runs/{run_id}")


def compare_page(base_url: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The comparison of several runs of a project."""
    runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), [experiment_id]))
    return f"{base_url.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"


def _page(base_url: str, route: str, **query: str) -> str:
    return f"{base_url.rstrip('/')}/#/{route}?{urlencode({**query, **_MODE}, quote_via=quote, safe='')}"
