"""Mimic loss: the student's answer for a box is drawn towards the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

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
    return 1 - cosine(ours, theirs), 1 - cosine(student.feature, teacher.feature)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine (n,) between the rows of (n, F), in fp32, norms bounded below by EPS."""
    a, b = a.float(), b.float()
    return (a * b).sum(1) / (_norm(a) * _norm(b))


def _norm(x: Tensor) -> Tensor:
    # Under the root, so that a row of zeros has a gradient of zero rather than none at all.
    return torch.sqrt((x * x).sum(1) + EPS**2)
