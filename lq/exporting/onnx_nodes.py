"""How the exporter writes `lq`'s operators in standard ONNX, and what is left to do on the finished graph."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

__all__ = ["finish", "translations"]


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """What stands for each operator of `lq`.

    Args:
        opset: version of the standard operators.

    Returns:
        Operator to a function that builds its nodes.
    """
    op: Any = getattr(import_module("onnxscript"), f"opset{opset}")

    def dequantize(codes: Any, table: Any, scale: Any, axis: int, bits: int, gather: bool) -> Any:
        if not gather:
            return op.DequantizeLinear(codes, scale, axis=axis)
        values = op.Gather(table, op.Cast(codes, to=TensorProto.INT32), axis=0)
        rank = len(codes.shape)
        if scale.shape is not None and len(scale.shape):
            shape = [1] * rank
            shape[axis] = -1
            scale = op.Reshape(scale, op.Constant(value_ints=shape))
        return op.Mul(values, scale)

    def quantize_input(x: Any, scale: Any, lo: int, hi: int) -> Any:
        kind = np.uint8 if lo >= 0 else np.int8
        zero = op.Constant(value=numpy_helper.from_array(np.zeros((), dtype=kind)))
        if (lo, hi) != (0, 255):  # bounds a little wider than the last levels round to them and cost no level
            ends = op.Mul(scale, op.Constant(value_float=lo)), op.Mul(scale, op.Constant(value_float=hi))
            x = op.Clip(x, *ends)
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)

    return {torch.ops.lq.dequantize.default: dequantize, torch.ops.lq.quantize_input.default: quantize_input}


def finish(proto: onnx.ModelProto, widths: Mapping[str, int]) -> onnx.ModelProto:
    """Give codes of four bits their own type, which halves the file.

    Args:
        proto: as exported.
        widths: name of each initializer of codes to the width it may have.

    Returns:
        The same model.

    Raises:
        RuntimeError: where the exporter did not keep the codes.
    """
    for node in proto.graph.node:  # where in torch each came from: twice as long as the graph
        del node.metadata_props[:]
        node.doc_string = ""
    found = set()
    for tensor in proto.graph.initializer:
        if tensor.name not in widths:
            continue
        found.add(tensor.name)
        if widths[tensor.name] == 4:
            values = numpy_helper.to_array(tensor)
            kind: Any = ml_dtypes.uint4 if values.dtype == np.uint8 else ml_dtypes.int4
            tensor.CopyFrom(numpy_helper.from_array(values.astype(kind), tensor.name))
            for info in proto.graph.value_info:
                if info.name == tensor.name:
                    info.type.tensor_type.elem_type = tensor.data_type
    if found != {name for name in widths if widths[name] == 4} | (found & set(widths)):
        raise RuntimeError(f"the exporter dropped the codes of {sorted(set(widths) - found)}")
    return proto
