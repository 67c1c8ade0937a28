"""The timeline of a drill: how far both runs were, and what happened when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mimiclab.drill.story import Story

_COLOURS = {"undisturbed": "0.6", "disturbed": "tab:blue", "kill": "tab:red", "drain": "tab:orange", "add": "tab:green"}


def draw_timeline(path: Path, title: str, undisturbed: Sequence[tuple[float, int]], story: Story) -> None:
    """Write the figure as a PNG file.

    Args:
        path: of the file.
        title: above it.
        undisturbed: (time, step) of each of the undisturbed run's steps, seconds since 1970.
        story: of the disturbed run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, steps in (("undisturbed", undisturbed), ("disturbed", story.steps)):
        start = steps[0][0] if steps else 0.0
        seconds = [time - start for time, _ in steps]
        axes.plot(seconds, [step for _, step in steps], color=_COLOURS[name], label=name, linewidth=1.5)
    start = story.steps[0][0] if story.steps else 0.0
    for restart in story.restarts:
        if restart.first_step is not None:
            axes.axvspan(restart.last_step - start, restart.first_step - start, color="0.92", linewidth=0)
    for blow in story.blows:
        colour = _COLOURS[blow.event.kind.partition("-")[0]]
        axes.axvline(blow.time - start, color=colour, linestyle="--", linewidth=1)
        # Along the top, where the curves are only at the end.
        axes.text(blow.time - start, 0.99, f" {blow.event}", color=colour, rotation=90, va="top", ha="right",
                  transform=axes.get_xaxis_transform(), fontsize=8)  # fmt: skip
    axes.set_xlabel("seconds since the first step")
    axes.set_ylabel("step")
    axes.set_title(title)
    axes.legend(loc="lower right")
    axes.margins(x=0.02)
    figure.savefig(path, dpi=120)
