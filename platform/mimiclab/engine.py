"""One training step and one evaluation pass. Needs torch and a detector; knows neither Ray nor files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimicdet.interface import Detections, Detector
from mimiclab.optim import OptimConfig


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch.

    Attributes:
        images: uint8 (3, H, W) each, sizes may differ; may be empty.
        targets: boxes (M, 4) float32 xyxy pixels, labels (M,) int64 from 0, iscrowd (M,) bool and key, an
            int64 scalar, of each image.
        pad_to: (H, W) that the global batch is padded to.
        image_ids: of each image, for messages and evaluation.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    pad_to: tuple[int, int]
    image_ids: list[int]


class NonFiniteLossError(RuntimeError):
    """A loss or the gradient became NaN or infinite; the message names step, images and losses."""


class _Objective(nn.Module):
    """What is minimised, as one module, so that DistributedDataParallel sees a forward pass."""

    def __init__(self, detector: Detector, global_batch: int, world: int) -> None:
        super().__init__()
        self.detector = detector
        self.share = world / global_batch

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rank's loss and the sums over its images of every loss and metric."""
        terms = self.detector.loss_terms(batch.images, batch.targets, pad_to=batch.pad_to)
        sums = {name: values.sum() for name, values in {**terms.losses, **terms.metrics}.items()}
        # A sum over the slice, scaled so that the average over ranks that DDP takes is the mean over the
        # global batch, also when slices are uneven.
        total = torch.stack([sums[name] for name in terms.losses]).sum() * self.share
        return total, sums


class Engine:
    """A detector with its optimizer at a step of its schedule."""

    def __init__(self, detector: Detector, config: OptimConfig, *, num_steps: int, steps_per_epoch: float) -> None:
        """Prepare training.

        Args:
            detector: on its device already.
            config: the `optim:` section.
            num_steps: length of the run, for the schedule.
            steps_per_epoch: for milestones, which count epochs.
        """
        self.detector = detector
        self.config = config
        self.num_steps = num_steps
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.optimizer = build_optimizer(detector, config)
        self._objective: nn.Module = _Objective(detector, config.global_batch, self.world)
        if self.world > 1:
            # find_unused_parameters: a step in which no box reads some level leaves weights without gradient;
            # it also keeps the buckets as first laid out, so that a resumed process adds up in the same order.
            self._objective = DistributedDataParallel(
                self._objective, find_unused_parameters=True, broadcast_buffers=False
            )

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """Advance by one global step.

        Returns:
            Means over the global batch of every loss and metric, with `loss` their weighted sum, `lr` and
            `grad_norm` (before clipping); scalar tensors without gradient, the same on every rank.

        Raises:
            NonFiniteLossError: before the weights are touched.
        """
        self.detector.train()
        lr = learning_rate(self.step, self.config, self.num_steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        total, sums = self._objective(batch)
        means = self._reduce({"loss": total.detach() / self._share, **sums})
        self._check_finite(means, batch)
        total.backward()
        parameters = [p for p in self.detector.parameters() if p.grad is not None]
        limit = self.config.clip_norm if self.config.clip_norm is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        # A finite loss can have a gradient that is not; the next checkpoint would hold broken weights.
        self._check_finite({"grad_norm": norm}, batch)
        self.optimizer.step()
        self.step += 1
        return {**means, "lr": torch.tensor(lr), "grad_norm": norm.detach()}

    def _check_finite(self, values: Mapping[str, Tensor], batch: Batch) -> None:
        if not all(torch.isfinite(value) for value in values.values()):
            broken = {name: float(value) for name, value in values.items() if not torch.isfinite(value)}
            raise NonFiniteLossError(
                f"step {self.step + 1}: {broken} over the global batch; this rank's images are {batch.image_ids}"
            )

    @property
    def _share(self) -> float:
        return self.world / self.config.global_batch

    def _reduce(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        packed = torch.stack([value.detach().float() for value in sums.values()])
        if self.world > 1:
            dist.all_reduce(packed)
        return dict(zip(sums, packed / self.config.global_batch, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the detector's weights that the next step depends on."""
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; the detector's weights are loaded separately."""
        self.step = int(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_optimizer(detector: Detector, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over what is trainable; biases and normalisation (1-d weights) are not decayed.

    Fused: the loop over some hundred small tensors is a tenth of a step on small machines.
    """
    trainable = [p for p in detector.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(step: int, config: OptimConfig, num_steps: int, steps_per_epoch: float) -> float:
    """Learning rate of a step (from 0): linear warm-up times the schedule."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine":
        factor = (1 + cos(pi * min(1.0, step / num_steps))) / 2
    elif config.schedule == "step":
        factor = config.gamma ** sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    else:
        factor = 1.0
    return config.lr * warmup * factor


@torch.no_grad()
def evaluate_pass(detector: Detector, batches: Iterable[Batch], *, topk: int) -> Iterator[dict[str, list[Detections]]]:
    """Yield each batch's detections by head; see `Detector.detect_heads`."""
    detector.eval()
    for batch in batches:
        yield detector.detect_heads(batch.images, topk=topk, pad_to=batch.pad_to)
