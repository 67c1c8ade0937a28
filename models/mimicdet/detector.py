"""MimicDet, whole: images and targets to losses, or images to detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from mimicdet.anchors import Grid, clip, decode, encode, make_grid
from mimicdet.assignment import Assignment, assign_proposals
from mimicdet.backbone import Backbone
from mimicdet.config import ModelConfig
from mimicdet.interface import Detections, Detector, LossTerms, Targets
from mimicdet.mimic import mimic_losses
from mimicdet.pyramid import Pyramid
from mimicdet.refinement import Refinement, propose, refinement_losses, top_positions
from mimicdet.sampling import TEACHER, mine, priority, sample
from mimicdet.student import Features, HeadOutput, Student
from mimicdet.teacher import Teacher, head_losses

# Mean and deviation of ImageNet's RGB in [0, 1], as torchvision's weights expect.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
# Batches are padded to a multiple of this, so that P2..P5 divide evenly.
PAD_MULTIPLE = 32


@dataclass(frozen=True)
class _Shared:
    """What both heads stand on: pyramid, positions, refinement."""

    pyramid: dict[int, Tensor]
    features: Features
    grid: Grid
    candidates: Tensor  # (N, P) bool
    objectness: Tensor  # (N, P)
    deltas: Tensor  # (N, P, 4)
    refined: Tensor  # (N, P, 4) detached


class MimicDet(Detector):
    """One-stage detector whose head imitates a two-stage head during training.

    Follows torchvision's detection convention: images are a list of (3, H, W) tensors of any size, uint8 or
    float in [0, 1]; targets are dicts with `boxes` (M, 4) float xyxy in pixels and `labels` (M,) int64, which
    here count from 0 and index the class names. Optional in a target: `iscrowd` (M,) bool marks regions that
    are neither object nor background, `key` (int64 scalar) decides every random sample for that image and is
    drawn from torch's generator where absent.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, num_classes: int, *, pretrained: bool = True) -> None:
        """Build the detector for classes 0..num_classes - 1.

        Args:
            config: its parts.
            num_classes: without background.
            pretrained: read the backbone's weights; False where a whole state is loaded next.
        """
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, found {num_classes}")
        self.config = config
        self.num_classes = num_classes
        channels = config.pyramid.channels
        self.backbone = Backbone(config.backbone, pretrained=pretrained)
        self.pyramid = Pyramid(self.backbone.channels, config.pyramid)
        self.refinement = Refinement(channels)
        self.student = Student(channels, num_classes, config.student)
        self.teacher = Teacher(channels, config.student.head_width, num_classes, config.teacher)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Targets | None = None,
        *,
        pad_to: tuple[int, int] | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Training mode: losses by name, (N,) each. Evaluation mode: the student's detections.

        Args:
            images: N tensors (3, H, W).
            targets: N dicts; needed in training.
            pad_to: (H, W) that the batch is padded to; by default the largest sides, rounded up.

        Raises:
            ValueError: no images, another number of targets, or `pad_to` smaller than an image.
        """
        if not self.training:
            return self.detect(images, pad_to=pad_to)
        if targets is None:
            raise ValueError("training needs targets, found None")
        return self.loss_terms(images, targets, pad_to=pad_to).losses

    # ---- training ----

    def loss_terms(
        self, images: Sequence[Tensor], targets: Targets, *, pad_to: tuple[int, int] | None = None
    ) -> LossTerms:
        """Compute losses and metrics of every image; see `forward` for the arguments."""
        if len(targets) != len(images):
            raise ValueError(f"every image needs a target, found {len(images)} images, {len(targets)} targets")
        shared = self._shared(images, pad_to, lowest=self.pyramid.lowest)
        device = shared.objectness.device
        targets = [_complete(target, device) for target in targets]
        refine, rois, pools = [], [], []
        for i, target in enumerate(targets):
            refine.append(
                refinement_losses(
                    shared.objectness[i],
                    shared.deltas[i],
                    shared.grid,
                    shared.candidates[i],
                    target["boxes"],
                    target["iscrowd"],
                    target["key"],
                    self.config.anchors.scale,
                    self.config.refinement,
                )
            )
            proposals = propose(
                shared.objectness[i].detach(), shared.refined[i], shared.candidates[i], self.config.refinement
            )
            rois.append(self._roi_sample(i, proposals, shared, target))
            pools.append(self._matched(i, proposals, shared, target, self.config.student.iou_threshold))
        mined = self._mine(shared, pools, targets)
        mimicked = _Boxes.concatenate(rois)

        # One evaluation of the student for the boxes it is trained on and those it imitates.
        both = self._student(
            shared, torch.cat([mined.image, mimicked.image]), torch.cat([mined.position, mimicked.position])
        )
        student, imitator = both.split([len(mined.image), len(mimicked.image)])
        teacher = self._teacher(shared, mimicked.image, mimicked.position)

        num = len(images)
        config = self.config
        student_losses = self._head_losses(student, mined, shared, targets, config.student.box_std)
        teacher_losses = self._head_losses(teacher, mimicked, shared, targets, config.teacher.box_std)
        imitation = mimic_losses(imitator, teacher, config.mimic)
        positives = mimicked.positive if config.mimic.reg_positives_only else torch.ones_like(mimicked.positive)
        mean = _mean_per_image
        losses = {
            "refine_cls": config.refinement.loss_weight * torch.stack([cls for cls, _ in refine]),
            "refine_box": config.refinement.loss_weight * torch.stack([box for _, box in refine]),
            "student_cls": config.student.loss_weight * mean(student_losses[0], mined.image, num),
            "student_box": config.student.loss_weight * mean(student_losses[1], mined.image, num),
            "teacher_cls": config.teacher.loss_weight * mean(teacher_losses[0], mimicked.image, num),
            "teacher_box": config.teacher.loss_weight * mean(teacher_losses[1], mimicked.image, num),
            "mimic_cls": config.mimic.cls_weight * mean(imitation[0], mimicked.image, num),
            "mimic_reg": config.mimic.reg_weight * mean(imitation[1][positives], mimicked.image[positives], num),
        }
        with torch.no_grad():
            metrics = {
                "cosine_cls": 1 - mean(imitation[0], mimicked.image, num),
                "cosine_reg": 1 - mean(imitation[1], mimicked.image, num),
                "mined_positives": mean(mined.positive.float(), mined.image, num),
                "roi_positives": mean(mimicked.positive.float(), mimicked.image, num),
            }
        return LossTerms(losses, metrics)

    def _roi_sample(self, i: int, proposals: Tensor, shared: _Shared, target: Mapping[str, Tensor]) -> _Boxes:
        config = self.config.teacher
        pool = self._matched(i, proposals, shared, target, config.iou_threshold)
        chosen = sample(
            pool.positive,
            pool.negative,
            config.num_rois,
            config.positive_fraction,
            priority(target["key"], TEACHER, proposals),
        )
        return pool.take(chosen)

    def _matched(
        self, i: int, proposals: Tensor, shared: _Shared, target: Mapping[str, Tensor], iou_threshold: float
    ) -> _Boxes:
        assignment = assign_proposals(shared.refined[i, proposals], target["boxes"], target["iscrowd"], iou_threshold)
        return _Boxes.of(i, proposals, assignment)

    @torch.no_grad()
    def _mine(self, shared: _Shared, pools: Sequence[_Boxes], targets: Targets) -> _Boxes:
        """Hard mining: rank all proposals by the student's loss without gradient, keep each image's hardest."""
        config = self.config.student
        pool = _Boxes.concatenate(pools)
        output = self._student(shared, pool.image, pool.position)
        cls_loss, box_loss = self._head_losses(output, pool, shared, targets, config.box_std)
        rank = cls_loss if config.mining == "cls" else cls_loss + box_loss
        chosen = []
        for boxes, losses in zip(pools, rank.split([len(p.image) for p in pools]), strict=True):
            chosen.append(
                boxes.take(mine(boxes.positive, boxes.negative, config.num_samples, config.positive_fraction, losses))
            )
        return _Boxes.concatenate(chosen)

    def _head_losses(
        self,
        output: HeadOutput,
        boxes: _Boxes,
        shared: _Shared,
        targets: Targets,
        box_std: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        """Classification and box loss (n,) of a head's answer for n boxes of the batch."""
        sizes = boxes.sizes(len(targets))
        labels, wanted = [], []
        for target, matched in zip(targets, boxes.matched.split(sizes), strict=True):
            # A row of its own behind the ground truth keeps the lookup valid for images without objects.
            labels.append(torch.cat([target["labels"], target["labels"].new_zeros(1)])[matched])
            wanted.append(torch.cat([target["boxes"], target["boxes"].new_tensor([[0, 0, 1, 1]])])[matched])
        label = torch.where(boxes.positive, torch.cat(labels), self.num_classes)
        refined = shared.refined[boxes.image, boxes.position]
        return head_losses(output, label, encode(torch.cat(wanted), refined, box_std), self.num_classes)

    # ---- inference ----

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], *, pad_to: tuple[int, int] | None = None) -> list[Detections]:
        """Student's detections: dicts of boxes (D, 4) xyxy pixels, scores (D,), labels (D,), best first."""
        shared = self._shared(images, pad_to, lowest=self.pyramid.low_levels[0])
        image, position = self._top(shared, self.config.inference.topk)
        return self._detections(
            self._student(shared, image, position),
            self.config.student.box_std,
            shared,
            image,
            position,
            images,
        )

    @torch.no_grad()
    def detect_heads(
        self, images: Sequence[Tensor], *, topk: int, pad_to: tuple[int, int] | None = None
    ) -> dict[str, list[Detections]]:
        """Detections of `student`, as deployed, and of `teacher` from the best `topk` refined boxes.

        Heads are compared on the same boxes: unless the deployed student looks at as many, it also answers for
        the teacher's boxes, as `student_topk`.
        """
        shared = self._shared(images, pad_to, lowest=self.pyramid.lowest)
        config = self.config
        deployed = self._top(shared, config.inference.topk)
        compared = self._top(shared, topk)
        teacher = self._teacher(shared, *compared)
        student = self._detections(self._student(shared, *deployed), config.student.box_std, shared, *deployed, images)
        heads = {
            "student": student,
            "teacher": self._detections(teacher, config.teacher.box_std, shared, *compared, images),
        }
        if topk != config.inference.topk:  # whatever the images' sizes, so that all batches answer the same heads
            output = self._student(shared, *compared)
            heads["student_topk"] = self._detections(output, config.student.box_std, shared, *compared, images)
        return heads

    def _top(self, shared: _Shared, topk: int) -> tuple[Tensor, Tensor]:
        tops = [
            top_positions(objectness, candidates, topk)
            for objectness, candidates in zip(shared.objectness, shared.candidates, strict=True)
        ]
        image = torch.cat([torch.full_like(top, i) for i, top in enumerate(tops)])
        return image, torch.cat(tops)

    def _detections(
        self,
        output: HeadOutput,
        box_std: Sequence[float],
        shared: _Shared,
        image: Tensor,
        position: Tensor,
        images: Sequence[Tensor],
    ) -> list[Detections]:
        config = self.config.inference
        scores = output.logits.softmax(1)[:, :-1]
        if config.times_objectness:
            scores = scores * shared.objectness[image, position].sigmoid()[:, None]
        boxes = decode(output.deltas, shared.refined[image, position], box_std)
        detections = []
        for i, original in enumerate(images):
            own = image == i
            box = clip(boxes[own], *map(float, original.shape[-2:]))
            index, label = (scores[own] > config.score_threshold).nonzero().unbind(1)
            score = scores[own][index, label]
            kept = batched_nms(box[index], score, label, config.nms_iou)[: config.max_detections]
            detections.append({"boxes": box[index[kept]], "scores": score[kept], "labels": label[kept]})
        return detections

    # ---- both ----

    def _shared(self, images: Sequence[Tensor], pad_to: tuple[int, int] | None, *, lowest: int) -> _Shared:
        batch = self._batch(images, pad_to)
        pyramid = self.pyramid(self.backbone(batch), lowest=lowest)
        low = [pyramid[level] for level in self.pyramid.low_levels]
        grid = make_grid(self.pyramid.low_levels, low, self.config.anchors.scale)
        objectness, deltas = self.refinement(low)
        decoded = decode(deltas.detach(), grid.anchors)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        return _Shared(
            pyramid=pyramid,
            features=Features.pack(low),
            grid=grid,
            candidates=torch.stack([grid.inside(*size) for size in sizes]),
            objectness=objectness,
            deltas=deltas,
            refined=torch.stack([clip(d, *map(float, s)) for d, s in zip(decoded, sizes, strict=True)]),
        )

    def _batch(self, images: Sequence[Tensor], pad_to: tuple[int, int] | None) -> Tensor:
        """Normalise and pad to (N, 3, H, W); padding is zero after normalisation."""
        if not images:
            raise ValueError("the detector needs at least one image, found an empty list")
        largest = [max(int(image.shape[axis]) for image in images) for axis in (-2, -1)]
        height, width = pad_to or [-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in largest]
        if height < largest[0] or width < largest[1]:
            raise ValueError(f"pad_to {(height, width)} is smaller than the largest image, {tuple(largest)}")
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            pixels = image.to(self.mean.device)
            pixels = pixels.to(self.mean.dtype) / 255 if pixels.dtype == torch.uint8 else pixels
            row[:, : image.shape[-2], : image.shape[-1]] = (pixels - self.mean) / self.std
        return batch

    def _student(self, shared: _Shared, image: Tensor, position: Tensor) -> HeadOutput:
        output = self.student(shared.features, shared.deltas, shared.grid, image, position)
        assert isinstance(output, HeadOutput)
        return output

    def _teacher(self, shared: _Shared, image: Tensor, position: Tensor) -> HeadOutput:
        # An anchor of P_L is pooled from P_{L - stagger}. (paper)
        level = torch.tensor(self.pyramid.high_levels, device=position.device)[shared.grid.level[position]]
        pyramid = {level: shared.pyramid[level] for level in self.pyramid.high_levels}
        output = self.teacher(pyramid, shared.refined[image, position], image, level)
        assert isinstance(output, HeadOutput)
        return output


@dataclass(frozen=True)
class _Boxes:
    """Refined boxes of a batch, ordered by image, with what each is assigned to. All (n,)."""

    image: Tensor
    position: Tensor
    matched: Tensor
    positive: Tensor
    negative: Tensor

    @classmethod
    def of(cls, image: int, position: Tensor, assignment: Assignment) -> _Boxes:
        return cls(
            torch.full_like(position, image),
            position,
            assignment.matched,
            assignment.positive,
            assignment.negative,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[_Boxes]) -> _Boxes:
        columns = zip(*((p.image, p.position, p.matched, p.positive, p.negative) for p in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def take(self, index: Tensor) -> _Boxes:
        return _Boxes(
            self.image[index],
            self.position[index],
            self.matched[index],
            self.positive[index],
            self.negative[index],
        )

    def sizes(self, num_images: int) -> list[int]:
        """How many of the boxes belong to each image."""
        return torch.bincount(self.image, minlength=num_images).tolist()


def _mean_per_image(values: Tensor, image: Tensor, num_images: int) -> Tensor:
    """Mean (N,) of values (n,) over each image's boxes; zero, attached to the graph, where it has none."""
    total = values.new_zeros(num_images).index_add(0, image, values)
    return total / torch.bincount(image, minlength=num_images).clamp(min=1)


def _complete(target: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    complete = {name: value.to(device) for name, value in target.items()}
    complete["boxes"] = complete["boxes"].float()
    complete.setdefault("iscrowd", torch.zeros_like(complete["labels"], dtype=torch.bool))
    complete.setdefault("key", torch.randint(1 << 62, (), device=device))
    return complete
