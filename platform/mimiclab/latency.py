"""How long the deployed detector takes for an image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator

import torch

from mimicdet.interface import Detector
from mimiclab.engine import Batch

# Of more batches nothing is timed: what is measured must not take the time of an evaluation.
_MAX_TIMED = 32


class Latency:
    """Times the deployed head on one image of each batch that passes by, alone, as it comes to a deployed detector.

    What is timed goes from the decoded and resized image in memory to its detections, with the device waited for.
    The first batch's image is detected once more before, as a warm-up. Of 8 images a batch, this adds a tenth to a
    short evaluation and next to nothing to a long one.

    Args:
        detector: in evaluation mode by the time that batches pass.
    """

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._seconds: list[float] = []

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        for batch in batches:
            if not self._seconds:
                self._time(batch)
            if len(self._seconds) < _MAX_TIMED:
                self._seconds.append(self._time(batch))
            yield batch

    def milliseconds(self) -> float:
        """The median over all that were timed; one at least must have been."""
        return 1000 * statistics.median(self._seconds)

    def _time(self, batch: Batch) -> float:
        device = next(self._detector.parameters()).device
        _finish(device)
        started = time.perf_counter()
        self._detector.detect(batch.images[:1])
        _finish(device)
        return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
