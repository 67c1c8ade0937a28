"""The result of a check: as one JSON document, and as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mimiclab.data.findings import Finding, Kind
from mimiclab.data.listing import Listing

if TYPE_CHECKING:
    from mimiclab.data.measures import Reach

_NUM_EXAMPLES = 3
_NUM_CLASSES = 20
_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}


@dataclass(frozen=True)
class SetReport:
    """One annotation file in numbers.

    Attributes:
        annotations: The file.
        images: The folder of its images; None where they were not read.
        num_images: All entries.
        num_annotations: All entries.
        classes: See `measures.measure`.
    """

    annotations: str
    images: str | None
    num_images: int
    num_annotations: int
    classes: list[dict[str, Any]]

    @classmethod
    def of(cls, listing: Listing, images: Path | None, classes: list[dict[str, Any]]) -> SetReport:
        """Describe a set."""
        folder = None if images is None else str(images)
        return cls(str(listing.path), folder, listing.num_images, listing.num_annotations, classes)


@dataclass(frozen=True)
class Report:
    """What was found in one set, or in a training and a validation set.

    Attributes:
        sets: Training and validation set.
        reach: Of the experiment's smallest anchor.
        findings: All of them.
    """

    sets: tuple[SetReport, ...]
    reach: Reach | None
    findings: list[Finding]

    @property
    def clean(self) -> bool:
        """Whether there is nothing but notes."""
        return all(finding.kind.severity == "note" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON's types.

        Keys: `clean`; `counts`, of findings by kind; `sets`, the fields of `SetReport`, with `side_bounds` for the
        classes' `sizes`; `anchor`, null or `side` and `least_side` in pixels of the resized image and the `short`
        and `long` it is resized to; `findings`, each with the fields of `Finding` and its `severity`.
        """
        from mimiclab.data.measures import SIDES

        anchor = self.reach and {
            "side": self.reach.anchor,
            "least_side": self.reach.least,
            "short": self.reach.resize.short,
            "long": self.reach.resize.long,
        }
        return {
            "clean": self.clean,
            "counts": {kind.label: num for kind, num in self._counts().items()},
            "side_bounds": list(SIDES),
            "sets": [asdict(each) for each in self.sets],
            "anchor": anchor,
            "findings": [finding.as_json() for finding in self.findings],
        }

    def show(self, console: Console, every: bool = False) -> None:
        """Print tables; with `every`, each finding on a line of its own too, and all classes."""
        for each in self.sets:
            console.print(
                _printable(f"{each.annotations}: {each.num_images} images, {each.num_annotations} annotations")
            )
            if each.images is None:
                console.print("the images were not read: --images names their folder")
        for name, each in zip(self._names(), self.sets, strict=True):
            console.print(self._class_table(name, each, every))
        if self.reach is not None:
            resize = self.reach.resize
            console.print(
                f"too small: below {self.reach.least:.1f} px = {self.reach.anchor:g} / √2 at {resize.short} x "
                f"{resize.long}, no anchor reaches an IoU of 0.5"
            )
        if not self.findings:
            console.print("nothing was found")
            return
        console.print(self._finding_table())
        if every:
            for finding in self._sorted():
                console.print(_printable(f"{finding.kind.severity}: {finding.message}"))

    def _counts(self) -> dict[Kind, int]:
        counts = Counter(finding.kind for finding in self.findings)
        return {kind: counts[kind] for kind in Kind if counts[kind]}

    def _sorted(self) -> Iterator[Finding]:
        by_kind: dict[Kind, list[Finding]] = {kind: [] for kind in Kind}
        for finding in self.findings:
            by_kind[finding.kind].append(finding)
        for group in by_kind.values():
            yield from group

    def _names(self) -> tuple[str, ...]:
        return ("count",) if len(self.sets) == 1 else ("train", "val")

    def _finding_table(self) -> Table:
        table = Table(title="Findings", title_justify="left", box=box.SIMPLE)
        table.add_column("")
        table.add_column("found")
        for name in self._names():
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("for example", overflow="fold", ratio=1)
        num_by_file = Counter((finding.kind, finding.file) for finding in self.findings)
        examples: dict[Kind, list[str]] = {}
        for finding in self.findings:
            of_kind = examples.setdefault(finding.kind, [])
            if len(of_kind) < _NUM_EXAMPLES:
                of_kind.append(finding.subject)
        for kind, num in self._counts().items():
            cells: list[RenderableType] = [str(num_by_file[kind, each.annotations]) for each in self.sets]
            more = ", ..." if num > _NUM_EXAMPLES else ""
            severity = Text(kind.severity, style=_STYLES[kind.severity])
            table.add_row(severity, kind.title, *cells, _printable(", ".join(examples[kind]) + more))
        return table

    def _class_table(self, name: str, each: SetReport, every: bool) -> Table:
        from mimiclab.data.measures import SIDES

        which = "" if len(self.sets) == 1 else f", {name}"
        title = f"Objects by class and side sqrt(area), from .. px on{which}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE)
        rows = sorted(each.classes, key=lambda row: -row["objects"])
        sizes = [sum(row["sizes"][place] for row in rows) for place in range(len(SIDES))]
        total = {"name": "all", "images": "", "sizes": sizes}
        for key in ("objects", "too_small"):
            total[key] = sum(row.get(key, 0) for row in rows)
        shown = [place for place, num in enumerate(sizes) if num]
        table.add_column("")
        for heading in ("objects", "images", *(f"{SIDES[place]}" for place in shown)):
            table.add_column(heading, justify="right")
        if self.reach is not None:
            table.add_column("too small", justify="right", no_wrap=True)
        listed = rows if every else rows[:_NUM_CLASSES]
        for row in (*listed, total):
            if row is total:
                table.add_section()
            cells = [str(row["objects"]), str(row["images"]), *(str(row["sizes"][place]) for place in shown)]
            if self.reach is not None:
                share = row["too_small"] / row["objects"] if row["objects"] else 0.0
                cells.append(f"{row['too_small']} ({share:.1%})")
            table.add_row(_printable(str(row["name"])), *cells)
        if len(listed) < len(rows):
            table.caption = f"the {len(listed)} most frequent of {len(rows)} classes; --all lists every one"
        return table


def _printable(text: str) -> Text:
    """A text without what no terminal shows: half of a surrogate pair, which a name in JSON can hold."""
    return Text(text.encode("utf-8", "backslashreplace").decode())
