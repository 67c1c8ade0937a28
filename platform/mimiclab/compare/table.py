"""Tables that a terminal and Markdown show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A title, names of columns, and rows of as many texts; the first of each row names it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for position, name in enumerate(self.columns):
            table.add_column(name, justify="right" if position else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """For Markdown, with its title as a heading."""
        lines = [self.columns, (":--", *["--:"] * (len(self.columns) - 1)), *self.rows]
        text = "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines)
        return f"## {escaped(self.title)}\n\n{text}\n"


def runs_table(
    title: str, names: Sequence[str], labels: Sequence[str], cells: Sequence[Sequence[str]], *, wide: bool
) -> Table:
    """A table of what runs are like.

    Args:
        title: of the table.
        names: of what is said of each run.
        labels: of the runs.
        cells: of each run, one for each name.
        wide: a column for each run; else a row.
    """
    if wide:
        rows = tuple((name, *(row[position] for row in cells)) for position, name in enumerate(names))
        return Table(title, ("", *labels), rows)
    return Table(title, ("run", *names), tuple((label, *row) for label, row in zip(labels, cells, strict=True)))


def escaped(text: str) -> str:
    """A text as Markdown shows it in a table, whatever it holds."""
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.splitlines())
