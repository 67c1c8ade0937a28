"""How much of a difference in AP is the choice of images: the paired bootstrap.

Images are drawn with replacement, as many as there are, the same ones for every run; AP is that of the images drawn,
and the interval holds the middle share of the differences (B. Efron and R. Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 13: the percentile interval). It tells nothing of the chance in training: that is what
several seeds are for.

An image that is drawn k times counts as k images with the same objects and detections. AP is computed from weights,
without making these copies. Where two detections of one class in one image have equal scores, the order of the copies
would matter by as much as the order of equal scores matters in pycocotools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mimiclab.compare.matches import ClassMatches, Matches
from mimiclab.scoring import IOU_THRESHOLDS

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000

# pycocotools' recalls, R = 101.
_RECALLS = np.linspace(0.0, 1.0, 101)
# So many numbers are held at a time.
_CHUNK = 1 << 22

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Difference:
    """Of a metric, second run less first, with the interval that holds `CONFIDENCE` of the resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Differences of one run to another over the same images."""

    metrics: dict[str, Difference]
    """AP, AP50 and AP75, and `AP/<class>`; without a class that no image has."""
    num_images: int
    num_resamples: int


def resamples(num_images: int, num: int, seed: int) -> Iterator[Counts]:
    """How often each image is drawn, (B, N) in chunks of B, `num` rows in all."""
    rng = np.random.default_rng(seed)
    even = np.full(num_images, 1 / num_images)
    size = max(1, _CHUNK // num_images)
    for start in range(0, num, size):
        yield rng.multinomial(num_images, even, size=min(size, num - start)).astype(np.int32)


def paired(
    first: Matches,
    others: Sequence[Matches],
    classes: Sequence[str],
    *,
    num: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Paired]:
    """Compare runs with the first over resampled images; each has the same resamples, so they pair with all."""
    runs = [first, *others]
    ones = np.ones((1, first.num_images), np.int32)
    whole = [_metrics(precisions(each, ones), classes) for each in runs]
    drawn: list[list[dict[str, Floats]]] = [[] for _ in runs]
    for weights in resamples(first.num_images, num, seed):
        for parts, each in zip(drawn, runs, strict=True):
            parts.append(_metrics(precisions(each, weights), classes))
    known = [name for name, values in whole[0].items() if not np.isnan(values).any()]
    tables = [{name: np.concatenate([part[name] for part in parts]) for name in known} for parts in drawn]
    return [
        Paired(
            {
                name: _difference(float(whole[i][name][0] - whole[0][name][0]), tables[i][name] - tables[0][name])
                for name in known
            },
            first.num_images,
            num,
        )
        for i in range(1, len(runs))
    ]


def precisions(matches: Matches, weights: Counts) -> Floats:
    """Average precision of every class at every IoU threshold, where image n counts weights[b, n] times.

    Args:
        matches: of C classes in N images.
        weights: (B, N).

    Returns:
        (B, C, T) in [0, 1]; NaN where the images that count have no object of the class.
    """
    num = len(weights)
    answer = np.full((num, len(matches.classes), len(IOU_THRESHOLDS)), np.nan)
    for index, each in enumerate(matches.classes):
        size = max(1, _CHUNK // max(1, len(each.scores)))
        for start in range(0, num, size):
            part = slice(start, start + size)
            answer[part, index] = _precisions(each, weights[part])
    return answer


def _precisions(matches: ClassMatches, weights: Counts) -> Floats:
    """(B, T). Precision is highest, at any recall, just after a right detection: only these are looked at."""
    num_rows = len(weights)
    rows = np.arange(num_rows)[:, None]
    num_objects = weights @ matches.objects
    needed = _needed(num_objects)
    counts = weights[:, matches.images]
    passed = np.cumsum(counts, 1, dtype=np.int32)
    stride = int(num_objects.max(initial=0)) + 1
    answer = np.zeros((num_rows, len(IOU_THRESHOLDS)))
    for level, (right, ignored) in enumerate(zip(matches.right, matches.ignored, strict=True)):
        places, skipped = np.flatnonzero(right), np.flatnonzero(ignored)
        if not places.size:
            continue
        found = np.cumsum(counts[:, places], 1, dtype=np.int64)
        counted = passed[:, places]
        if skipped.size:
            before = np.cumsum(np.pad(counts[:, skipped], ((0, 0), (1, 0))), 1, dtype=np.int32)
            counted = counted - before[:, np.searchsorted(skipped, places)]
        precision = found / (counted + np.spacing(1))
        highest = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        # One search for all rows: each has numbers of its own range.
        first = np.searchsorted((found + stride * rows).ravel(), (needed + stride * rows).ravel())
        first = first.reshape(needed.shape)
        reached = first < places.size * (rows + 1)
        answer[:, level] = np.where(reached, highest.ravel()[np.minimum(first, highest.size - 1)], 0).mean(1)
    answer[num_objects == 0] = np.nan
    return answer


def _needed(num_objects: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(B, R) the least number of found objects whose share of all, as a double, reaches each recall."""
    total = np.maximum(num_objects, 1)[:, None]
    least = np.ceil(_RECALLS * total).astype(np.int64)
    least -= (least - 1) / total >= _RECALLS
    least += least / total < _RECALLS
    return np.maximum(least, 0)


def _metrics(found: Floats, classes: Sequence[str]) -> dict[str, Floats]:
    """(B,) of each metric from (B, C, T)."""
    levels = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
    metrics = {name: _mean(found[:, :, level].reshape(len(found), -1)) for name, level in levels.items()}
    return metrics | {f"AP/{name}": found[:, index].mean(1) for index, name in enumerate(classes)}


def _mean(values: Floats) -> Floats:
    """(B,) means of (B, K) without NaN; NaN where there is nothing else."""
    known = ~np.isnan(values)
    num = known.sum(1)
    return np.where(num > 0, np.where(known, values, 0).sum(1) / np.maximum(num, 1), np.nan)


def _difference(value: float, drawn: Floats) -> Difference:
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return Difference(value, np.nan, np.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Difference(value, float(low), float(high))
