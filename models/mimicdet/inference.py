"""From a head's answers to detections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from mimicdet.anchors import clip, decode
from mimicdet.config import ModelConfig
from mimicdet.interface import Detections
from mimicdet.refinement import top_positions
from mimicdet.shared import Shared
from mimicdet.student import HeadOutput


def top_of_batch(shared: Shared, topk: int) -> tuple[Tensor, Tensor]:
    """Image (n,) and position (n,) of the at most `topk` best boxes of each image by objectness."""
    tops = [
        top_positions(objectness, candidates, topk)
        for objectness, candidates in zip(shared.objectness, shared.candidates, strict=True)
    ]
    image = torch.cat([torch.full_like(top, i) for i, top in enumerate(tops)])
    return image, torch.cat(tops)


def class_scores(logits: Tensor, objectness: Tensor, config: ModelConfig) -> Tensor:
    """Scores (.., C) of class logits (.., C or C + 1) and objectness logits (..)."""
    scores = logits.sigmoid() if config.class_space == "sigmoid" else logits.softmax(-1)[..., :-1]
    return scores * objectness.sigmoid()[..., None] if config.inference.times_objectness else scores


def detections(
    output: HeadOutput,
    box_std: Sequence[float],
    shared: Shared,
    image: Tensor,
    position: Tensor,
    config: ModelConfig,
) -> list[Detections]:
    """Detections of every image: scores above the threshold, class-wise NMS, the best ones.

    Args:
        output: a head's answer for n boxes.
        box_std: the head's.
        shared: what they stand on.
        image, position: (n,) of each box.
        config: of the detector.
    """
    limits = config.inference
    scores = class_scores(output.logits, shared.objectness[image, position], config)
    boxes = clip(decode(output.deltas, shared.refined[image, position], box_std), *shared.sizes[image].unbind(1))
    # What passes is looked up once for the batch, whose boxes follow each other by image.
    row, label = (scores > limits.score_threshold).nonzero().unbind(1)
    passed = torch.stack([(image[row] == i).sum() for i in range(len(shared.sizes))]).tolist()
    found = []
    for own, labels in zip(row.split(passed), label.split(passed), strict=True):
        box, score = boxes[own], scores[own, labels]
        kept = batched_nms(box, score, labels, limits.nms_iou)[: limits.max_detections]
        found.append({"boxes": box[kept], "scores": score[kept], "labels": labels[kept]})
    return found
