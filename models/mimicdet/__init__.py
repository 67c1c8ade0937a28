"""MimicDet: a one-stage detector that learns from a two-stage head sharing its backbone.

Lu, Li, Li, Yan: "MimicDet: Bridging the Gap Between One-Stage and Two-Stage Object Detection",
ECCV 2020, arXiv 2009.11528. Needs torch and torchvision only.
"""

from typing import TYPE_CHECKING, Any

from mimicdet.config import ModelConfig

if TYPE_CHECKING:
    from mimicdet.detector import MimicDet

__all__ = ["MimicDet", "ModelConfig"]


def __getattr__(name: str) -> Any:
    # The configuration is read by programs that never build a model: torch is loaded with the first MimicDet.
    if name == "MimicDet":
        from mimicdet.detector import MimicDet

        return MimicDet
    raise AttributeError(f"module 'mimicdet' has no attribute {name!r}")
