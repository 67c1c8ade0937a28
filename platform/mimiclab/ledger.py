"""What the restarts of a run cost: kept by its drivers, stored with the run, shown as metrics, tags and a table.

A session is the life of one driver, an attempt that of one group of workers. A run begins with attempt 0; every later
attempt is a restart of that number, whatever brought it about. Time in which no driver ran is nobody's: it counts
neither in the goodput nor in a recovery.

Times are seconds since 1970, of the driver's machine and of rank 0's, which are taken to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table

from mimiclab.tracking.protocol import Row

Kind = Literal["preemption", "node lost", "crash", "growth", "driver"]
"""What ended an attempt. "driver": its driver died, was stopped, or had trained all that was asked for then."""

RESTARTS, WASTED, RECOVERY, GOODPUT = "run/restarts", "run/wasted_steps", "run/recovery_seconds", "run/goodput"
"""Metrics of a run over the number of its attempt."""

_MAX_TAG_LENGTH = 500


@dataclass
class Session:
    """The life of a driver."""

    start: float
    end: float | None = None


@dataclass
class Failure:
    """What ended an attempt."""

    time: float
    kind: Kind
    reason: str
    """A line for people."""


@dataclass
class Attempt:
    """The life of a group of workers."""

    start: float
    world_size: int
    from_step: int
    """Steps done by the checkpoint that it went on from; 0 without one."""
    step: int
    """The last step done."""
    useful_s: float
    """Seconds of training by that step, less those of steps that were repeated."""
    first_step: float | None = None
    """Time at which its first step was done."""
    last_step: float | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Restart:
    """A restart and what it cost."""

    number: int
    """From 1."""
    failure: Failure
    world_size: int
    from_step: int
    wasted_steps: int
    """Steps that were done, and done again."""
    recovered: float | None
    """Time of the next step that any attempt did; None while there is none."""
    recovery_s: float | None
    """Seconds from the failure to that step."""


@dataclass
class Ledger:
    """The facts, entered in the order in which they came about, and what follows from them."""

    sessions: list[Session] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Ledger:
        """Read what `to_record` gave; of an empty record, an empty ledger.

        Raises:
            KeyError, TypeError: it is none of those.
        """
        if not record:
            return cls()
        attempts = [
            Attempt(**{**attempt, "failure": Failure(**attempt["failure"]) if attempt["failure"] else None})
            for attempt in record["attempts"]
        ]
        return cls([Session(**session) for session in record["sessions"]], attempts)

    def to_record(self) -> dict[str, Any]:
        """The ledger in plain values, for JSON."""
        return asdict(self)

    # ---- entering facts ----

    def start_session(self, time: float, *, heard: float | None = None, reason: str = "its driver died") -> None:
        """A driver begins. If one before it never ended, it died.

        Args:
            time: now.
            heard: when the one before was last heard of, if it was by other means than this ledger.
            reason: what is known about its end.
        """
        if self.sessions:
            last = self.sessions[-1]
            if last.end is None:
                last.end = max(heard or 0.0, self._last_entry())
            else:
                reason = "the run was started again"
            self.failed(last.end, "driver", reason)
        self.sessions.append(Session(time))

    def end_session(self, time: float) -> None:
        """The driver ends in good order, whatever became of the training."""
        self.sessions[-1].end = time

    def start_attempt(self, time: float, *, world_size: int, from_step: int, useful_s: float) -> None:
        """Workers begin.

        Args:
            time: now.
            world_size: how many.
            from_step: steps done by the checkpoint that they go on from; 0 without one.
            useful_s: useful seconds that this checkpoint says; 0 without one.
        """
        if self.attempts:
            self.failed(self._last_entry(), "crash", "its workers ended, for a reason that nobody told")
        self.attempts.append(Attempt(time, world_size, from_step, from_step, useful_s))

    def reached(self, time: float, step: int, useful_s: float) -> None:
        """The workers have done a step; `useful_s` as rank 0 counts, from what its checkpoint said."""
        attempt = self.attempts[-1]
        attempt.first_step = time if attempt.first_step is None else attempt.first_step
        attempt.last_step, attempt.step, attempt.useful_s = time, step, useful_s

    def failed(self, time: float, kind: Kind, reason: str) -> None:
        """Something ended the attempt. What comes after the first failure of an attempt follows from it."""
        if self.attempts and self.attempts[-1].failure is None:
            self.attempts[-1].failure = Failure(time, kind, reason)

    # ---- what follows ----

    @property
    def wasted_steps(self) -> int:
        """Steps that were done, and done again after a restart."""
        return sum(restart.wasted_steps for restart in self.restarts())

    @property
    def goodput(self) -> float | None:
        """Useful time by the time of all sessions, up to the last entry; None before there is any."""
        total = self._driven(self._last_entry()) if self.sessions else 0.0
        return self.attempts[-1].useful_s / total if total > 0 and self.attempts else None

    def restarts(self) -> list[Restart]:
        """Every attempt but the first, and what it cost."""
        found = []
        for number in range(1, len(self.attempts)):
            before, attempt = self.attempts[number - 1 : number + 1]
            assert before.failure is not None  # by start_attempt
            nexts = (later.first_step for later in self.attempts[number:] if later.first_step is not None)
            recovered = next(nexts, None)
            recovery_s = None if recovered is None else self._driven(recovered) - self._driven(before.failure.time)
            found.append(
                Restart(
                    number,
                    before.failure,
                    attempt.world_size,
                    attempt.from_step,
                    max(0, before.step - attempt.from_step),
                    recovered,
                    recovery_s,
                )
            )
        return found

    def rows(self) -> list[Row]:
        """Metrics by the number of the attempt, in order; what was a row once stays the same row.

        Restarts and wasted steps so far are known when an attempt begins, its recovery at the next step, the goodput
        up to its end at that end. Steps past the last checkpoint still count as useful there: no one knows yet that
        they are repeated. The row of the next attempt takes them back.
        """
        rows = [Row(name, 0.0, _ms(attempt.start), 0) for attempt in self.attempts[:1] for name in (RESTARTS, WASTED)]
        wasted = 0
        for restart in self.restarts():
            wasted += restart.wasted_steps
            start = _ms(self.attempts[restart.number].start)
            rows.append(Row(RESTARTS, float(restart.number), start, restart.number))
            rows.append(Row(WASTED, float(wasted), start, restart.number))
            if restart.recovered is not None and restart.recovery_s is not None:
                rows.append(Row(RECOVERY, restart.recovery_s, _ms(restart.recovered), restart.number))
        for number, attempt in enumerate(self.attempts):
            end = attempt.failure.time if attempt.failure else self.sessions[-1].end
            if end is not None and self._driven(end) > 0:
                rows.append(Row(GOODPUT, attempt.useful_s / self._driven(end), _ms(end), number))
        return rows

    def tags(self) -> dict[str, str]:
        """Why there was each restart, by `restart.NUMBER`."""
        return {
            f"restart.{restart.number}": f"{restart.failure.kind}: {restart.failure.reason}"[:_MAX_TAG_LENGTH]
            for restart in self.restarts()
        }

    def table(self) -> Table:
        """An attempt in each row: why it began, and what that cost."""
        goodput = "" if self.goodput is None else f", goodput {100 * self.goodput:.1f} %"
        title = f"{_counted(len(self.restarts()), 'restart')}, {_counted(self.wasted_steps, 'step')} repeated{goodput}"
        table = Table("", "after", "what happened", title=title, title_justify="left")
        for name in ("workers", "from step", "repeated", "next step"):
            table.add_column(name, justify="right")
        for attempt in self.attempts[:1]:
            table.add_row("0", "", "started", str(attempt.world_size), str(attempt.from_step), "", "")
        for restart in self.restarts():
            table.add_row(
                str(restart.number),
                f"{self._driven(restart.failure.time):.1f} s",
                f"{restart.failure.kind}: {restart.failure.reason}",
                str(restart.world_size),
                str(restart.from_step),
                str(restart.wasted_steps),
                "" if restart.recovery_s is None else f"{restart.recovery_s:.1f} s",
            )
        return table

    def _driven(self, until: float) -> float:
        """Seconds of all sessions before a time."""
        ends = [until if session.end is None else min(until, session.end) for session in self.sessions]
        return sum(max(0.0, end - session.start) for session, end in zip(self.sessions, ends, strict=True))

    def _last_entry(self) -> float:
        session = self.sessions[-1]
        times = [session.start, session.end]
        for attempt in self.attempts[-1:]:
            times += [attempt.start, attempt.last_step, attempt.failure.time if attempt.failure else None]
        return max(time for time in times if time is not None)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _counted(num: int, thing: str) -> str:
    return f"{num} {thing}{'' if num == 1 else 's'}"
