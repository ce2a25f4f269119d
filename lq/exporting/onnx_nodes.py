"""How the exporter writes `lq`'s operators in standard ONNX."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper

__all__ = ["translations"]


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """What stands for each operator of `lq`.

    Args:
        opset: version of the standard operators.

    Returns:
        Operator to a function that builds its nodes.
    """
    op: Any = getattr(import_module("onnxscript"), f"opset{opset}")

    def constant(value: int) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.array(value, dtype=np.uint8)))

    def dequantize(codes: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(codes, scale, axis=axis)

    def quantize_input(x: Any, scale: Any, lo: int, hi: int) -> Any:
        shift = 128 if lo < 0 else 0  # one type for all codes: runtimes fuse a layer between codes of the same type
        zero = constant(shift)
        codes = op.QuantizeLinear(x, scale, zero)
        if (lo + shift, hi + shift) != (0, 255):
            codes = op.Clip(codes, constant(lo + shift), constant(hi + shift))
        return op.DequantizeLinear(codes, scale, zero)

    return {torch.ops.lq.dequantize.default: dequantize, torch.ops.lq.quantize_input.default: quantize_input}
