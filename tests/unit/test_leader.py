"""What rank 0 does besides training, without a run around it."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tinyruns import tiny
from torch import Tensor

from mimiclab import checkpoint
from mimiclab.inbox import Inbox
from mimiclab.leader import Leader
from mimiclab.preemption import LeavingError
from mimiclab.saver import Saver


class Engine:
    """As much of one as a checkpoint takes."""

    step = 3

    def weights(self) -> dict[str, Tensor]:
        return {"w": torch.zeros(1)}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}


@pytest.mark.parametrize("hangs", [True, False])
def test_a_checkpoint_that_hangs_keeps_nobody_from_leaving(tmp_path: Path, hangs: bool) -> None:
    """The other ranks wait as long as `scale.collective_timeout_s`, in one collective for all of it."""
    opened = threading.Event()

    def hang() -> dict[str, Any]:
        opened.wait(60)
        return {}

    experiment = tiny(tmp_path, "scale.collective_timeout_s=1")
    split = SimpleNamespace(content="a", classes=("a",))
    leader = Leader(experiment, str(tmp_path), "", "", Inbox(None), SimpleNamespace(train=split, val=split))
    leader._saver = saver = Saver(tmp_path / "checkpoints", keep=2, warn=pytest.fail, before=hang)
    leader._leaving = LeavingError("preemption", "node 1 announced to go")
    saver.snapshot({"w": torch.zeros(1)}, {"step": 2}, {"step": 2, "classes": ["a"]})
    if not hangs:
        opened.set()

    started = time.perf_counter()
    why = leader.leave(Engine())

    assert time.perf_counter() - started < 1
    assert why is leader._leaving
    newest = checkpoint.latest(tmp_path / "checkpoints", warn=pytest.fail)
    assert newest is None if hangs else newest.step == 3
    opened.set()
    saver.flush(60)
