"""Swap the layers of a model for quantized ones, in place, and report what happened to each."""

from lq.surgery.discover import Found, execution_order, find_layers, run_example
from lq.surgery.norms import any_folded, find_norms, follow_norms, follow_norms_of_run, refold
from lq.surgery.plan import Plan, PlannedLayer, idle_options, make_plan
from lq.surgery.rebuild import caps_and_biases, rebuild, restore_parts
from lq.surgery.report import SwapReport, SwapRow
from lq.surgery.swap import (
    apply_plan,
    dequantize_model,
    fit_weights,
    keep_off_fast_path,
    layer_specs,
    quantize_model,
    swap_report,
)
from lq.surgery.widths import reassign_ends, set_widths

__all__ = [
    "Found",
    "Plan",
    "PlannedLayer",
    "SwapReport",
    "SwapRow",
    "any_folded",
    "apply_plan",
    "caps_and_biases",
    "dequantize_model",
    "execution_order",
    "find_layers",
    "find_norms",
    "fit_weights",
    "follow_norms",
    "follow_norms_of_run",
    "idle_options",
    "keep_off_fast_path",
    "layer_specs",
    "make_plan",
    "quantize_model",
    "reassign_ends",
    "rebuild",
    "refold",
    "restore_parts",
    "run_example",
    "set_widths",
    "swap_report",
]
