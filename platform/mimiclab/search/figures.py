"""Figures of a search: learning curves, the metric against each key, all keys side by side, importance."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimiclab.search.importance import Importance
from mimiclab.search.results import show
from mimiclab.search.space import MAX_GRID_INT, Distribution, extremes, kind_of
from mimiclab.search.story import SearchStory, TrialStory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"finished": "tab:blue", "pruned": "0.55", "failed": "tab:red", "unfinished": "tab:orange"}
_MARKERS = {"finished": "o", "pruned": "x", "failed": "^", "unfinished": "D"}
# What is left of these when those that were cut have a name of their own.
_LABELS = {"pruned": "pruned for NaN"}
_BEST = "tab:red"
# Viridis less its yellow end, which a white page swallows, from low to high.
_MAP_ENDS = (0.88, 0.0)
_FAINT = 0.4
_NAMED = 5
"""Curves that are named at their end."""
_COLUMNS = 3
_GAP = -0.13
"""Where lines cross the axis of a key that their trial does not have; axes go from 0 to 1."""


def draw_curves(path: Path, story: SearchStory) -> None:
    """The metric over epochs or steps: trials that were cut end in a cross, rungs are dashed.

    Args:
        path: of the PNG file; so for all of this module.
        story: of the search.
    """
    figure, axes = _figure(9, 5)
    known = [trial for trial in story.ranked() if trial.best(story.config.mode)]
    for rung in story.rungs:
        axes.axvline(rung, color="0.8", linestyle="--", linewidth=1, zorder=0)
        axes.text(rung, 1.01, f"rung {rung}", color="0.45", fontsize=8, ha="center", transform=_along(axes))
    finished = [trial for trial in known if trial.outcome == "finished"]
    for trial in reversed(known):
        x, y = [p.t for p in trial.curve], [p.value for p in trial.curve]
        best = trial is known[0]
        colour, width = _COLOURS[_kind(trial)], 1.6
        if trial.cut:
            colour, width = "0.6", 1.0
            axes.plot(x[-1], y[-1], marker="x", color="0.35", markersize=6, zorder=4)
        if best:
            colour, width = _BEST, 2.6
        shade = 1.0 if best or trial.cut or len(finished) < _NAMED else 0.6
        axes.plot(x, y, color=colour, linewidth=width, alpha=shade, marker="." if len(x) < 2 else None,
                  zorder=5 if best else 2 if trial.cut else 3)  # fmt: skip
    _name_ends(axes, known[:_NAMED], story.max_t)
    cut = sum(trial.cut is not None for trial in known)
    axes.set_title(f"{story.experiment.name}: {len(known)} trials, {cut} cut (x)", loc="left", pad=18)
    axes.set_xlabel(story.unit)
    axes.set_ylabel(story.metric)
    axes.set_xlim(0 if story.max_t > 1 else 0.5, story.max_t * 1.14)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def draw_keys(path: Path, story: SearchStory) -> None:
    """Each trial's best value over each of the searched keys, a panel a key.

    Trials that were cut had less training: those of one shade are comparable with each other.
    """
    keys = list(story.config.space)
    columns = min(_COLUMNS, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure, grid = _figure(3.3 * columns + 0.8, 2.9 * rows + 0.7, rows, columns)
    known = _known(story)
    groups = _groups(story, known)
    for number, key in enumerate(keys):
        axes = grid[number // columns][number % columns]
        spread = _set_axis(axes, story.config.space[key])
        for label, (style, trials) in groups.items():
            points = [(spread(trial, trial.values[key]), y) for trial, y in trials if key in trial.values]
            axes.scatter([x for x, _ in points], [y for _, y in points], s=38, label=label, **style)
        for best, value in known[:1]:
            if key not in best.values:
                continue
            axes.scatter([spread(best, best.values[key])], [value], s=150, facecolors="none", edgecolors=_BEST,
                         linewidths=1.6, zorder=4, label="best")  # fmt: skip
        axes.set_xlabel(key, fontsize=9)
        axes.grid(axis="y", color="0.92", zorder=0)
        if number % columns == 0:
            axes.set_ylabel(story.metric)
        else:
            axes.sharey(grid[number // columns][0])
            axes.tick_params(labelleft=False)
    for number in range(len(keys), rows * columns):
        grid[number // columns][number % columns].set_visible(False)
    found = {label: handle for row in grid for axes in row for handle, label in zip(*_legend(axes), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=len(found), frameon=False)
    _save(figure, path)


def draw_parallel(path: Path, story: SearchStory) -> None:
    """A line a trial through all keys to its best value, which is its colour; trials that were cut are faint."""
    keys = list(story.config.space)
    known = _known(story)
    low, high = min((y for _, y in known), default=0.0), max((y for _, y in known), default=1.0)

    def place(value: float) -> float:
        return (value - low) / (high - low) if high > low else 0.5

    figure, axes = _figure(max(7.0, 1.9 * (len(keys) + 1)), 5)
    gaps = False
    for number, key in enumerate(keys):
        _draw_axis(axes, number, key, _ticks(story.config.space[key]))
        if any(key not in trial.values for trial, _ in known):
            gaps = True
            axes.plot([number, number], [_GAP, 0], color="0.3", linewidth=0.8, linestyle=":")
            _tick(axes, number, _GAP, "none")
    colours = _colour_map()
    _draw_axis(axes, len(keys), story.metric, [(place(v), f"{v:.3g}") for v in _round(low, high)], right=True)
    axes.imshow([[n / 255] for n in range(256)], cmap=colours, origin="lower", aspect="auto", zorder=6,
                extent=(len(keys) - 0.025, len(keys) + 0.025, 0, 1))  # fmt: skip
    for number, (trial, value) in reversed(list(enumerate(known))):
        y = [*(_height(trial, key, story.config.space[key]) for key in keys), place(value)]
        short = trial.outcome != "finished"
        width, alpha, order = (3.2, 1.0, 4) if number == 0 else (1.0, _FAINT, 1) if short else (1.8, 0.9, 3)
        axes.plot(range(len(y)), y, color=colours(place(value)), linewidth=width, alpha=alpha, zorder=order,
                  solid_joinstyle="round")  # fmt: skip
    axes.set_xlim(-0.4, len(keys) + 0.35)
    axes.set_ylim(_GAP - 0.05 if gaps else -0.05, 1.05)
    axes.axis("off")
    named = f", the thick one is {known[0][0].name}" if known else ""
    axes.set_title(f"{story.experiment.name}: thin lines were not trained to the end{named}", loc="left", pad=34)
    _save(figure, path)


def draw_importance(path: Path, found: Importance, unit: str) -> None:
    """A bar a key, with the standard deviation over shuffles."""
    figure, axes = _figure(8, 1.4 + 0.42 * len(found.keys))
    places = range(len(found.keys))
    axes.barh(places, found.mean, xerr=found.sd, color="tab:blue", ecolor="0.3", height=0.6, capsize=3)
    axes.set_yticks(places, found.keys)
    axes.invert_yaxis()
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_xlabel("how much R² falls with the key's values shuffled")
    axes.set_title(f"{found.trials} trials at {unit} {found.t}; R² out of bag {found.r2:.2f}", loc="left")
    _save(figure, path)


# ---- axes and positions ----


def _figure(width: float, height: float, rows: int | None = None, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot() if rows is None else figure.subplots(rows, columns, squeeze=False)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)


def _along(axes: Axes) -> Any:
    """Positions of which x is in the data's units, and y from 0 to 1."""
    return axes.get_xaxis_transform()


def _legend(axes: Axes) -> Any:
    return axes.get_legend_handles_labels()


def _known(story: SearchStory) -> list[tuple[TrialStory, float]]:
    """The trials that were evaluated with their best value, the best first."""
    mode = story.config.mode
    return [(trial, best.value) for trial in story.ranked() if (best := trial.best(mode)) is not None]


def _groups(story: SearchStory, known: Sequence[tuple[TrialStory, float]]) -> dict[str, tuple[dict[str, Any], Any]]:
    """What is drawn alike: by its name in the legend how it looks, and its trials with their values."""
    groups: dict[str, tuple[dict[str, Any], Any]] = {}
    for number, rung in enumerate(story.rungs):
        cut = [(trial, value) for trial, value in known if trial.cut and trial.cut.rung == rung]
        grey = f"{0.75 - 0.55 * number / max(1, len(story.rungs) - 1):.2f}"
        groups[f"cut at {story.unit} {rung}"] = ({"color": grey, "marker": _MARKERS["pruned"], "zorder": 2}, cut)
    for kind, marker in _MARKERS.items():
        others = [(trial, value) for trial, value in known if not trial.cut and _kind(trial) == kind]
        edge = {} if marker == "x" else {"edgecolors": "white", "linewidths": 0.6}
        groups[_LABELS.get(kind, kind)] = ({"color": _COLOURS[kind], "marker": marker, "zorder": 3, **edge}, others)
    return {name: (style, trials) for name, (style, trials) in groups.items() if trials}


def _kind(trial: TrialStory) -> str:
    return trial.outcome if trial.outcome in _MARKERS else "unfinished"


def _name_ends(axes: Axes, trials: Sequence[TrialStory], max_t: int) -> None:
    """Write trials' names where their curves end, moved apart where they would cover each other."""
    from matplotlib.patheffects import withStroke

    low, high = axes.get_ylim()
    gap = 0.045 * (high - low)
    highest: dict[int, float] = {}
    ends = [(trial.curve[-1].value, number) for number, trial in enumerate(trials)]
    for value, number in sorted(end for end in ends if not math.isnan(end[0])):
        t = trials[number].t
        highest[t] = place = max(value, highest.get(t, -math.inf) + gap)
        axes.annotate(trials[number].name, (t, value), xytext=(t + 0.015 * max_t, place), va="center", fontsize=8,
                      color=_BEST if number == 0 else "0.25", zorder=6,
                      path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip


def _set_axis(axes: Axes, distribution: Distribution) -> Any:
    """Set up the x axis for a key; give the function from a trial and its value to a position."""
    kind, values = kind_of(distribution)
    if kind != "choice":
        low, high = extremes(distribution)
        if kind == "loguniform":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
        else:
            axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        return lambda trial, value: value
    axes.set_xticks(range(len(values)), [show(value) for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)
    return lambda trial, value: values.index(value) + 0.3 * _jitter(trial)


def _jitter(trial: TrialStory) -> float:
    """A number from -0.5 to 0.5 that is always the same for a trial: equal choices do not cover each other."""
    return random.Random(trial.name).random() - 0.5


def _height(trial: TrialStory, key: str, distribution: Distribution) -> float:
    """Where a trial's line crosses the axis of a key."""
    if key not in trial.values:
        return _GAP
    place = _place(distribution, trial.values[key])
    kind, values = kind_of(distribution)
    return place + 0.12 / max(1, len(values) - 1) * _jitter(trial) if kind == "choice" else place


def _place(distribution: Distribution, value: Any) -> float:
    """A value as a number from 0 to 1, on a logarithmic axis where it was drawn on one."""
    kind, values = kind_of(distribution)
    if kind == "choice":
        return float(values.index(value) / (len(values) - 1)) if len(values) > 1 else 0.5
    low, high = extremes(distribution)
    if kind == "loguniform":
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def _ticks(distribution: Distribution) -> list[tuple[float, str]]:
    kind, values = kind_of(distribution)
    if kind == "choice":
        return [(_place(distribution, value), show(value)) for value in values]
    low, high = extremes(distribution)
    if kind == "loguniform":
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        inner = [10.0**decade for decade in decades if low * 1.3 < 10.0**decade < high / 1.3]
        shown: Iterable[float] = [low, *inner, high]
    else:
        shown = range(low, high + 1) if kind == "int" and high - low <= MAX_GRID_INT else _round(low, high)
    return [(_place(distribution, value), f"{value:.4g}") for value in shown]


def _round(low: float, high: float) -> list[float]:
    """Round numbers between two, and these."""
    from matplotlib.ticker import MaxNLocator

    if high <= low:
        return [low]
    margin = 0.07 * (high - low)
    inner = [float(v) for v in MaxNLocator(4).tick_values(low, high) if low + margin < v < high - margin]
    return [low, *inner, high]


def _colour_map() -> Any:
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    first, last = _MAP_ENDS
    return ListedColormap(mpl.colormaps["viridis"]([first + (last - first) * n / 255 for n in range(256)]))


def _draw_axis(axes: Axes, number: int, name: str, ticks: Iterable[tuple[float, str]], *, right: bool = False) -> None:
    axes.plot([number, number], [0, 1], color="0.3", linewidth=1.0, zorder=2)
    for place, label in ticks:
        axes.plot([number - 0.02, number + 0.02], [place, place], color="0.3", linewidth=1.0, zorder=2)
        _tick(axes, number, place, label, right=right)
    section, _, last = name.rpartition(".")
    axes.text(number, 1.05, f"{section}.\n{last}" if section else name, fontsize=8.5, ha="center", va="bottom")


def _tick(axes: Axes, number: int, place: float, label: str, *, right: bool = False) -> None:
    x, side = (number + 0.05, "left") if right else (number - 0.05, "right")
    axes.text(x, place, label, fontsize=8, ha=side, va="center", color="0.2", zorder=5,
              bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8})  # fmt: skip
