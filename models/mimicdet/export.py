"""The deployed path as one graph, for programs that do not have this package: an ONNX file, or torch's `.pt2`.

Either takes batches of any number of images of any size. The ONNX file consists of standard operators alone. A
`.pt2` reads back by `torch.export.load` and needs `import torchvision`, whose NMS it calls; torch assumes of it that
there is an image, that no side is shorter than `min_exported_side`, and that it stays on the device that it was
exported on.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from mimicdet.anchors import clip, decode, make_grid
from mimicdet.config import PyramidConfig
from mimicdet.detector import MimicDet
from mimicdet.inference import class_scores
from mimicdet.inputs import PAD_MULTIPLE
from mimicdet.interface import Detector
from mimicdet.student import Features

INPUT, OUTPUTS = "images", ("boxes", "scores", "labels")
# The metadata inside of a .pt2: one JSON object.
METADATA_FILE = "metadata.json"


class Deployed(nn.Module):
    """`MimicDet.detect` for a batch of images of one size, with outputs of a fixed shape.

    It computes with the detector's own modules. What differs is how many boxes there are: each image has `topk`
    positions and `max_detections` detections, whatever its size, and those that do not exist are masked.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Detector) -> None:
        """Share the deployed modules of `model`, in evaluation mode; what only the teacher needs stays behind.

        Raises:
            ValueError: the model is no MimicDet, or not in single precision.
        """
        super().__init__()
        if not isinstance(model, MimicDet):
            raise ValueError(f"only MimicDet can be exported, found a {type(model).__name__}, expected a MimicDet")
        if model.mean.dtype != torch.float32:
            raise ValueError(f"only single precision can be exported, found {model.mean.dtype}, expected torch.float32")
        self.config = model.config
        self.num_classes = model.num_classes
        self.backbone, self.refinement, self.student = model.backbone, model.refinement, model.student
        self.pyramid = copy.deepcopy(model.pyramid)
        for part in (self.pyramid.lateral, self.pyramid.output):
            assert isinstance(part, nn.ModuleDict)
            for level in range(model.pyramid.lowest, model.pyramid.low_levels[0]):
                del part[str(level)]
        self.register_buffer("mean", model.mean, persistent=False)
        self.register_buffer("std", model.std, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect objects.

        Args:
            images: (N, 3, H, W) uint8 RGB, of any N, H and W; every image fills H x W. Padded inside.

        Returns:
            boxes (N, D, 4) xyxy pixels, scores (N, D) and labels (N, D) int64 of D = `max_detections`, best
            first. Rows without a detection have score 0, label -1 and a box of zeros.
        """
        config, limits = self.config, self.config.inference
        num, height, width = images.shape[0], images.shape[2], images.shape[3]
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        batch = F.pad(pixels, (0, _missing(width), 0, _missing(height)))
        levels = self.pyramid(self.backbone(batch), lowest=self.pyramid.low_levels[0])
        low = [levels[level] for level in self.pyramid.low_levels]
        grid = make_grid(self.pyramid.low_levels, low, config.anchors.scale)
        objectness, deltas = self.refinement(low)
        # Not a float each: that would make them constants of the traced graph.
        size = torch.tensor([height, width], dtype=self.mean.dtype, device=images.device).unbind()

        # As many positions as `topk`, even in an image that has fewer: their number is no function of its size.
        ranked = objectness.where(grid.inside(height, width), -torch.inf)
        best, position = F.pad(ranked, (0, limits.topk), value=-torch.inf).topk(limits.topk)
        exists = best > -torch.inf
        position = position.where(exists, 0).flatten()
        image = torch.arange(num, device=images.device).repeat_interleave(limits.topk)

        output = self.student(Features.pack(low), deltas, grid, image, position)
        refined = clip(decode(deltas[image, position], grid.anchors[position], config.refinement.box_std), *size)
        boxes = clip(decode(output.deltas, refined, config.student.box_std), *size)
        scores = class_scores(output.logits, best.flatten(), config)
        boxes, scores = boxes.unflatten(0, (num, limits.topk)), scores.unflatten(0, (num, limits.topk))
        scores = scores.where(exists[..., None], 0).transpose(1, 2)
        return self._best(boxes, self._suppress(boxes, scores))

    def _suppress(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """Class-wise NMS of boxes (N, T, 4) by scores (N, C, T): the scores, with 0 for those that are not kept."""
        limits = self.config.inference
        candidates = (scores > limits.score_threshold).nonzero()
        if torch.onnx.is_in_onnx_export():
            kept = torch.onnx.ops.symbolic(
                "NonMaxSuppression",
                (
                    boxes,
                    scores,
                    torch.tensor([limits.max_detections]),
                    torch.tensor([limits.nms_iou]),
                    torch.tensor([limits.score_threshold]),
                ),
                dtype=torch.int64,
                shape=candidates.shape,  # (n, 3) too; torch needs some n to trace with
            )
        else:
            image, label, index = candidates.unbind(1)
            # All images and classes at once, each class of each image moved to a place of its own. In double
            # precision, where that rounds no overlap away.
            place = (image * scores.shape[1] + label).double() * (boxes.max() + 1)
            moved = boxes[image, index].double() + place[:, None]
            # torchvision tells torch that NMS keeps two boxes or more. Here it does: two that touch no other, and
            # come last by their score.
            moved = torch.cat([moved, moved.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])])
            ranked = F.pad(scores[image, label, index].double(), (0, 2))
            kept = candidates[nms(moved, ranked, limits.nms_iou)[:-2]]
        image, label, index = kept.unbind(1)
        return torch.zeros_like(scores).index_put((image, label, index), scores[image, label, index])

    def _best(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best D of boxes (N, T, 4) with scores (N, C, T), 0 where there is none."""
        topk, wanted = self.config.inference.topk, self.config.inference.max_detections
        best, rank = scores.flatten(1).topk(min(wanted, self.num_classes * topk))
        exists = best > 0
        box = boxes.gather(1, (rank % topk)[..., None].expand(-1, -1, 4)).where(exists[..., None], 0)
        label = torch.where(exists, rank.div(topk, rounding_mode="floor"), -1)
        missing = wanted - best.shape[1]
        return F.pad(box, (0, 0, 0, missing)), F.pad(best, (0, missing)), F.pad(label, (0, missing), value=-1)


def export_onnx(model: Detector, file: Path, metadata: Mapping[str, str]) -> None:
    """Write `Deployed` of the model as ONNX; the outputs are `boxes`, `scores` and `labels`, the input `images`.

    Args:
        model: a MimicDet.
        file: is replaced.
        metadata: becomes the model's `metadata_props`.

    Raises:
        ValueError: see `Deployed`.
        ImportError: the packages onnx and onnxscript are missing.
    """
    deployed = Deployed(model)
    program = torch.onnx.export(
        deployed,
        (_example(deployed),),
        input_names=[INPUT],
        output_names=OUTPUTS,
        dynamic_shapes={INPUT: {0: "batch", 2: "height", 3: "width"}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # traces, with the paths of this machine
    program.model.metadata_props.update(metadata)
    program.save(file, external_data=False)


def export_torch(model: Detector, file: Path, metadata: Mapping[str, str]) -> None:
    """Write `Deployed` of the model as torch's exported program (.pt2).

    Args:
        model: a MimicDet.
        file: is replaced.
        metadata: becomes the extra file METADATA_FILE, one JSON object.

    Raises:
        ValueError: see `Deployed`.
    """
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {INPUT: {0: dynamic, 2: dynamic, 3: dynamic}}
    deployed = Deployed(model)
    program = torch.export.export(deployed, (_example(deployed),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with the paths of this machine
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})


def min_exported_side(pyramid: PyramidConfig) -> int:
    """Pixels of the shortest side that a .pt2 takes.

    torch tells maps of one cell from larger ones while it traces, and the highest level has one for fewer pixels.
    """
    return _stride(pyramid) + 1


def _stride(pyramid: PyramidConfig) -> int:
    return max(PAD_MULTIPLE, 1 << pyramid.max_level)


def _example(model: Deployed) -> Tensor:
    """To trace with: more than one image, since one would become a constant, and maps of more than one cell."""
    stride = _stride(model.config.pyramid)
    return torch.zeros((2, 3, 3 * stride, 5 * stride), dtype=torch.uint8, device=model.mean.device)


def _missing(side: int) -> int:
    """Pixels from a side to the next multiple of PAD_MULTIPLE."""
    return (side + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE - side
