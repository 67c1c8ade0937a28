"""What trials are compared by: a metric of their evaluations, or a weighted sum of several.

The schema of experiments is built on this module, so it knows nothing of experiments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches

from mimiclab.errors import UserError

Metric = str | Mapping[str, float]
"""A metric's name, or names with their weights."""


def check_metric(written: object) -> str | dict[str, float]:
    """Give the metric back if it is one.

    Raises:
        ValueError: it is neither a name nor a mapping of names to weights.
    """
    if isinstance(written, str) and written:
        return written
    if (
        isinstance(written, dict)
        and written
        and all(isinstance(name, str) and name and _is_weight(weight) for name, weight in written.items())
    ):
        return {name: float(weight) for name, weight in written.items()}
    raise ValueError(
        f"found {json.dumps(written, ensure_ascii=False)}, expected a metric's name, or names with weights other than "
        "0, such as {student/AP: 1, student/latency_ms: -0.002}"
    )


def terms_of(metric: Metric) -> dict[str, float]:
    """The names that a metric is computed from, with their weights."""
    return {metric: 1.0} if isinstance(metric, str) else dict(metric)


def name_of(metric: Metric) -> str:
    """What to call it in tables: `student/AP - 0.002 student/latency_ms`."""
    if isinstance(metric, str):
        return metric
    text = ""
    for name, weight in metric.items():
        sign = (" - " if text else "-") if weight < 0 else (" + " if text else "")
        text += sign + (name if abs(weight) == 1 else f"{abs(weight):g} {name}")
    return text


def value_of(metric: Metric, metrics: Mapping[str, float]) -> float:
    """The metric of an evaluation; NaN where a term is.

    Raises:
        UserError: the evaluation does not report it, or a term of it.
    """
    terms = terms_of(metric)
    missing = [name for name in terms if name not in metrics]
    if missing:
        raise UserError(f"search.metric: evaluations do not report {' and '.join(missing)}; {_hint(missing, metrics)}")
    return sum(weight * metrics[name] for name, weight in terms.items())


def _hint(missing: list[str], metrics: Mapping[str, float]) -> str:
    known = sorted(name for name in metrics if name.startswith(("student", "teacher", "gap")))
    nearest = [match for name in missing for match in get_close_matches(name, known, n=1)]
    if len(nearest) == len(missing):
        return f"did you mean {' and '.join(nearest)}?"
    return f"expected one of {', '.join(known)}"


def _is_weight(weight: object) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight != 0
