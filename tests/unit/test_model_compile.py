"""torch.compile on the deployed path."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mimicdet import MimicDet, ModelConfig
from mimicdet.config import BackboneConfig, InferenceConfig, PyramidConfig, StudentConfig, TeacherConfig
from mimicdet.export import Deployed

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch.compiler.reset()
    torch.set_num_threads(before)


# Inductor's C++ takes minutes to compile.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:`create_unbacked_symint`:FutureWarning")
def test_the_compiled_path_is_one_graph_and_detects_the_same(backend: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet18", width=8),
        pyramid=PyramidConfig(channels=8, min_level=4, max_level=5),
        student=StudentConfig(head_width=8, offset_channels=(4, 4)),
        teacher=TeacherConfig(enabled=False),
        inference=InferenceConfig(topk=60, score_threshold=0.4),
    )
    model = MimicDet(config, 3)
    for layer in (model.refinement.objectness, model.student.logits, model.student.deltas):
        nn.init.normal_(layer.weight)
    deployed = Deployed(model)
    compiled = torch.compile(deployed, backend=backend, fullgraph=True, dynamic=True)
    for num, height, width in ((2, 96, 160), (3, 120, 64)):
        images = torch.randint(256, (num, 3, height, width), dtype=torch.uint8)
        boxes, scores, labels = compiled(images)
        wanted_boxes, wanted_scores, wanted_labels = deployed(images)
        assert ((wanted_labels >= 0).sum(1) >= 5).all()
        assert torch.equal(labels, wanted_labels)
        assert torch.allclose(boxes, wanted_boxes, rtol=0, atol=1e-3)
        assert torch.allclose(scores, wanted_scores, rtol=0, atol=1e-5)
