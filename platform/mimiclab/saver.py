"""Checkpoints while training goes on: copied in a moment, written by a thread."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mimiclab import checkpoint
from mimiclab.errors import UserError
from mimiclab.storage import Place, storage_at

MAX_FAILURES = 3
"""Checkpoints in a row that may fail before the run does."""


class Saver:
    """Saves a run's checkpoints, at most one at a time, and removes old ones after each.

    Not for several threads. A process that ends without `flush` may lose the checkpoint being written.

    Attributes:
        copied_s: Seconds that the last `snapshot` copied for, after its wait for the checkpoint before; None before it.
        written_s: Seconds from a `snapshot`, after its wait, until that checkpoint was whole; of the last one that
            was written, None before it.
    """

    def __init__(
        self,
        folder: Place,
        *,
        keep: int,
        warn: Callable[[str], None],
        before: Callable[[], Mapping[str, Any]] = dict,
        written: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Prepare.

        Args:
            folder: Holds the run's checkpoints; made when missing.
            keep: See `checkpoint.prune`.
            warn: Gets a line for each checkpoint that failed; called from another thread.
            before: Called before each is written, from there too: makes last what a checkpoint takes for granted, and
                gives more for its `meta`, which training need not wait for.
            written: Gets the step of each that was written; the same.
        """
        self._storage = storage_at(folder)
        self._keep = keep
        self._warn = warn
        self._before = before
        self._tell = written
        self._thread: threading.Thread | None = None
        self._step: int | None = None
        self._failures = 0
        self._error: BaseException | None = None
        self._whole = False
        self.copied_s: float | None = None
        self.written_s: float | None = None

    def snapshot(
        self,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
        *,
        steps: Sequence[int] = (),
        notice: bool = False,
    ) -> None:
        """Copy what a checkpoint holds; it is written while the caller goes on and changes what it gave.

        For a notice one of the same step that was written, or is about to be, is enough.

        Args:
            weights: See `checkpoint.save`, as are `state` and `meta`.
            state: Dicts and lists, nested as they like.
            meta: What JSON can hold.
            steps: Whose checkpoints are kept besides the last.
            notice: Whether a machine was announced to go.

        Raises:
            UserError: The last three checkpoints could not be written; the message names the place.
        """
        step = int(meta["step"])
        if notice and step == self._step and self._error is None:
            return
        if self._thread is not None:
            self._thread.join()
        self._give_up()
        started = time.perf_counter()
        devices: set[torch.device] = set()
        content = _to_cpu(weights, devices), _to_cpu(state, devices), json.loads(json.dumps(meta))
        for device in devices:
            torch.cuda.synchronize(device)
        self._step, self._error, self._whole = step, None, False
        self._thread = threading.Thread(
            target=self._write, args=(started, content, tuple(steps), notice), name="checkpoint", daemon=True
        )
        self._thread.start()
        self.copied_s = time.perf_counter() - started

    def wait(self, timeout_s: float) -> bool:
        """Wait until a `snapshot` would not have to; False where that takes longer."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def flush(self, timeout_s: float) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            UserError: It could not be, or is not yet.
        """
        if not self.wait(timeout_s) and not self._whole:
            raise UserError(f"checkpoint {self._storage.name}: step {self._step} is not written after {timeout_s:g} s")
        self._give_up()
        if self._error is not None:
            raise self._error

    def _give_up(self) -> None:
        if self._error is not None and not isinstance(self._error, UserError):
            raise self._error  # a bug, not the storage
        if self._failures >= MAX_FAILURES:
            raise UserError(
                f"checkpoint {self._storage.name}: the last {self._failures} could not be written ({self._error}); "
                "expected a place that takes them"
            ) from self._error

    def _write(self, started: float, content: tuple[Any, Any, Any], steps: Sequence[int], notice: bool) -> None:
        weights, state, meta = content
        try:
            checkpoint.save(self._storage, weights, state, {**meta, **self._before()}, notice=notice)
        except UserError as error:
            self._failures += 1
            self._error = error
            self._warn(f"checkpoint of step {meta['step']} failed: {error}")
            return
        except BaseException as error:  # told by the next call
            self._error = error
            return
        self._failures = 0
        self.written_s = time.perf_counter() - started
        self._tell(int(meta["step"]))
        self._whole = True  # what is still to be removed is no reason to doubt it
        try:
            checkpoint.prune(self._storage, newest=int(meta["step"]), keep=self._keep, steps=steps)
        except UserError as error:
            self._warn(f"old checkpoints stay: {error}")


def _to_cpu(value: Any, devices: set[torch.device]) -> Any:
    """A copy that shares nothing with the original, whole once the GPUs that `devices` gets are synchronized."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        if not tensor.is_cuda:
            return torch.empty_like(tensor, device="cpu").copy_(tensor)
        devices.add(tensor.device)
        # Pinned, or each copy would wait for the one before.
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to_cpu(each, devices) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(each, devices) for each in value)
    return copy.deepcopy(value)
