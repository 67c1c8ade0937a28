"""What a driver does with what its workers tell: it shows it, writes it down, and keeps account of restarts."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from types import TracebackType

from rich.console import Console

from mimiclab.errors import UserError
from mimiclab.inbox import Event
from mimiclab.lease import Lease
from mimiclab.ledger import Ledger
from mimiclab.progress import ProgressLog, ProgressView
from mimiclab.runs import Run


class Books:
    """A driver's account of its run, from `with` to its end.

    Args:
        ledger: of the run's earlier drivers.
        lease: the driver's; it says how the one before ended.
        run: where the log goes, and the ledger for the next driver.
        console: shows progress.
    """

    def __init__(self, ledger: Ledger, lease: Lease, run: Run, console: Console) -> None:
        self.ledger = ledger
        self._lease = lease
        self._console = console
        self._run = run
        self._log = ProgressLog(run.storage)
        self._view = ProgressView(console)
        self._tracebacks: list[str] = []

    def __enter__(self) -> Books:
        before = self._lease.before
        if before is not None and self.ledger.attempts:
            attempt = self.ledger.attempts[-1]
            if attempt.failure is None and before.step > attempt.step:
                self.ledger.reached(before.heartbeat, before.step, before.seconds)
        self.ledger.start_session(time.time(), heard=before.heartbeat if before else None)
        self._view.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._view.__exit__()
        if isinstance(error, KeyboardInterrupt):
            self.ledger.failed(time.time(), "driver", str(error) or "stopped by Ctrl-C")
        self.ledger.end_session(time.time())
        self._log.close()
        if error is not None and not isinstance(error, UserError | KeyboardInterrupt) and self._tracebacks:
            self._console.print(self._tracebacks[0], highlight=False, markup=False)
        if self.ledger.restarts():
            self._console.print(self.ledger.table())

    def enter(self, event: Event) -> None:
        """Take note of an event.

        Raises:
            UserError: another driver has taken the run.
        """
        if self._lease.lost is not None:
            raise UserError(f"{self._lease.lost} has taken this run, which it may when this driver is not heard of")
        kind, at = event["kind"], event["time"]
        if kind == "tick":
            return
        self._log.write(event)
        if kind == "step":
            is_first = self.ledger.attempts[-1].first_step is None
            self.ledger.reached(at, event["step"], event["useful_s"])
            if is_first:
                self._keep()
            self._lease.note(event["step"], event["useful_s"])
        elif kind == "attempt":
            self._tracebacks = []
            self.ledger.start_attempt(
                at, world_size=event["world"], from_step=event["step"], useful_s=event["useful_s"]
            )
            self._keep()
        elif kind == "failure":
            self.ledger.failed(at, event["why"], event["reason"])
            self._keep()
            self._view.say(f"{event['why']}: {event['reason']}")
        elif kind == "traceback":
            self._tracebacks.append(f"rank {event['rank']}:\n{event['text']}")
        self._view.show(event)

    def _keep(self) -> None:
        # A store that is full or away for a while ends no run; what it missed comes with the next record.
        with contextlib.suppress(UserError):
            replace(self._run, ledger=self.ledger.to_record()).write()
