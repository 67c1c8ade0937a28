"""Figures of an evaluation, as PNG: curves, errors and confusion of every head that was analysed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mimiclab.analysis import Analysis
from mimiclab.box_errors import KINDS
from mimiclab.pictures import MIN_SCORE
from mimiclab.scoring import IOU_THRESHOLDS, RECALLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_IOUS = (0.5, 0.75)
"""IoU thresholds that curves are drawn for."""

_HEADS = {"student": ("#1f4e8c", "-"), "teacher": ("#d9822b", "--")}
# So many classes have a colour of their own, and numbers in their cells.
_MAX_NAMED = 8
_MAX_NUMBERS = 15
_GREY = "0.45"
_DPI = 110


def draw_precision_recall(analyses: Mapping[str, Analysis], classes: Sequence[str]) -> bytes:
    """Precision over recall: each head's mean over the classes, and the student's every class."""
    from matplotlib import colormaps

    own = colormaps["Set2"]
    figure = _figure(11.5, 4.6)
    axes = figure.subplots(1, len(SHOWN_IOUS), sharey=True)
    for ax, threshold in zip(axes, SHOWN_IOUS, strict=True):
        row = IOU_THRESHOLDS.index(threshold)
        for index, (name, curve) in enumerate(_known(analyses["student"].scored.precision[row], classes)):
            named = len(classes) <= _MAX_NAMED
            colour, label = (own(index), f"{_short(name)}  {curve.mean():.3f}") if named else ("0.8", None)
            ax.plot(RECALLS, curve, color=colour, linewidth=1.3 if named else 0.6, label=label)
        for head, analysis in analyses.items():
            curves = [curve for _, curve in _known(analysis.scored.precision[row], classes)]
            mean = np.mean(curves, axis=0)
            colour, style = _HEADS[head]
            label = f"{head}, mean  {mean.mean():.3f}"
            ax.plot(RECALLS, mean, color=colour, linestyle=style, linewidth=2.4, label=label)
        ax.set(title=f"IoU {threshold:g}", xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        ax.grid(color="0.92")
        _plain(ax)
        handles, labels = ax.get_legend_handles_labels()
        heads = len(analyses)  # drawn last, over the classes; named first
        ax.legend(
            handles[-heads:] + handles[:-heads], labels[-heads:] + labels[:-heads], title="AP", fontsize=8,
            loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
        )  # fmt: skip
    axes[0].set_ylabel("precision")
    figure.suptitle(f"Precision and recall; thin: the student's {'classes' if len(classes) > 1 else 'class'}")
    return _png(figure)


def draw_errors(analyses: Mapping[str, Analysis]) -> bytes:
    """What each kind of error costs, and how many there are, in bars."""
    figure = _figure(10.5, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    titles = "AP50 lost to it", f"how many, of score {MIN_SCORE:g} or more"
    width = 0.8 / len(analyses)
    for ax, title in zip(axes, titles, strict=True):
        for number, (head, analysis) in enumerate(analyses.items()):
            first = title == titles[0]
            values = list(analysis.costs.values()) if first else analysis.counts.sum(0).tolist()
            places = np.arange(len(KINDS)) + (number - (len(analyses) - 1) / 2) * width
            bars = ax.barh(places, values, width * 0.92, color=_HEADS[head][0], label=head)
            ax.bar_label(bars, fmt="{:.3f}" if first else "{:,.0f}", fontsize=8, padding=3, color=_GREY)
        ax.set_title(title, fontsize=10)
        ax.margins(x=0.16)
        ax.grid(axis="x", color="0.92")
        ax.set_axisbelow(True)
        _plain(ax)
    axes[0].set_yticks(np.arange(len(KINDS)), [kind.replace("_", " ") for kind in KINDS])
    axes[0].invert_yaxis()
    axes[0].tick_params(axis="y", length=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle("Errors at IoU 0.5")
    return _png(figure)


def draw_confusion(analyses: Mapping[str, Analysis], classes: Sequence[str]) -> bytes:
    """What objects of each class were detected as: a matrix for each head, its rows shaded by their shares."""
    side = min(max(0.34 * len(classes) + 2.2, 3.8), 15.0)
    figure = _figure(side * len(analyses) + 0.8, side)
    axes = figure.subplots(1, len(analyses), sharey=True, squeeze=False)[0]
    names = [*map(_short, classes), "background"]
    size = float(np.clip(38 * side / len(names), 4, 9))
    for ax, (head, analysis) in zip(axes, analyses.items(), strict=True):
        table = analysis.confusion
        shares = table / np.maximum(table.sum(1, keepdims=True), 1)
        shaded = ax.imshow(np.ma.masked_equal(shares, 0), cmap="Blues", vmin=0, vmax=1, aspect="equal")
        if len(classes) <= _MAX_NUMBERS:
            for row, column in np.argwhere(table):
                colour = "white" if shares[row, column] > 0.55 else "black"
                ax.text(column, row, f"{table[row, column]:,}", ha="center", va="center", fontsize=size, color=colour)
        # The background is no class: what is in its row or column was seen without being there, or not seen.
        for line in (ax.axhline, ax.axvline):
            line(len(classes) - 0.5, color=_GREY, linewidth=0.8)
        ax.set_xticks(range(len(names)), names, rotation=45 if len(names) <= 2 * _MAX_NUMBERS else 90, fontsize=size,
                      ha="right" if len(names) <= 2 * _MAX_NUMBERS else "center", rotation_mode="anchor"
                      if len(names) <= 2 * _MAX_NUMBERS else "default")  # fmt: skip
        ax.set_yticks(range(len(names)), names, fontsize=size)
        ax.tick_params(length=0)
        ax.set(title=head, xlabel="detected as")
        for spine in ax.spines.values():
            spine.set_color("0.85")
    axes[0].set_ylabel("object")
    bar = figure.colorbar(shaded, ax=list(axes), shrink=0.7, aspect=30, pad=0.015)
    bar.set_label("share of the row", fontsize=9)
    bar.outline.set_visible(False)
    figure.suptitle(f"Detections of score {MIN_SCORE:g} or more, at IoU 0.5")
    return _png(figure)


def _known(precision: npt.NDArray[np.float64], classes: Sequence[str]) -> list[tuple[str, npt.NDArray[np.float64]]]:
    """Name and curve (101,) of the classes that the data has objects of, of (101, C)."""
    return [(name, precision[:, i]) for i, name in enumerate(classes) if (precision[:, i] > -1).all()]


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot, which is not for threads. Loaded where it is used: it takes a moment.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
