"""One training step and one evaluation pass. Needs torch and a detector; knows neither Ray nor files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimicdet.interface import Detections, Detector
from mimiclab.errors import NoRetryError, UserError
from mimiclab.optim import OptimConfig


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch.

    Attributes:
        images: uint8 (3, H, W) each, sizes may differ.
        targets: boxes (M, 4) float32 xyxy pixels, labels (M,) int64 from 0, iscrowd (M,) bool and key, an
            int64 scalar, of each image.
        pad_to: (H, W) that the global batch is padded to.
        image_ids: of each image, for messages and evaluation.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    pad_to: tuple[int, int]
    image_ids: list[int]

    def parts(self, size: int | None) -> list[Batch]:
        """Cut into batches of at most `size` images, which share their tensors with this one; None cuts nothing."""
        num = len(self.images)
        if size is None or num <= size:
            return [self]
        cuts = [slice(start, start + size) for start in range(0, num, size)]
        return [Batch(self.images[cut], self.targets[cut], self.pad_to, self.image_ids[cut]) for cut in cuts]


class NonFiniteLossError(NoRetryError):
    """A loss or the gradient became NaN or infinite; the message names step, images and losses."""


AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What each `optim.precision` lets matrix products be computed in."""
# Below this scale an overflow is no longer the scale's fault: the gradient itself is broken.
_MIN_LOSS_SCALE = 1.0


class _Objective(nn.Module):
    """What is minimised, as one module, so that DistributedDataParallel sees a forward pass."""

    def __init__(self, detector: Detector, config: OptimConfig, world: int) -> None:
        super().__init__()
        self.detector = detector
        self.share = world / config.global_batch
        self.dtype = AUTOCAST[config.precision]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the batch's loss, the sums over its images of every loss and metric, and which images are sound."""
        kind = next(self.detector.parameters()).device.type
        with torch.autocast(kind, dtype=self.dtype, enabled=self.dtype is not None):
            terms = self.detector.loss_terms(batch.images, batch.targets, pad_to=batch.pad_to)
        sums = {name: values.sum() for name, values in {**terms.losses, **terms.metrics}.items()}
        # DDP averages over ranks, whose slices may be uneven: scaled like this, that average is the mean over all
        # images of the global batch.
        total = torch.stack([sums[name] for name in terms.losses]).sum() * self.share
        sound = torch.stack([values.detach() for values in terms.losses.values()]).isfinite().all(0)
        # Detached: what is kept for the report must not keep the graph.
        told = {"loss": total.detach() / self.share, **{name: value.detach() for name, value in sums.items()}}
        return total, told, sound


class Engine:
    """A detector with its optimizer at a step of its schedule.

    Attributes:
        detector: what is trained.
        evaluated: what is to be evaluated, saved as weights and deployed: with `ema_decay` the average of what
            `detector` has been, else `detector` itself.
        step: number of steps done.
        signal: sum over ranks of what they said with the last step.
    """

    def __init__(
        self,
        detector: Detector,
        config: OptimConfig,
        *,
        num_steps: int,
        steps_per_epoch: float,
        micro_batch: int | None = None,
    ) -> None:
        """Prepare training.

        Args:
            detector: on its device already, with the weights to start from.
            config: the `optim:` section.
            num_steps: length of the run, for the schedule.
            steps_per_epoch: for milestones, which count epochs.
            micro_batch: most images that are put through at once; a larger slice of the global batch goes in parts,
                whose gradients are added up. None puts the slice through whole. Of a detector whose losses are per
                image, as MimicDet's, the step is the same but for floating-point order.

        Raises:
            UserError: `micro_batch` is no number of images, or the detector has norms over the batch.
        """
        if micro_batch is not None:
            _check_micro_batch(detector, micro_batch)
        self.detector = detector
        self.evaluated = detector if config.ema_decay is None else _average_of(detector)
        self.config = config
        self.num_steps = num_steps
        self.steps_per_epoch = steps_per_epoch
        self.micro_batch = micro_batch
        self.step = 0
        self.signal = 0.0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.optimizer = build_optimizer(detector, config)
        kind = self.device.type
        # fp16's smallest numbers are too large for most gradients. Disabled, it passes everything through.
        self._scaler = torch.amp.GradScaler(kind, enabled=config.precision == "fp16")
        self._objective: nn.Module = _Objective(detector, config, self.world)
        if self.world > 1:
            # find_unused_parameters: a step in which no box reads some level leaves weights without gradient;
            # it also keeps the buckets as first laid out, so that a resumed process adds up in the same order.
            self._objective = DistributedDataParallel(
                self._objective, find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    @property
    def device(self) -> torch.device:
        """Where the detector is."""
        return next(self.detector.parameters()).device

    def train_step(self, batch: Batch, signal: float = 0.0) -> dict[str, Tensor]:
        """Advance by one global step.

        With fp16 a step whose scaled gradient overflows leaves the weights alone and halves the scale.

        Args:
            batch: the rank's slice of the global batch, one image or more.
            signal: what this rank has to tell all others, read by each as `self.signal` after the same step; whole
                numbers are added up exactly.

        Returns:
            Means over the global batch of every loss and metric, with `loss` their weighted sum, `lr` and
            `grad_norm` (before clipping; left out where fp16 overflowed), and with fp16 `loss_scale`; scalar
            tensors without gradient, the same on every rank.

        Raises:
            NonFiniteLossError: before the weights are touched, on all ranks.
        """
        self.detector.train()
        self.detector.at_step(self.step)
        lr = learning_rate(self.step, self.config, self.num_steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        sums, sound = [], []
        *parts, last = batch.parts(self.micro_batch)
        for part in parts:  # ranks may have different numbers of them: no collectives here
            with self._unshared():
                total, told, fine = self._objective(part)
                self._scaler.scale(total).backward()
            sums.append(told)
            sound.append(fine)
        total, told, fine = self._objective(last)
        # Queued before the backward pass, so that on every rank the sums precede the gradients; waited for after it, so
        # that no rank waits for the slowest one's forward pass, nor the host for a GPU's.
        packed, travelling = self._add_up([*sums, told], signal)
        self._scaler.scale(total).backward()
        if travelling is not None:
            travelling.wait()
        self.signal = float(packed[-1])
        means = dict(zip(told, packed[:-1] / self.config.global_batch, strict=True))
        self._check_finite(means, batch, torch.cat([*sound, fine]))
        self._scaler.unscale_(self.optimizer)
        parameters = [p for p in self.detector.parameters() if p.grad is not None]
        limit = self.config.clip_norm if self.config.clip_norm is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        answer = {**means, "lr": torch.tensor(lr), "grad_norm": norm.detach()}
        if self._scaler.is_enabled():
            scale = self._scaler.get_scale()
            answer["loss_scale"] = torch.tensor(scale)
            if scale > _MIN_LOSS_SCALE and not torch.isfinite(norm):
                del answer["grad_norm"]  # the scaler's to mend
        if "grad_norm" in answer:
            # A finite loss can have a gradient that is not; the next checkpoint would hold broken weights.
            self._check_finite({"grad_norm": norm}, batch)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._average()
        self.step += 1
        return answer

    def _check_finite(self, values: Mapping[str, Tensor], batch: Batch, sound: Tensor | None = None) -> None:
        if torch.stack([value.detach().float() for value in values.values()]).isfinite().all():
            return
        broken = [f"{name} is {float(value)}" for name, value in values.items() if not torch.isfinite(value)]
        good = [False] * len(batch.image_ids) if sound is None else sound.tolist()
        images = [image for image, finite in zip(batch.image_ids, good, strict=True) if not finite]
        if self.world > 1:  # the values are the same on every rank: all of them come here
            shares: list[list[int]] = [[]] * self.world
            dist.all_gather_object(shares, images)
            images = [image for share in shares for image in share]
        what = "the batch's images" if sound is None else "the images that broke"
        raise NonFiniteLossError(f"step {self.step + 1}: {', '.join(broken)} over the global batch; {what}: {images}")

    def _unshared(self) -> AbstractContextManager[object]:
        if isinstance(self._objective, DistributedDataParallel):
            return self._objective.no_sync()
        return nullcontext()

    def _add_up(self, parts: Sequence[Mapping[str, Tensor]], signal: float) -> tuple[Tensor, dist.Work | None]:
        """Sums over the rank's parts and, once that work is done, over all ranks; the last one is of the signal."""
        sums = torch.stack([torch.stack([value.float() for value in part.values()]) for part in parts]).sum(0)
        packed = torch.cat([sums, torch.full_like(sums[:1], signal)])
        return packed, dist.all_reduce(packed, async_op=True) if self.world > 1 else None

    @torch.no_grad()
    def _average(self) -> None:
        if self.config.ema_decay is None:
            return
        # A function of the step, so that nothing but the average itself is to be saved.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.evaluated.parameters()), list(self.detector.parameters()), 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """The state of `evaluated`; its tensors are those that the next step changes."""
        return self.evaluated.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Everything besides `weights` that the next step depends on; its tensors are those that it changes."""
        state = {"step": self.step, "optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        if self.evaluated is not self.detector:
            state["detector"] = self.detector.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
        """Go on from `state_dict` and `weights`; without the latter, from those that `detector` was given before."""
        if weights is not None:
            self.detector.load_state_dict(weights)
        if self.evaluated is not self.detector:
            self.evaluated.load_state_dict(self.detector.state_dict())
            self.detector.load_state_dict(state["detector"])
        self.step = int(state["step"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])


def _average_of(detector: Detector) -> Detector:
    """A copy with weights of its own, and the very buffers: statistics are averages already."""
    return deepcopy(detector, {id(buffer): buffer for buffer in detector.buffers()}).requires_grad_(False)


def _check_micro_batch(detector: Detector, micro_batch: int) -> None:
    if micro_batch < 1:
        raise UserError(f"micro_batch {micro_batch}: expected 1 image or more, or null for no limit")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in detector.modules()):
        # Statistics would be those of a part, and ranks with more parts than others would wait for them for ever.
        raise UserError(
            f"micro_batch {micro_batch}: the detector's batch norms learn from the images that are put through at "
            "once; expected null, or a norm of each image by itself, group_norm or frozen_bn"
        )


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
        # torch 2.15: where fp16 skips the first step, the fused form keeps a momentum of uninitialised memory.
        fused = config.precision != "fp16"
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
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
