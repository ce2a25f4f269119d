"""All mathematics of `lq`: tensors in, tensors out, no modules, no state, any device."""

from lq.functional.candidates import candidate_points, powers_of_two, two_word_candidates, word_candidates
from lq.functional.codebook import fit_codebook
from lq.functional.hard import dequantize, hard_quantize, lsq_gradient_scale, lsq_quantize, quantize
from lq.functional.levels import CodeRange, bits_for_levels, code_range, level_values
from lq.functional.points import decode_points, encode_points
from lq.functional.regularizer import level_regularizer
from lq.functional.scale import initial_scale, scale_parity
from lq.functional.scale_search import scale_grid
from lq.functional.schedule import ramp
from lq.functional.soft import soft_staircase
from lq.functional.soft_points import PointSet, point_regularizer, point_staircase
from lq.functional.statistics import LevelStatistics, level_statistics
from lq.functional.subset_search import SubsetResult, search_subset

__all__ = [
    "CodeRange",
    "LevelStatistics",
    "PointSet",
    "SubsetResult",
    "bits_for_levels",
    "candidate_points",
    "code_range",
    "decode_points",
    "dequantize",
    "encode_points",
    "fit_codebook",
    "hard_quantize",
    "initial_scale",
    "level_regularizer",
    "level_statistics",
    "level_values",
    "lsq_gradient_scale",
    "lsq_quantize",
    "point_regularizer",
    "point_staircase",
    "powers_of_two",
    "quantize",
    "ramp",
    "scale_grid",
    "scale_parity",
    "search_subset",
    "soft_staircase",
    "two_word_candidates",
    "word_candidates",
]
