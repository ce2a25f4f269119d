"""All mathematics of `lq`: tensors in, tensors out, no modules, no state, any device."""

from lq.functional.hard import dequantize, hard_quantize, lsq_gradient_scale, lsq_quantize, quantize
from lq.functional.levels import CodeRange, bits_for_levels, code_range, level_values
from lq.functional.regularizer import level_regularizer
from lq.functional.scale import initial_scale
from lq.functional.schedule import ramp
from lq.functional.soft import soft_staircase
from lq.functional.statistics import LevelStatistics, level_statistics

__all__ = [
    "CodeRange",
    "LevelStatistics",
    "bits_for_levels",
    "code_range",
    "dequantize",
    "hard_quantize",
    "initial_scale",
    "level_regularizer",
    "level_statistics",
    "level_values",
    "lsq_gradient_scale",
    "lsq_quantize",
    "quantize",
    "ramp",
    "soft_staircase",
]
