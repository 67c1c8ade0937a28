"""What a training engine asks of a detector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mimicdet.weights import LoadReport

Targets = Sequence[Mapping[str, Tensor]]
"""One dict per image: boxes (M, 4) xyxy pixels, labels (M,) from 0; optional iscrowd (M,) and key, see MimicDet."""

Detections = dict[str, Tensor]
"""Of one image: boxes (D, 4) xyxy pixels, scores (D,), labels (D,), best first."""


@dataclass(frozen=True)
class LossTerms:
    """What a training pass answers, by name; each value is (N,), one number per image.

    Attributes:
        losses: weighted; their sum is what is minimised.
        metrics: to look at only, without gradient.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Detector(nn.Module):
    """A detector that can be trained and scored by the engine.

    Attributes:
        class_layers: prefixes of the parameters whose shape or meaning depends on the classes.
        backbone_report: what loading the backbone's weights did; None where nothing was loaded.
    """

    class_layers: ClassVar[tuple[str, ...]] = ()
    backbone_report: LoadReport | None = None

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Targets | None = None,
        *,
        pad_to: tuple[int, int] | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Training mode: losses by name, (N,) each. Evaluation mode: detections of the deployed head.

        Args:
            images: N tensors (3, H, W).
            targets: N dicts; needed in training.
            pad_to: (H, W) that the batch is padded to; by default the largest sides, rounded up.

        Raises:
            ValueError: images or targets that mean nothing, see `inputs`, or `pad_to` smaller than an image.
        """
        if not self.training:
            return self.detect(images, pad_to=pad_to)
        if targets is None:
            raise ValueError("training needs targets, found None")
        return self.loss_terms(images, targets, pad_to=pad_to).losses

    @abstractmethod
    def loss_terms(
        self, images: Sequence[Tensor], targets: Targets, *, pad_to: tuple[int, int] | None = None
    ) -> LossTerms:
        """Losses and metrics of every image; images are (3, H, W), padded to `pad_to` = (H, W)."""

    @abstractmethod
    def detect(self, images: Sequence[Tensor], *, pad_to: tuple[int, int] | None = None) -> list[Detections]:
        """Detections of the deployed head."""

    def at_step(self, step: int) -> None:
        """Hear which training step comes next, from 0; for what changes over the steps."""

    @abstractmethod
    def detect_heads(
        self, images: Sequence[Tensor], *, topk: int, pad_to: tuple[int, int] | None = None
    ) -> dict[str, list[Detections]]:
        """Detections of every head that can be scored, by the head's name; `student` is the deployed one.

        Args:
            images: (3, H, W) each.
            topk: how many boxes per image heads of training only are evaluated on.
            pad_to: (H, W).
        """
