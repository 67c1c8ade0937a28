"""Mimic loss: the student's answer for a box is drawn towards the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimicdet.anchors import full_precision
from mimicdet.config import MimicConfig
from mimicdet.student import HeadOutput

EPS = 1e-6


def mimic_losses(student: HeadOutput, teacher: HeadOutput, config: MimicConfig) -> tuple[Tensor, Tensor]:
    """1 - cos(student, teacher) of n paired boxes: (n,) on the class logits, (n,) on the regression feature."""
    if config.detach_teacher:
        teacher = HeadOutput(teacher.logits.detach(), teacher.deltas.detach(), teacher.feature.detach())
    ours, theirs = student.logits, teacher.logits
    if config.centered_logits:
        ours, theirs = ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
    mine, wanted = student.feature, teacher.feature
    if not config.before_relu:
        mine, wanted = F.relu(mine), F.relu(wanted)
    return 1 - cosine(ours, theirs), 1 - cosine(mine, wanted)


def warmup(step: int, config: MimicConfig) -> float:
    """Factor of both mimic weights at a training step (from 0): 1 / (W + 1) at first, 1 after W = `warmup_steps`."""
    return min(1.0, (step + 1) / (config.warmup_steps + 1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine (n,) between the rows of (n, F), never in half precision, norms bounded below by EPS."""
    a, b = full_precision(a), full_precision(b)
    return (a * b).sum(1) / (_norm(a) * _norm(b))


def _norm(x: Tensor) -> Tensor:
    # Under the root, so that a row of zeros has a gradient of zero rather than none at all.
    return torch.sqrt((x * x).sum(1) + EPS**2)
