"""A comparison of runs, for a terminal and as Markdown."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mimiclab.compare.bootstrap import CONFIDENCE, Difference, Paired
from mimiclab.compare.entries import Entries, Entry
from mimiclab.compare.images import HEAD, MAX_RUNS, ByImage, Options, by_image, save_pictures
from mimiclab.compare.table import Table, escaped, runs_table
from mimiclab.errors import UserError

# Of few runs all that is known, of many what fits beside each other.
_METRICS = (
    *("student/AP", "student/AP50", "student/AP75", "student/AP_small", "student/AP_medium", "student/AP_large"),
    *("student/AR100", "student_topk/AP", "teacher/AP", "teacher/AP50", "teacher/AP75", "gap/AP"),
)
_METRICS_OF_MANY = ("student/AP", "student/AP50", "student/AP75", "teacher/AP", "gap/AP")
_MAX_PARAMS_OF_MANY = 8
_CLASS = "student/AP/"


@dataclass(frozen=True)
class Report:
    """What a comparison found."""

    title: str
    findings: tuple[str, ...]
    """A sentence for each pair of runs."""
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    """What was left out, and why."""
    pictures: tuple[Path, ...]

    def show(self, console: Console) -> None:
        """Print it."""
        for table in self.tables:
            console.print(table.to_rich())
        for line in (*self.findings, *self.notes):
            console.print(line, highlight=False)
        if self.pictures:
            console.print(f"pictures: {self.pictures[0].parent}, {len(self.pictures)} of them", highlight=False)

    def markdown(self, folder: Path) -> str:
        """As Markdown, for a file in `folder`: pictures are linked from there."""
        parts = [f"# {escaped(self.title)}\n"]
        if self.findings:
            parts.append("".join(f"- {escaped(line)}\n" for line in self.findings))
        parts += [table.to_markdown() for table in self.tables]
        parts += [f"![{escaped(each.stem)}]({_link(each, folder)})\n" for each in self.pictures]
        if self.notes:
            parts.append("".join(f"- {escaped(line)}\n" for line in self.notes))
        return "\n".join(parts)


def report(entries: Entries, options: Options, save: Path | None, say: Callable[[str], object]) -> Report:
    """Compare runs with the first of them.

    Args:
        entries: the runs.
        options: how images are looked at.
        save: folder for pictures of the images on which the runs disagree most; None for no pictures.
        say: gets a line before what takes long.

    Raises:
        UserError: a picture cannot be made.
    """
    runs = entries.runs
    images = by_image(runs, options, say)
    params, more = _params(runs)
    tables = [_metrics(entries), params, _classes(entries, images), _disagreements(images, options)]
    pictures = save_pictures(images, save, options.min_score) if save is not None else []
    if save is not None and not pictures:
        more.append("no picture was saved: no image is known on which the runs disagree")
    first, num = runs[0].label, len(runs)
    return Report(
        f"{runs[1].label} against {first}" if num == 2 else f"{num} runs against {first}",
        tuple(_finding(run, images, each) for run, each in zip(images.runs[1:], images.paired, strict=True)),
        tuple(table for table in tables if table is not None),
        (*more, *images.left_out),
        tuple(pictures),
    )


def write(file: Path, text: str) -> None:
    """Write a report.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error


def _metrics(entries: Entries) -> Table:
    runs, first = entries.runs, entries.runs[0].metrics
    wide = len(runs) <= MAX_RUNS
    known = {name for each in runs for name in each.metrics}
    names = [name for name in (_METRICS if wide else _METRICS_OF_MANY) if name in known]
    cells = [[_cell(each, first, name, is_first=each is runs[0]) for name in names] for each in runs]
    if entries.best:
        names = ["step", *names]
        cells = [[str(each.step), *row] for each, row in zip(runs, cells, strict=True)]
    which = "best evaluation of each run" if entries.best else "last evaluation of each run, as MLflow has it"
    return runs_table(
        f"{which}, and the difference to {runs[0].label}", names, [each.label for each in runs], cells, wide=wide
    )


def _params(runs: Sequence[Entry]) -> tuple[Table | None, list[str]]:
    """The parameters that differ, and what is to be said about them."""
    known = dict.fromkeys(key for each in runs for key in each.params)
    names = [key for key in known if len({each.params.get(key) for each in runs}) > 1]
    if not names:
        return None, ["no parameter differs"]
    wide = len(runs) <= MAX_RUNS
    notes = []
    if not wide and len(names) > _MAX_PARAMS_OF_MANY:
        notes.append(f"{len(names)} parameters differ; not shown: {', '.join(names[_MAX_PARAMS_OF_MANY:])}")
        names = names[:_MAX_PARAMS_OF_MANY]
    cells = [[each.params.get(key, "-") for key in names] for each in runs]
    return runs_table("parameters that differ", names, [each.label for each in runs], cells, wide=wide), notes


def _classes(entries: Entries, images: ByImage) -> Table | None:
    """AP of each class, with the interval of its difference where that belongs to this evaluation."""
    runs, first = entries.runs, entries.runs[0]
    names = list(dict.fromkeys(name for each in runs for name in each.metrics if name.startswith(_CLASS)))
    if len(runs) > MAX_RUNS or not names:
        return None
    steps = {run.label: kept.step for run, kept in zip(images.runs, images.kept, strict=True)}
    known = dict(zip([run.label for run in images.runs[1:]], images.paired, strict=True))

    def cell(each: Entry, name: str) -> str:
        same = all(steps.get(run.label) == run.step for run in (first, each))
        pair = known.get(each.label) if same else None
        difference = pair.metrics.get(f"AP/{name.removeprefix(_CLASS)}") if pair is not None else None
        if difference is None:
            return _cell(each, first.metrics, name, is_first=each is first)
        return f"{each.metrics[name]:.3f} ({_interval(difference)})"

    cells = [[cell(each, name) for name in names] for each in runs]
    labels = [each.label for each in runs]
    return runs_table("AP of each class", [name.removeprefix(_CLASS) for name in names], labels, cells, wide=True)


def _disagreements(images: ByImage, options: Options) -> Table | None:
    if not images.disagreements:
        return None
    assert images.dataset is not None
    records = images.dataset.images
    return Table(
        f"images of most disagreement, found and wrong at a score of {options.min_score:g} and an IoU of 0.5",
        ("image", "objects", "disputed", *(run.label for run in images.runs)),
        tuple(
            (
                records[each.position].path.name,
                str(each.num_objects),
                str(each.num_disputed),
                *(f"{found} found, {wrong} wrong" for found, wrong in zip(each.found, each.wrong, strict=True)),
            )
            for each in images.disagreements
        ),
    )


def _finding(run: Entry, images: ByImage, pair: Paired) -> str:
    first, ap = images.runs[0], pair.metrics["AP"]
    steps = [kept.step for of, kept in zip(images.runs, images.kept, strict=True) if of in (first, run)]
    verdict = "better" if ap.low > 0 else "worse" if ap.high < 0 else "not told apart by these images"
    values = ", ".join(f"{name} {_interval(pair.metrics[name])}" for name in ("AP50", "AP75"))
    return (
        f"{run.label} (step {steps[1]}) against {first.label} (step {steps[0]}): {HEAD}/AP difference {_interval(ap)}, "
        f"{pair.num_images} images, {pair.num_resamples} resamples: {verdict}; {values} "
        f"({100 * CONFIDENCE:.0f} % intervals of the paired bootstrap over images)"
    )


def _cell(each: Entry, first: Mapping[str, float], name: str, *, is_first: bool) -> str:
    value = each.metrics.get(name, math.nan)
    if math.isnan(value):
        return "-"
    difference = value - first.get(name, math.nan)
    return f"{value:.3f}" if is_first or math.isnan(difference) else f"{value:.3f} ({difference:+.3f})"


def _interval(difference: Difference) -> str:
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _link(picture: Path, folder: Path) -> str:
    """The picture's path from the folder, as Markdown takes it."""
    from urllib.parse import quote

    return quote(os.path.relpath(picture, folder))
