"""Tables for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

_ROWS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")
_TITLES = {"student_topk": "student, teacher's boxes"}


def heads_table(metrics: Mapping[str, float], title: str) -> Table:
    """Every head in a column, a row per metric and class; the gap is teacher minus student on the same boxes."""
    heads = list(dict.fromkeys(name.split("/")[0] for name in metrics if name.endswith("/AP")))
    heads = [head for head in heads if head not in ("gap", "best")]
    compared = "student_topk" if "student_topk" in heads else "student"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for head in heads:
        table.add_column(_TITLES.get(head, head), justify="right")
    if "teacher" in heads:
        table.add_column("gap", justify="right")
    per_class = [name.removeprefix("student/") for name in metrics if name.startswith("student/AP/")]
    for name in (*_ROWS, *per_class):
        if f"student/{name}" in metrics:
            cells = [f"{metrics[f'{head}/{name}']:.3f}" for head in heads]
            if "teacher" in heads:
                cells.append(f"{metrics[f'teacher/{name}'] - metrics[f'{compared}/{name}']:+.3f}")
            table.add_row(name, *cells)
    return table
