"""What leaves training: the packed artifact, the integer engine, C and ONNX."""

from lq.exporting.artifact import load, read_header, save
from lq.exporting.cost import CostReport, integer_cost
from lq.exporting.files import ArtifactError
from lq.exporting.graph import UnsupportedError
from lq.exporting.integer import IntegerNetwork
from lq.exporting.overflow import check_accumulators, repair_accumulators

__all__ = [
    "ArtifactError",
    "CostReport",
    "IntegerNetwork",
    "UnsupportedError",
    "check_accumulators",
    "integer_cost",
    "load",
    "read_header",
    "repair_accumulators",
    "save",
]
