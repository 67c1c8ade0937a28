"""Tables for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

_ROWS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")


def heads_table(metrics: Mapping[str, float], title: str) -> Table:
    """Student and teacher side by side, with the gap between them; a row per metric and class."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("student", "teacher", "gap"):
        table.add_column(column, justify="right")
    per_class = [name.removeprefix("student/") for name in metrics if name.startswith("student/AP/")]
    for name in (*_ROWS, *per_class):
        if f"student/{name}" in metrics:
            student, teacher = metrics[f"student/{name}"], metrics[f"teacher/{name}"]
            table.add_row(name, f"{student:.3f}", f"{teacher:.3f}", f"{teacher - student:+.3f}")
    return table
