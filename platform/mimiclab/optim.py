"""The `optim:` section: how the weights move. Not part of the engine, so that reading it loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import ClassVar, Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate schedule and length of a run.

    Raises:
        ValueError: a value is out of its range, or `schedule` and `milestones` do not fit together.
    """

    # Read by pydantic when the experiment's schema embeds this class.
    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    name: Literal["sgd", "adamw"] = "adamw"
    lr: float = 3e-4
    """Peak learning rate, for the global batch as it is: it is never rescaled by batch or workers."""
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """Of SGD; AdamW keeps its usual betas."""
    global_batch: int = 8
    """Images per step over all workers together."""
    epochs: int = 12
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """What the learning rate does after the warm-up."""
    milestones: tuple[int, ...] = ()
    """Epochs after which `step` multiplies the learning rate by `gamma`."""
    gamma: float = 0.1
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from near 0."""
    clip_norm: float | None = 20.0
    """Largest global norm of the gradient; None leaves it as it is."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the forward pass computes in (autocast); weights, losses and boxes stay in fp32. fp16 scales the loss."""
    ema_decay: float | None = None
    """What is evaluated, saved and deployed are the weights averaged over about the last 1 / (1 - ema_decay) steps
    (exponential moving average; EfficientDet, Tan et al. 2020, uses 0.9998); None is the last weights themselves.
    After n steps the decay is at most (1 + n) / (10 + n), so that a young average forgets where it started (as in
    TensorFlow's ExponentialMovingAverage)."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < inf, f"lr must be positive, found {self.lr}")
        _require(0 <= self.weight_decay < inf, f"weight_decay must be 0 or more, found {self.weight_decay}")
        _require(0 <= self.momentum < 1, f"momentum must be in [0, 1), found {self.momentum}")
        _require(self.global_batch >= 1, f"global_batch must be 1 or more, found {self.global_batch}")
        _require(self.epochs >= 1, f"epochs must be 1 or more, found {self.epochs}")
        _require(0 < self.gamma <= 1, f"gamma must be in (0, 1], found {self.gamma}")
        _require(self.warmup_steps >= 0, f"warmup_steps must be 0 or more, found {self.warmup_steps}")
        _require(
            self.clip_norm is None or 0 < self.clip_norm < inf,
            f"clip_norm must be positive, or null for no clipping, found {self.clip_norm}",
        )
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"ema_decay must be between 0 and 1, or null for no average, found {self.ema_decay}",
        )
        _require(
            (self.schedule == "step") == bool(self.milestones),
            "schedule step needs milestones, and no other schedule takes them, found schedule "
            f"{self.schedule} and milestones {list(self.milestones)}",
        )
        # A milestone after the last epoch is allowed: a shortened run needs no second change.
        _require(
            all(a < b for a, b in pairwise((0, *self.milestones))),
            f"milestones must be rising epochs from 1, found {list(self.milestones)}",
        )
