"""What leaves training: the packed artifact, the integer engine, C and ONNX."""

from lq.exporting.architecture import architecture_of, network_of
from lq.exporting.artifact import load, load_with_header, read_header, save
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
    "architecture_of",
    "check_accumulators",
    "integer_cost",
    "load",
    "load_with_header",
    "network_of",
    "read_header",
    "repair_accumulators",
    "save",
]
