"""The report of a search, computed from its record alone: what was best, what it cost, and which keys mattered.

<storage>/<search>/report/
    report.md
    curves.png, keys.png, parallel.png     see figures.py; where a trial was evaluated
    importance.png                         where there is any, see importance.py
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mimiclab.search import figures
from mimiclab.search.cost import begun, costs
from mimiclab.search.importance import SHUFFLES, TREES, Importance, Unknown, importance
from mimiclab.search.results import show
from mimiclab.search.rules import Event
from mimiclab.search.space import describe
from mimiclab.search.story import SearchStory, TrialStory, tell
from mimiclab.storage import Storage
from mimiclab.tracking import runs as tracking

REPORT, TEXT = "report", "report.md"
"""The folder in that of a search, and among its artifacts; the file that is to be read first."""


def write_report(events: Sequence[Event], folder: Storage, run: tuple[str, str] | None = None) -> None:
    """Write the report of a search, in place of an earlier one.

    Args:
        events: of its record, see record.py; the search may be under way.
        folder: of the search.
        run: MLflow's address and the id of the search's run there, to have the files as artifacts too.

    Raises:
        UserError: the folder cannot be written.
    """
    story = tell(events)
    with tempfile.TemporaryDirectory(prefix="mimiclab-") as name:
        place = Path(name)
        found = importance(story)
        known = any(trial.best(story.config.mode) for trial in story.trials.values())
        if known:
            figures.draw_curves(place / "curves.png", story)
            figures.draw_keys(place / "keys.png", story)
            figures.draw_parallel(place / "parallel.png", story)
        if isinstance(found, Importance):
            figures.draw_importance(place / "importance.png", found, story.unit)
        (place / TEXT).write_text(report(story, found))
        files = [*sorted(place.glob("*.png")), place / TEXT]
        folder.write_folder(REPORT, {file.name: file.read_bytes() for file in files})
        for file in files if run else ():
            assert run is not None
            tracking.log_file(*run, file, REPORT)


def report(story: SearchStory, found: Importance | Unknown) -> str:
    """The text, in Markdown; its figures lie beside it."""
    parts = [*_summary(story), *_ranking(story), *_costs(story)]
    if any(trial.best(story.config.mode) for trial in story.trials.values()):
        parts += [*_curves(story), *_keys(story), *_importance(story, found)]
    return "\n".join([*parts, *_errors(story)]) + "\n"


def _summary(story: SearchStory) -> Iterator[str]:
    config, trials = story.config, story.trials.values()
    counts = Counter(trial.outcome for trial in trials)
    outcomes = ", ".join(f"{num} {outcome}" for outcome, num in sorted(counts.items()))
    yield f"# {story.experiment.name}\n"
    yield (
        f"A search of {len(trials)} trials ({config.algorithm}) for the {config.mode} of `{story.metric}`, "
        f"{config.grace_period} to {story.max_t} {story.unit}s each, compared at {_listed(story.rungs)}: {outcomes}.\n"
    )
    best = story.ranked()[0]
    reached = best.best(config.mode)
    if reached is None:
        yield "Nothing was evaluated yet.\n"
        return
    values = ", ".join(f"`{key}` {show(value)}" for key, value in best.values.items())
    yield f"The best is **{best.name}** ({best.outcome}) with {_score(best, config.mode)}: {values}.\n"
    yield "\n".join(f"- `{key}`: {describe(distribution)}" for key, distribution in config.space.items()) + "\n"


def _ranking(story: SearchStory) -> Iterator[str]:
    mode, keys = story.config.mode, list(story.config.space)
    repeated = any(trial.repeats for trial in story.trials.values())
    yield "## Ranking\n"
    rows = []
    for place, trial in enumerate(story.ranked(), start=1):
        best = trial.best(mode)
        cells = [str(place) if best else "-", trial.name, trial.outcome, _score(trial, mode)]
        cells += [str(len(trial.scores(mode)))] if repeated else []
        cells += [str(best.t) if best else "-", str(trial.t)]
        rows.append([*cells, *(show(trial.values[key]) if key in trial.values else "-" for key in keys)])
    head = ["", "trial", "outcome", f"`{story.metric}`", *(["runs"] if repeated else []), f"best {story.unit}"]
    yield from _table([*head, f"{story.unit}s", *(f"`{key}`" for key in keys)], rows)
    if repeated:
        yield (
            "Where a trial has several runs, of other seeds, its number is the mean of their best values, ± half of "
            "the 95 % interval of that mean by Student's t. The run that was chosen for its value is one of them, so "
            "that the mean leans to the better side.\n"
        )
    else:
        yield (
            "One run each: how far equal runs of other seeds lie apart is not known, and the first of many is partly "
            "the luckiest. `search.seeds_per_trial` repeats what finished.\n"
        )


def _costs(story: SearchStory) -> Iterator[str]:
    yield "## What it cost\n"
    rows = [
        [cost.unit, _amount(cost.spent), _amount(cost.full), f"{100 * (1 - cost.share):.0f} %"] for cost in costs(story)
    ]
    yield from _table(["", "spent", "all to their end", "saved"], rows)
    num, rest = len(begun(story)), len(story.trials) - len(begun(story))
    text = (
        f"Of the {num} trials that were begun, up to the last evaluation of each; hours from its start to its end. The "
        "second column adds what those lack that were cut, stopped or are not done: as many steps an epoch, and as "
        "much time, as each has taken so far. A trial that an error ended saves nothing."
    )
    if rest:
        text += f" {rest} trials were never begun and count for nothing."
    if repeats := [repeat for trial in story.trials.values() for repeat in trial.repeats.values()]:
        text += f" Repeating trials with other seeds took {sum(map(story.hours, repeats)):.3g} hours more."
    yield text + "\n"


def _curves(story: SearchStory) -> Iterator[str]:
    yield "## Learning curves\n"
    yield "![learning curves](curves.png)\n"
    cut = [(trial, trial.cut) for trial in story.trials.values() if trial.cut]
    if not cut:
        yield "No trial was cut.\n"
        return
    rows = [
        [trial.name, str(each.rung), f"{trial.curve[-1].value:.4f}", f"{each.cutoff:.4f}"]
        for trial, each in sorted(cut, key=lambda item: (item[1].rung, item[0].name))
    ]
    yield from _table(["cut", f"at {story.unit}", "had", "cut below" if story.config.mode == "max" else "above"], rows)


def _keys(story: SearchStory) -> Iterator[str]:
    yield "## The metric against each key\n"
    yield "![metric against each key](keys.png)\n"
    yield (
        "The best value of each trial. Those that were cut had less training: compare them with others of their "
        "shade.\n"
    )
    yield "![parallel coordinates](parallel.png)\n"


def _importance(story: SearchStory, found: Importance | Unknown) -> Iterator[str]:
    yield "## Which keys mattered\n"
    if isinstance(found, Unknown):
        yield f"Not known: {found.reason}.\n"
        return
    yield "![importance](importance.png)\n"
    rows = zip(found.keys, found.mean, found.sd, strict=True)
    yield from _table(["key", "importance", "±"], [[f"`{key}`", f"{mean:.3f}", f"{sd:.3f}"] for key, mean, sd in rows])
    early = found.t < story.max_t
    yield (
        f"A random forest ({TREES} trees, scikit-learn) predicts `{story.metric}` at {story.unit} {found.t} of "
        f"{found.trials} trials from their keys. R² out of bag is {found.r2:.2f}: 1 explains all, 0 nothing. "
        f"Importance is by how much R² over these trials falls when the values of a key are shuffled, mean and "
        f"standard deviation of {SHUFFLES} shuffles. All trials are compared after the same training"
        + (
            f": {found.t} {story.unit}s are what each of them had that was cut or finished, so this says what matters "
            "early, not at the end. "
            if early
            else ". "
        )
        + "Trials without a value there are left out. Keys that go together share their importance.\n"
    )


def _errors(story: SearchStory) -> Iterator[str]:
    failed = [trial for trial in story.trials.values() if trial.error]
    if failed:
        yield "## Errors\n"
        yield "\n".join(f"- {trial.name} ({trial.outcome}): {trial.error}" for trial in failed) + "\n"


def _score(trial: TrialStory, mode: str) -> str:
    """The number that a trial ranks by, with its interval where there are several runs."""
    from mimiclab.seeds import Statistic

    scores = trial.scores(mode)
    if not scores:
        return "-"
    found = Statistic("", scores)
    return f"{found.mean:.4f}" + ("" if math.isnan(found.half_width) else f" ± {found.half_width:.4f}")


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _listed(rungs: Sequence[int]) -> str:
    *others, last = [str(rung) for rung in rungs] or ["no rung"]
    return f"{', '.join(others)} and {last}" if others else last


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""
