"""Runs as MLflow has them, many with each call."""

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mimiclab.errors import UserError
from mimiclab.tracking.address import absolute_uri, check_tracking, sqlite_path
from mimiclab.tracking.client import connect, refusals_explained
from mimiclab.tracking.parents import KIND_TAG, PARENT_TAG
from mimiclab.tracking.runs import FORGOTTEN_TAG

if TYPE_CHECKING:
    from mlflow.entities import Run

_PAGE = 1000
# A query of a server is an address, which may not be of any length.
_IDS_PER_CALL = 200
_NAMES_APART = 5


class Record(NamedTuple):
    """A run in MLflow; its metrics are the last value of each."""

    uri: str
    """Of the store, absolute."""
    run_id: str
    name: str
    project: str
    """The MLflow experiment that holds it."""
    status: str
    deleted: bool
    """Marked so: it, or its project; MLflow's collector has not been there yet."""
    forgotten: bool
    """A newer run was started in its place."""
    kind: str | None
    """"search" or "seeds": it stands for other runs."""
    parent: str | None
    """MLflow's id of the run that it is shown under."""
    started: float
    """Seconds since 1970."""
    params: dict[str, str]
    metrics: dict[str, float]


class Store:
    """What is asked of one tracking store, in few calls.

    Args:
        uri: its address.

    Raises:
        UserError: there is no such store, or no server that answers.
    """

    def __init__(self, uri: str) -> None:
        check_tracking(uri)
        path = sqlite_path(uri)
        if path is not None and not path.exists():  # it would be made
            raise UserError(f"where.tracking: {uri}: there is no file {path}; expected one that holds runs")
        self.uri = absolute_uri(uri)
        with refusals_explained(self.uri):
            from mlflow.entities import ViewType

            self._client = connect(uri)
            found, token = [], None
            while token != "":
                page = self._client.search_experiments(ViewType.ALL, max_results=_PAGE, page_token=token)
                found += page
                token = page.token or ""
            self._projects = {each.experiment_id: (each.name, each.lifecycle_stage == "deleted") for each in found}

    def by_ids(self, run_ids: Iterable[str]) -> dict[str, Record]:
        """Those of the runs that the store has, by id; deleted ones too."""
        found = [record for ids in _lists(run_ids) for record in self._search(f"attributes.run_id IN ({ids})")]
        return {record.run_id: record for record in found}

    def by_id_prefix(self, prefix: str) -> list[Record]:
        """The runs whose ids begin so; deleted ones too."""
        return self._search(f"attributes.run_id LIKE '{prefix}%'")

    def by_names(self, names: Sequence[str]) -> list[Record]:
        """The runs of these names, in any project; deleted and forgotten ones too.

        The names are of letters, digits, ".", "_" and "-", as those of runs are.
        """
        # Queries know no list of names: each has a call, or many share one for the beginning that they share.
        queries = [f"attributes.run_name = '{name}'" for name in dict.fromkeys(names)]
        if len(queries) > _NAMES_APART:
            queries = [f"attributes.run_name LIKE '{posixpath.commonprefix(names)}%'"]
        wanted = set(names)
        return [record for query in queries for record in self._search(query) if record.name in wanted]

    def children(self, run_id: str) -> list[Record]:
        """The runs that are shown under a run, in order of their start, without deleted and forgotten ones."""
        found = self._search(f"tags.`{PARENT_TAG}` = '{run_id}'")
        return [each for each in found if not (each.deleted or each.forgotten)]

    def of_project(self, project: str) -> list[Record]:
        """The runs of an MLflow experiment, in order of their start, without deleted and forgotten ones.

        Raises:
            UserError: there is no such experiment.
        """
        ids = [number for number, (name, deleted) in self._projects.items() if name == project and not deleted]
        if not ids:
            known = ", ".join(sorted(name for name, deleted in self._projects.values() if not deleted)) or "none"
            raise UserError(f"where.tracking: {self.uri}: it has no project {project!r}; those it has: {known}")
        return [each for each in self._search("", ids) if not (each.deleted or each.forgotten)]

    def delete(self, run_id: str) -> None:
        """Mark a run and its models as deleted; a run that is so already, or unknown, is none to complain about.

        `mlflow gc` removes what is marked so.
        """
        from mlflow.exceptions import MlflowException

        with refusals_explained(self.uri):
            # First: by the run they are found. MLflow leaves them when it deletes a run.
            for model in self._client.search_logged_models(list(self._projects), f"source_run_id = '{run_id}'"):
                self._client.delete_logged_model(model.model_id)
            try:
                self._client.delete_run(run_id)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                # MLflow refuses to delete a deleted run.
                if any(not record.deleted for record in self.by_ids([run_id]).values()):
                    raise

    def registered(self, run_ids: Sequence[str]) -> dict[str, list[str]]:
        """The versions of registered models that were made of each of these runs, as `NAME version N`; by id."""
        answer: dict[str, list[str]] = {}
        with refusals_explained(self.uri):
            for ids in _lists(run_ids):
                for each in self._client.search_model_versions(f"run_id IN ({ids})"):
                    answer.setdefault(each.run_id, []).append(f"{each.name} version {each.version}")
        return answer

    def _search(self, query: str, projects: Sequence[str] | None = None) -> list[Record]:
        from mlflow.entities import ViewType

        where = list(self._projects) if projects is None else list(projects)
        found: list[Record] = []
        token = None
        with refusals_explained(self.uri):
            while token != "" and where:
                page = self._client.search_runs(
                    where, query, ViewType.ALL, _PAGE, order_by=["attributes.start_time ASC"], page_token=token
                )
                found += [self._record(run) for run in page]
                token = page.token or ""
        return found

    def _record(self, run: "Run") -> Record:
        tags = run.data.tags
        project, project_deleted = self._projects[run.info.experiment_id]
        return Record(
            self.uri,
            run.info.run_id,
            run.info.run_name,
            project,
            run.info.status,
            project_deleted or run.info.lifecycle_stage == "deleted",
            FORGOTTEN_TAG in tags,
            tags.get(KIND_TAG),
            tags.get(PARENT_TAG),
            run.info.start_time / 1000,
            run.data.params,
            run.data.metrics,
        )


def _lists(run_ids: Iterable[str]) -> Iterator[str]:
    """The ids, each once, as a query names several; as many at a time as a call takes."""
    wanted = list(dict.fromkeys(run_ids))
    for start in range(0, len(wanted), _IDS_PER_CALL):
        yield ", ".join(f"'{each}'" for each in wanted[start : start + _IDS_PER_CALL])
