"""What a drill found: which contracts hold, a table for people, the same facts as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from mimiclab.drill.compare import Difference, TensorDifference
from mimiclab.drill.schedule import KILLS
from mimiclab.drill.story import Blow, Restart, Story

MAX_REPEATED_OF_NOTICE = 1
_MAX_NAMED = 5


@dataclass(frozen=True)
class Check:
    """A contract, and whether it holds."""

    contract: str
    broken: str = ""
    """What breaks it; "" where nothing does."""


@dataclass(frozen=True)
class Outcome:
    """How one of the two runs ended."""

    name: str
    exit_code: int
    """Of its driver."""
    step: int
    """Of its last checkpoint; 0 without one."""
    restarts: int
    goodput: float | None
    """Useful time by all time, see `mimiclab.ledger`."""
    seconds: float
    """From its first driver's start to the last one's end."""


@dataclass(frozen=True)
class Findings:
    """All that a drill found."""

    undisturbed: Outcome
    disturbed: Outcome
    num_steps: int
    num_workers: int
    every_steps: int
    """`checkpoint.every_steps`."""
    tolerance: float
    """Largest difference of AP that is allowed where the number of workers changed."""
    story: Story
    """Of the disturbed run."""
    histories: list[Difference] = field(default_factory=list)
    weights: TensorDifference | None = None
    """None where one of the runs has no checkpoint; so are the next two."""
    state: TensorDifference | None = None
    """Of the optimizer and whatever else is in a checkpoint."""
    ap: dict[str, float] | None = None
    """Disturbed minus undisturbed, of each head's last evaluation."""

    @property
    def same_size(self) -> bool:
        """Whether the disturbed run had as many workers as the other all the time."""
        return set(self.story.worlds) <= {self.num_workers}

    @property
    def hold(self) -> bool:
        """Whether all contracts do."""
        return not any(check.broken for check in self.checks())

    def checks(self) -> list[Check]:
        """The contracts, in the order in which they build on each other."""
        found = [
            Check("the undisturbed run is trained to its end without a restart", self._undisturbed()),
            Check("the disturbed run is trained to its end", self._completed(self.disturbed)),
            Check("history: no step missing, none twice", self._history("missing", "duplicate", "extra")),
            Check(
                "history: the same values" if self.same_size else "history: the same learning rates and epochs",
                self._history("differing"),
            ),
            Check(
                f"at most {self.every_steps} steps repeated after a kill",
                self._repeated(self.every_steps, after_kills=True),
            ),
            Check("at most 1 step repeated after a notice", self._repeated(MAX_REPEATED_OF_NOTICE, after_kills=False)),
        ]
        if self.same_size:
            found.append(Check("weights: the same bits", _different(self.weights)))
            found.append(Check("optimizer: the same bits", _different(self.state)))
        else:
            found.append(Check(f"AP: within {self.tolerance:g}", self._ap()))
        return found

    def _undisturbed(self) -> str:
        num = self.undisturbed.restarts
        return self._completed(self.undisturbed) or (f"{num} restart{'s' if num > 1 else ''}" if num else "")

    def _completed(self, run: Outcome) -> str:
        if run.exit_code:
            return f"{run.name}: its driver ended with exit code {run.exit_code}"
        return "" if run.step == self.num_steps else f"{run.name}: it ended at step {run.step} of {self.num_steps}"

    def _history(self, *kinds: str) -> str:
        only = [Difference(each.series, **{kind: getattr(each, kind) for kind in kinds}) for each in self.histories]
        return _named([str(each) for each in only if each != Difference(each.series)], "; ")

    def _repeated(self, limit: int, *, after_kills: bool) -> str:
        broken = []
        for restart in self.story.restarts:
            events = [blow.event for blow in self.story.blows if blow.restart is restart]
            # What nobody in the drill did counts as a kill, but for growth, before which all is saved.
            killed = any(event.kind in KILLS for event in events) or not (events or restart.why == "growth")
            if killed == after_kills and restart.repeated > limit:
                broken.append(f"{restart.repeated} after {', '.join(map(str, events)) or restart.reason}")
        return _named(broken, "; ")

    def _ap(self) -> str:
        if self.ap is None:
            return "there is no evaluation to compare"
        return _named([f"{name} {d:+.4f}" for name, d in self.ap.items() if not abs(d) <= self.tolerance])

    def as_json(self) -> dict[str, Any]:
        """The same facts in plain values; times are seconds since 1970."""
        return {
            "holds": self.hold,
            "checks": [{"contract": c.contract, "holds": not c.broken, "broken": c.broken} for c in self.checks()],
            "runs": [vars(self.undisturbed), vars(self.disturbed)],
            "num_steps": self.num_steps,
            "workers": self.story.worlds,
            "events": [_event(blow) for blow in self.story.blows],
            "unplanned": [vars(restart) for restart in self.story.unplanned],
            "steps_repeated": sum(restart.repeated for restart in self.story.restarts),
            "history_differences": [vars(each) for each in self.histories],
            "weights": None if self.weights is None else _plain(self.weights),
            "optimizer": None if self.state is None else _plain(self.state),
            "ap": None if self.ap is None else {name: _number(value) for name, value in self.ap.items()},
            "tolerance": self.tolerance,
        }


def show(findings: Findings, console: Console) -> None:
    """Print what was found."""
    console.print(_events_table(findings.story))
    for run in (findings.undisturbed, findings.disturbed):
        goodput = "" if run.goodput is None else f", goodput {100 * run.goodput:.1f} %"
        console.print(f"{run.name}: {run.seconds:.0f} s, {run.restarts} restarts{goodput}", highlight=False)
    repeated = sum(restart.repeated for restart in findings.story.restarts)
    console.print(f"steps repeated: {repeated} of {findings.num_steps}", highlight=False)
    if findings.weights is not None:
        console.print(f"largest difference of final weights: {findings.weights.largest:.3g}", highlight=False)
    for name, difference in (findings.ap or {}).items():
        console.print(f"difference of final {name}: {difference:+.4f}", highlight=False)
    for kind, what in (("missing", "holes"), ("duplicate", "duplicates")):
        num = sum(len(getattr(each, kind)) for each in findings.histories)
        console.print(f"{what} in the MLflow history: {num}", highlight=False)
    for check in findings.checks():
        if check.broken:
            console.print(f"BROKEN  {check.contract}: {check.broken}", style="red", highlight=False)
        else:
            console.print(f"holds   {check.contract}", highlight=False)


def _events_table(story: Story) -> Table:
    """A row per event. Its parts add up to the time without training but for the work between two steps."""
    title = "what was done, and seconds until training went on"
    table = Table(title=title, title_justify="left")
    table.add_column("event", no_wrap=True)
    table.add_column("what was done")
    for name in ("noticed", "waited", "started", "first step", "no training", "repeated"):
        table.add_column(name, justify="right")
    shown: list[Restart] = []
    for blow in story.blows:
        restart = blow.restart
        if restart is None:
            cells = [_seconds(blow.detection_s), "", "", "", "-", "-"]
        elif any(restart is other for other in shown):
            cells = [_seconds(blow.detection_s), "", "", "", _seconds(blow.down_s), "as above"]
        else:
            cells = [*(_seconds(s) for s in _parts(blow)), str(restart.repeated)]
            shown.append(restart)
        table.add_row(str(blow.event), blow.target, *cells)
    for restart in story.unplanned:
        table.add_row(f"{restart.why} at {restart.reached}", restart.reason, *[""] * 5, str(restart.repeated))
    return table


def _parts(blow: Blow) -> tuple[float | None, ...]:
    return blow.detection_s, blow.waiting_s, blow.start_s, blow.first_step_s, blow.down_s


def _event(blow: Blow) -> dict[str, Any]:
    names = ("detection_s", "waiting_s", "start_s", "first_step_s", "down_s")
    return {
        "event": str(blow.event),
        "time": blow.time,
        "step": blow.step,
        "target": blow.target,
        "done": blow.done,
        **dict(zip(names, _parts(blow), strict=True)),
        "restart": None if blow.restart is None else {**vars(blow.restart), "repeated": blow.restart.repeated},
    }


def _different(found: TensorDifference | None) -> str:
    if found is None:
        return "there is no checkpoint to compare"
    return _named(list(found.differing)) and (
        f"{len(found.differing)} differ, by up to {found.largest:.3g}: {_named(list(found.differing))}"
    )


def _named(found: list[str], separator: str = ", ") -> str:
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return separator.join(found[:_MAX_NAMED]) + more


def _plain(difference: TensorDifference) -> dict[str, Any]:
    return {"differing": list(difference.differing), "largest": _number(difference.largest)}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
