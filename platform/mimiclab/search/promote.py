"""A trial of a search as an experiment of its own, which says where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mimiclab import runs
from mimiclab.code import COMMIT_TAG, DIRTY_TAG
from mimiclab.errors import UserError
from mimiclab.search.find import find
from mimiclab.search.record import RECORD, Record
from mimiclab.search.results import show
from mimiclab.search.story import SearchStory, TrialStory, loaded_of, tell
from mimiclab.search.trials import Plan, Trial, trial_name
from mimiclab.storage import Storage
from mimiclab.tracking.parents import PARENT_TAG
from mimiclab.tracking.tags import known_tags


def promote(
    reference: str,
    trial: str | None = None,
    *,
    output: Path | None = None,
    storage: str = "./runs",
    overwrite: bool = False,
) -> Path:
    """Write a trial's experiment as a file for `mimiclab train`, where it gives the trial's numbers again.

    It holds what the search's file had, `$VARIABLES` as they were written; relative paths stay relative to where it is
    trained.

    Args:
        reference: of the search, see `find`.
        trial: its name, as trial-03, or number; the best one by default.
        output: the file; <search>-<trial>.yaml here by default.
        storage: folder, or URI, that holds the search.
        overwrite: replace a file that is there.

    Returns:
        The file.

    Raises:
        UserError: there is no such search or trial, the trial was never evaluated, or the file cannot be written.
    """
    folder, record = find(reference, storage)
    story = tell(record.events)
    chosen = _choose(story, trial)
    plan = Plan(loaded_of(record.events))
    text = "".join(f"# {line}\n" for line in _provenance(story, chosen, folder, record))
    name = f"{_run_name(story, chosen)}-promoted"
    text += plan.file_of(_trial(plan, chosen), name)
    output = output or Path(f"{_run_name(story, chosen)}.yaml")
    try:
        with output.open("w" if overwrite else "x") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{output}: it exists; expected another --output, or --overwrite") from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    return output


def _choose(story: SearchStory, wanted: str | None) -> TrialStory:
    name = story.experiment.name
    if wanted is None:
        chosen = story.ranked()[0]
        if chosen.best(story.config.mode) is None:
            raise UserError(f"search {name}: no trial was evaluated yet, expected one to promote")
        return chosen
    found = story.trials.get(trial_name(int(wanted)) if wanted.isdecimal() else wanted)
    if found is None:
        first, *_, last = [*story.trials] * 2
        raise UserError(f"search {name}: found no trial {wanted}, expected one of {first} to {last}")
    if found.best(story.config.mode) is None:
        error = f": {found.error}" if found.error else ""
        raise UserError(
            f"search {name}: {found.name} was never evaluated, it is {found.outcome}{error}; expected a trial with a "
            "result"
        )
    return found


def _trial(plan: Plan, chosen: TrialStory) -> Trial:
    """The trial, with what it trained."""
    trial = Trial(int(chosen.name.rpartition("-")[2]), {}, plan.experiment)
    plan.fill(trial, chosen.values)
    return trial


def _run_name(story: SearchStory, trial: TrialStory) -> str:
    return f"{story.experiment.name}-{trial.name}"


def _provenance(story: SearchStory, chosen: TrialStory, folder: Storage, record: Record) -> Iterator[str]:
    best = chosen.best(story.config.mode)
    assert best is not None
    rank = [trial.name for trial in story.ranked()].index(chosen.name) + 1
    yield (
        f"{chosen.name} of the search {story.experiment.name} ({chosen.outcome}, place {rank} of {len(story.trials)}): "
        f"{story.metric} {best.value!r} at {story.unit} {best.t}"
    )
    yield "What the search chose:"
    yield from (f"  {key}: {show(value)}" for key, value in chosen.values.items())
    yield "Where it comes from:"
    yield f"  {folder.where(RECORD)}, {len(record.events)} events, sha256 {folder.sha256(RECORD)}"
    root = runs.root_of(story.experiment) if folder.local is None else Storage(folder.local.parent)
    run = runs.read(root / _run_name(story, chosen))
    if run is None:  # removed since
        return
    yield f"  run {run.name}, identity {run.identity}"
    tags = known_tags(run.tracking, run.mlflow_run_id)
    parent = f", of the search {tags[PARENT_TAG]}" if PARENT_TAG in tags else ""
    yield f"  MLflow {run.tracking}, run {run.mlflow_run_id}{parent}"
    if commit := tags.get(COMMIT_TAG):
        changed = " and changes that were not committed" if tags.get(DIRTY_TAG) == "true" else ""
        yield f"  code of commit {commit}{changed}"
