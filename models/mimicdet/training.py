"""Which refined boxes the heads learn from, and what they are charged for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mimicdet.anchors import encode
from mimicdet.assignment import Assignment, assign_proposals
from mimicdet.config import StudentConfig, TeacherConfig
from mimicdet.interface import Targets
from mimicdet.sampling import STUDENT, TEACHER, mine, priority, sample
from mimicdet.shared import Shared
from mimicdet.student import HeadOutput
from mimicdet.teacher import head_losses


@dataclass(frozen=True)
class Boxes:
    """Refined boxes of a batch, ordered by image, with what each is assigned to. All (n,)."""

    image: Tensor
    position: Tensor
    matched: Tensor
    positive: Tensor
    negative: Tensor

    @classmethod
    def of(cls, image: int, position: Tensor, assignment: Assignment) -> Boxes:
        """Boxes of one image at `position` (n,)."""
        return cls(
            torch.full_like(position, image),
            position,
            assignment.matched,
            assignment.positive,
            assignment.negative,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Boxes]) -> Boxes:
        """Join the boxes of several images, which follow each other."""
        columns = zip(*((p.image, p.position, p.matched, p.positive, p.negative) for p in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def take(self, index: Tensor) -> Boxes:
        """Those at `index` (m,)."""
        return Boxes(
            self.image[index],
            self.position[index],
            self.matched[index],
            self.positive[index],
            self.negative[index],
        )


@torch.no_grad()
def match(image: int, proposals: Tensor, shared: Shared, target: Mapping[str, Tensor], iou_threshold: float) -> Boxes:
    """All proposals (R,) of one image, assigned to its ground truth."""
    refined = shared.refined[image, proposals]
    return Boxes.of(image, proposals, assign_proposals(refined, target["boxes"], target["iscrowd"], iou_threshold))


def sample_rois(pool: Boxes, shared: Shared, num: int, key: Tensor, config: TeacherConfig) -> Tensor:
    """Index (m,) into one image's proposals: a random sample of `num`, positives to negatives as configured.

    With the same key, a smaller sample is part of a larger one.
    """
    priorities = priority(key, TEACHER, shared.grid.name[pool.position])
    return sample(pool.positive, pool.negative, num, config.positive_fraction, priorities)


def random_rank(pools: Sequence[Boxes], shared: Shared, targets: Targets) -> list[Tensor]:
    """What the student's boxes are chosen by where nothing is mined, (R,) of each image."""
    return [
        priority(target["key"], STUDENT, shared.grid.name[pool.position])
        for pool, target in zip(pools, targets, strict=True)
    ]


def mine_boxes(pools: Sequence[Boxes], ranks: Sequence[Tensor], config: StudentConfig) -> Boxes:
    """Each image's hardest boxes."""
    return Boxes.concatenate(
        [
            pool.take(mine(pool.positive, pool.negative, config.num_samples, config.positive_fraction, rank))
            for pool, rank in zip(pools, ranks, strict=True)
        ]
    )


def box_losses(
    output: HeadOutput,
    boxes: Boxes,
    shared: Shared,
    targets: Targets,
    box_std: Sequence[float],
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Classification and box loss (n,) of a head's answer for n boxes of the batch."""
    starts = list(accumulate((len(target["labels"]) for target in targets), initial=0))
    # A row behind all ground truth keeps the lookup valid: negatives of images without objects match nothing.
    labels = torch.cat([*(target["labels"] for target in targets), boxes.matched.new_zeros(1)])
    truth = torch.cat([*(target["boxes"] for target in targets), shared.grid.anchors[:1]])
    # Filled in where it is needed: a GPU would wait for each number that comes from the host.
    first = torch.cat([boxes.matched.new_full((1,), start) for start in starts])
    row = first[boxes.image] + boxes.matched
    label = torch.where(boxes.positive, labels[row], num_classes)
    refined = shared.refined[boxes.image, boxes.position]
    return head_losses(output, label, encode(truth[row], refined, box_std), num_classes)


def mean_per_image(values: Tensor, image: Tensor, num_images: int, counted: Tensor | None = None) -> Tensor:
    """Mean (N,) of values (n,) over each image's boxes, or over those that are `counted`, (n,) bool.

    Zero, attached to the graph, where there are none.
    """
    if counted is None:
        counted = torch.ones_like(image, dtype=torch.bool)
    # By sums alone: how many there are never has to be known on the host, which would wait for a GPU.
    total = values.new_zeros(num_images).index_add(0, image, values.where(counted, 0))
    return total / image.new_zeros(num_images).index_add(0, image, counted.long()).clamp(min=1)
