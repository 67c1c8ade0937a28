"""MimicDet, whole: images and targets to losses, or images to detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mimicdet.anchors import clip, decode, make_grid
from mimicdet.backbone import Backbone
from mimicdet.config import ModelConfig
from mimicdet.inference import detections, top_of_batch
from mimicdet.inputs import IMAGE_MEAN, IMAGE_STD, batch_images, check_images, check_targets, complete
from mimicdet.interface import Detections, Detector, LossTerms, Targets
from mimicdet.mimic import mimic_losses, warmup
from mimicdet.pyramid import Pyramid
from mimicdet.refinement import Refinement, propose, refinement_losses
from mimicdet.shared import Shared
from mimicdet.student import Features, HeadOutput, Student
from mimicdet.teacher import Teacher
from mimicdet.training import Boxes, box_losses, match, mean_per_image, mine_boxes, random_rank, sample_rois


class MimicDet(Detector):
    """One-stage detector whose head imitates a two-stage head during training.

    Follows torchvision's detection convention: images are a list of (3, H, W) tensors of any size, uint8 or
    float in [0, 1]; targets are dicts with `boxes` (M, 4) float xyxy in pixels and `labels` (M,) int64, which
    here count from 0 and index the class names. Optional in a target: `iscrowd` (M,) bool marks regions that
    are neither object nor background, `key` (int64 scalar) decides every random sample for that image and is
    drawn from torch's generator where absent.
    """

    class_layers = ("student.logits.", "teacher.logits.")
    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, num_classes: int, *, pretrained: bool = True) -> None:
        """Build the detector for classes 0..num_classes - 1.

        Args:
            config: its parts.
            num_classes: without background.
            pretrained: read the backbone's weights; False where a whole state is loaded next.

        Raises:
            ValueError: the configuration cannot work with so many classes, or weights do not fit.
        """
        super().__init__()
        if config.detector != "mimicdet":
            raise ValueError(f"detector {config.detector} is a Baseline, expected mimicdet")
        if config.weights is not None:
            raise ValueError(f"weights {config.weights}: load a detector's weights with mimicdet.weights.load_matching")
        config.check_classes(num_classes)
        self.config = config
        self.num_classes = num_classes
        self.backbone = Backbone(config.backbone, pretrained=pretrained)
        self.backbone_report = self.backbone.report
        # Without a teacher nobody reads the levels below the student's.
        levels = config.pyramid if config.teacher.enabled else replace(config.pyramid, stagger=0)
        self.pyramid = Pyramid(self.backbone.channels, levels)
        self.refinement = Refinement(config.pyramid.channels, config.refinement)
        self.student = Student(config, num_classes)
        self.teacher = Teacher(config, num_classes) if config.teacher.enabled else None
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)
        self._step: int | None = None

    # ---- training ----

    def at_step(self, step: int) -> None:
        """Set the step that mimicking is warmed up by; before the first call the weights are as configured."""
        self._step = step

    def loss_terms(
        self, images: Sequence[Tensor], targets: Targets, *, pad_to: tuple[int, int] | None = None
    ) -> LossTerms:
        """Compute losses and metrics of every image; see `forward` for the arguments."""
        check_images(images)
        check_targets(targets, images, self.num_classes, self.mean.dtype)
        targets = [complete(target, self.mean) for target in targets]
        shared = self._shared(images, pad_to, lowest=self.pyramid.lowest)
        config, student = self.config, self.config.student
        refine, proposals = [], []
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
                    config.anchors.scale,
                    config.refinement,
                    config.box_loss_over,
                )
            )
            proposals.append(
                propose(
                    shared.objectness[i],
                    shared.refined[i],
                    shared.candidates[i],
                    shared.grid.level,
                    config.refinement,
                )
            )
        losses = {
            "refine_cls": config.refinement.loss_weight * torch.stack([cls for cls, _ in refine]),
            "refine_box": config.refinement.loss_weight * torch.stack([box for _, box in refine]),
        }
        pools = [
            match(i, proposed[: student.mining_pool], shared, target, student.iou_threshold)
            for i, (proposed, target) in enumerate(zip(proposals, targets, strict=True))
        ]
        mined = self._mine(shared, pools, targets)
        if self.teacher is None:
            output = self._student(shared, mined.image, mined.position)
            student_losses, student_metrics = self._student_terms(output, mined, shared, targets)
            return LossTerms(losses | student_losses, student_metrics)

        rois, learned, mimicked = self._sample(shared, proposals, targets)
        # One evaluation of the student for the boxes it is trained on and those it imitates.
        both = self._student(shared, torch.cat([mined.image, rois.image]), torch.cat([mined.position, rois.position]))
        output, imitator = both.split([len(mined.image), len(rois.image)])
        student_losses, student_metrics = self._student_terms(output, mined, shared, targets)
        teacher_losses, teacher_metrics = self._teacher_terms(
            self.teacher, imitator, rois, learned, mimicked, shared, targets
        )
        return LossTerms(losses | student_losses | teacher_losses, teacher_metrics | student_metrics)

    @torch.no_grad()
    def _mine(self, shared: Shared, pools: Sequence[Boxes], targets: Targets) -> Boxes:
        """Hard mining: rank all proposals by the student's loss without gradient, keep each image's hardest."""
        config = self.config.student
        if config.mining == "random":
            return mine_boxes(pools, random_rank(pools, shared, targets), config)
        pool = Boxes.concatenate(pools)
        output = self._student(shared, pool.image, pool.position)
        cls_loss, box_loss = box_losses(output, pool, shared, targets, config.box_std, self.num_classes)
        rank = cls_loss if config.mining == "cls" else cls_loss + box_loss
        return mine_boxes(pools, rank.split([len(each.image) for each in pools]), config)

    def _sample(self, shared: Shared, proposals: Sequence[Tensor], targets: Targets) -> tuple[Boxes, Tensor, Tensor]:
        """RoIs that the teacher looks at, and (n,) bool of those that it learns from and that are mimicked."""
        config = self.config.teacher
        num_mimicked = self.config.mimic.num_boxes or config.num_rois
        rois, learned, mimicked = [], [], []
        for i, (proposed, target) in enumerate(zip(proposals, targets, strict=True)):
            pool = match(i, proposed, shared, target, config.iou_threshold)
            wanted = [sample_rois(pool, shared, num, target["key"], config) for num in (config.num_rois, num_mimicked)]
            every = max(wanted, key=len)
            rois.append(pool.take(every))
            learned.append(torch.isin(every, wanted[0]))
            mimicked.append(torch.isin(every, wanted[1]))
        return Boxes.concatenate(rois), torch.cat(learned), torch.cat(mimicked)

    def _student_terms(
        self, output: HeadOutput, mined: Boxes, shared: Shared, targets: Targets
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config, num = self.config.student, len(targets)
        cls_loss, box_loss = box_losses(output, mined, shared, targets, config.box_std, self.num_classes)
        losses = {
            "student_cls": config.loss_weight * mean_per_image(cls_loss, mined.image, num),
            "student_box": config.loss_weight * self._box_mean(box_loss, mined, num),
        }
        return losses, {"mined_positives": mean_per_image(mined.positive.float(), mined.image, num)}

    def _teacher_terms(
        self,
        teacher: Teacher,
        imitator: HeadOutput,
        rois: Boxes,
        learned: Tensor,
        mimicked: Tensor,
        shared: Shared,
        targets: Targets,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config, num = self.config, len(targets)

        def mean(values: Tensor, counted: Tensor) -> Tensor:
            return mean_per_image(values, rois.image, num, counted)

        output = self._teacher(teacher, shared, rois.image, rois.position)
        cls_loss, box_loss = box_losses(output, rois, shared, targets, config.teacher.box_std, self.num_classes)
        by_class, by_feature = mimic_losses(imitator, output, config.mimic)
        shown = mimicked & rois.positive if config.mimic.reg_positives_only else mimicked
        rise = 1.0 if self._step is None else warmup(self._step, config.mimic)
        losses = {
            "teacher_cls": config.teacher.loss_weight * mean(cls_loss, learned),
            "teacher_box": config.teacher.loss_weight * self._box_mean(box_loss, rois, num, learned),
            "mimic_cls": rise * config.mimic.cls_weight * mean(by_class, mimicked),
            "mimic_reg": rise * config.mimic.reg_weight * mean(by_feature, shown),
        }
        metrics = {
            "cosine_cls": mean(1 - by_class.detach(), mimicked),
            "cosine_reg": mean(1 - by_feature.detach(), mimicked),
            "roi_positives": mean(rois.positive.float(), learned),
        }
        return losses, metrics

    def _box_mean(self, losses: Tensor, boxes: Boxes, num: int, among: Tensor | None = None) -> Tensor:
        if self.config.box_loss_over == "positives":
            among = boxes.positive if among is None else boxes.positive & among
        return mean_per_image(losses, boxes.image, num, among)

    # ---- inference ----

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], *, pad_to: tuple[int, int] | None = None) -> list[Detections]:
        """Student's detections: dicts of boxes (D, 4) xyxy pixels, scores (D,), labels (D,), best first."""
        check_images(images)
        shared = self._shared(images, pad_to, lowest=self.pyramid.low_levels[0])
        image, position = top_of_batch(shared, self.config.inference.topk)
        output = self._student(shared, image, position)
        return detections(output, self.config.student.box_std, shared, image, position, self.config)

    @torch.no_grad()
    def detect_heads(
        self, images: Sequence[Tensor], *, topk: int, pad_to: tuple[int, int] | None = None
    ) -> dict[str, list[Detections]]:
        """Detections of `student`, as deployed, and of `teacher` from the best `topk` refined boxes.

        Heads are compared on the same boxes: unless the deployed student looks at as many, it also answers for
        the teacher's boxes, as `student_topk`. Without a teacher there is `student` alone.
        """
        if self.teacher is None:
            return {"student": self.detect(images, pad_to=pad_to)}
        check_images(images)
        shared = self._shared(images, pad_to, lowest=self.pyramid.lowest)
        config = self.config
        deployed, compared = top_of_batch(shared, config.inference.topk), top_of_batch(shared, topk)

        def student(boxes: tuple[Tensor, Tensor]) -> list[Detections]:
            return detections(self._student(shared, *boxes), config.student.box_std, shared, *boxes, config)

        output = self._teacher(self.teacher, shared, *compared)
        heads = {
            "student": student(deployed),
            "teacher": detections(output, config.teacher.box_std, shared, *compared, config),
        }
        if topk != config.inference.topk:  # whatever the images' sizes, so that all batches answer the same heads
            heads["student_topk"] = student(compared)
        return heads

    # ---- both ----

    def _shared(self, images: Sequence[Tensor], pad_to: tuple[int, int] | None, *, lowest: int) -> Shared:
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        batch = batch_images(images, pad_to, self.mean, self.std)
        return self.share(batch, sizes, lowest=lowest, unfinished=self.pyramid.boxes_only)

    def share(
        self, batch: Tensor, sizes: list[tuple[int, int]], *, lowest: int, unfinished: Sequence[int] = ()
    ) -> Shared:
        """Run backbone, pyramid and refinement.

        Args:
            batch: (N, 3, H, W), normalised and padded.
            sizes: (H, W) of each image without padding.
            lowest: lowest level that is computed: the student's own, or the teacher's.
            unfinished: see `Pyramid.forward`.
        """
        # The only numbers that a GPU copies from the host, before there is work that this would have to wait for.
        sides = torch.tensor(sizes, dtype=torch.float32, device=batch.device)
        height, width = sides.unbind(1)
        pyramid = self.pyramid(self.backbone(batch), lowest=lowest, unfinished=unfinished)
        low = [pyramid[level] for level in self.pyramid.low_levels]
        grid = make_grid(self.pyramid.low_levels, low, self.config.anchors.scale)
        objectness, deltas = self.refinement(low)
        config = self.config.refinement
        decoded = decode(deltas.detach() if config.detach_boxes else deltas, grid.anchors, config.box_std)
        return Shared(
            pyramid=pyramid,
            features=Features.pack(low),
            grid=grid,
            candidates=torch.stack([grid.inside(*size) for size in sizes]),
            objectness=objectness,
            deltas=deltas,
            refined=clip(decoded, height[:, None], width[:, None]),
            sizes=sides,
        )

    def _student(self, shared: Shared, image: Tensor, position: Tensor) -> HeadOutput:
        output = self.student(shared.features, shared.deltas, shared.grid, image, position)
        assert isinstance(output, HeadOutput)
        return output

    def _teacher(self, teacher: Teacher, shared: Shared, image: Tensor, position: Tensor) -> HeadOutput:
        # An anchor of P_L is pooled from P_{L - stagger}. (paper)
        level = shared.grid.level[position] + self.pyramid.lowest
        pyramid = {each: shared.pyramid[each] for each in self.pyramid.high_levels}
        convs = {each: self.pyramid.output[str(each)] for each in self.pyramid.boxes_only}
        output = teacher(pyramid, shared.refined[image, position], image, level, convs)
        assert isinstance(output, HeadOutput)
        return output
