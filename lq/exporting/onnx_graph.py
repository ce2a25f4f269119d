"""What is left to do on an exported graph: weights in the form that runtimes compute fastest, and a small file."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from lq.exporting.graph import UnsupportedError
from lq.exporting.onnx_weights import StoredWeight, along

__all__ = ["finish"]

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def finish(proto: onnx.ModelProto, weights: Mapping[str, StoredWeight]) -> onnx.ModelProto:
    """Give every weight its form, and drop what no one needs.

    Args:
        proto: as exported, with weights of codes behind DequantizeLinear.
        weights: what the initializer of each name holds; a layer may have several.

    Returns:
        The same model.

    Raises:
        UnsupportedError: where the exporter did not keep the codes.
    """
    graph = _Graph(proto)
    for node in list(graph.nodes):
        if node.op_type == "QuantizeLinear":
            graph.drop_relu(node)
    for node in list(graph.nodes):
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            graph.place(node, weights[node.input[0]])
    for node in list(graph.nodes):
        if node.op_type in _CONVOLUTIONS:
            graph.separate_bias(node)
        elif node.op_type == "Gemm":
            graph.separate_product(node)
    kept = {id(stored) for name, stored in weights.items() if name in graph.constants}
    missing = sorted(name for name, stored in weights.items() if stored.has_codes and id(stored) not in kept)
    if missing:
        raise UnsupportedError(f"the exporter kept no codes of {missing}: is the layer used by the network?")
    return graph.written()


class _Graph:
    """Nodes by what they give and by who takes it."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes, self.early = list(proto.graph.node), list[NodeProto]()
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}
        for node in self.nodes:  # constants need no example of their type, which would seem to have one more user
            value = self._array(node.input[0]) if node.op_type == "CastLike" else None
            if value is not None and value.dtype.kind == "f":
                node.CopyFrom(helper.make_node("Cast", node.input[:1], list(node.output), to=TensorProto.FLOAT))
        self.outputs = {info.name for info in proto.graph.output}

    def users(self, name: str) -> list[NodeProto]:
        """Nodes that take a value."""
        return [node for node in self.nodes if name in node.input]

    def drop_relu(self, node: NodeProto) -> None:
        """Let codes end where a ReLU or a cap before them did: what is between keeps runtimes from fusing."""
        maker, ends = self.makers.get(node.input[0]), self._code_range(node)
        if maker is None or ends is None or ends[0] != 0 or maker.output[0] in self.outputs:
            return
        cap: float | None = float("inf")
        if maker.op_type == "Clip" and len(maker.input) == 3:
            cap = self._number(maker.input[2]) if self._number(maker.input[1]) == 0 else None
        elif maker.op_type != "Relu":
            return
        scale, users = self._number(node.input[1]), self.users(maker.output[0])
        if cap is None or scale is None or any(user.op_type != "QuantizeLinear" for user in users):
            return
        node.input[0] = maker.input[0]
        if len(users) == 1:
            self.nodes.remove(maker)
        if cap < ends[1] * scale:
            self._end_codes(node, int(np.rint(np.float32(cap) / np.float32(scale))))

    def _end_codes(self, node: NodeProto, last: int) -> None:
        """Codes of a QuantizeLinear end at another one than before."""
        (codes,) = node.output
        low, high = f"{codes}.first", f"{codes}.last"
        for name, value in ((low, 0), (high, last)):
            self.constants[name] = numpy_helper.from_array(np.array(value, dtype=np.uint8), name)
        (user,) = self.users(codes)
        if user.op_type == "Clip":
            user.input[2] = high
            return
        node.output[0] = f"{codes}.all"
        self.makers[node.output[0]] = node
        clip = helper.make_node("Clip", [node.output[0], low, high], [codes])
        self.makers[codes] = clip
        self.nodes.insert(self.nodes.index(node) + 1, clip)

    def place(self, node: NodeProto, stored: StoredWeight) -> None:
        """Write a weight as the layers that take it need it: as integers, or as what a constant folds to in float."""
        codes, scale = node.input[:2]
        array = stored.codes.numpy()
        if stored.narrow:
            array = array.astype(ml_dtypes.uint4 if array.dtype == np.uint8 else ml_dtypes.int4)
        self.constants[codes] = numpy_helper.from_array(array, codes)
        result = node.output[0]
        if stored.table is None:
            levels = self._node("Cast", [codes], result, to=TensorProto.FLOAT)
        else:
            index = self._node("Cast", [codes], result, to=TensorProto.INT32)
            levels = self._node("Gather", [self._constant(f"{codes}.table", stored.table), index], result, axis=0)
        if stored.axis:
            self._turn_back(node)
        users, takes_scale = self.users(result), bool((stored.scale > 0).all())  # as DequantizeLinear wants it
        if stored.whole and takes_scale and all(self._product_of_codes(user, result) for user in users):
            node.input[1], integers = self._constant(f"{scale}.integer", stored.scale), levels
        elif stored.integer_scale is not None and all(self._between_codes(u, ("QuantizeLinear",)) for u in users):
            assert stored.factor is not None
            factor = self._constant(f"{codes}.factor", along(stored.factor, stored.axis, stored.codes.dim()))
            integers = self._node("Mul", [levels, factor], result)
            node.input[1] = self._constant(f"{scale}.integer", stored.integer_scale)
        else:
            by = self._constant(f"{scale}.rows", along(stored.scale, stored.axis, stored.codes.dim()))
            node.CopyFrom(helper.make_node("Mul", [levels, by], [result]))
            return
        kind = TensorProto.INT8
        if stored.saturates:  # products of unsigned numbers are added in 32 bits by all processors
            shift, kind = self._constant(f"{codes}.shift", torch.tensor(128.0)), TensorProto.UINT8
            integers = self._node("Add", [integers, shift], result)
            zeros = np.full(tuple(stored.scale.shape), 128, dtype=np.uint8)
            self.constants[f"{codes}.zeros"] = numpy_helper.from_array(zeros, f"{codes}.zeros")
            node.input.append(f"{codes}.zeros")
        node.input[0] = self._node("Cast", [integers], result, to=kind)

    def _turn_back(self, node: NodeProto) -> None:
        """Let products take a linear layer's weight as it is stored, (K, N): what is turned in between is not fused."""
        (weight,) = node.output
        for turned in self.users(weight):
            if turned.op_type != "Transpose":
                continue
            for user in self.users(turned.output[0]):
                if user.op_type == "Transpose":
                    for taker in self.users(user.output[0]):
                        taker.input[list(taker.input).index(user.output[0])] = weight
                    self.nodes.remove(user)
                elif user.op_type == "Gemm" and self._takes_codes(user):
                    self._separate_product(user, weight)
            if not self.users(turned.output[0]):
                self.nodes.remove(turned)

    def separate_product(self, gemm: NodeProto) -> None:
        """Take the bias out of a linear layer of codes, whose real weights runtimes would quantize, too."""
        if self._takes_codes(gemm):
            turned = f"{gemm.output[0]}.weight"
            self.nodes.insert(self.nodes.index(gemm), helper.make_node("Transpose", [gemm.input[1]], [turned]))
            self._separate_product(gemm, turned)

    def _separate_product(self, gemm: NodeProto, weight: str) -> None:
        """A linear layer as a product, which runtimes fuse with the codes of both sides, and the bias behind it."""
        (result,) = gemm.output
        bias = self._array(gemm.input[2]) if len(gemm.input) > 2 else np.zeros(1, dtype=np.float32)
        made = [helper.make_node("MatMul", [gemm.input[0], weight], [f"{result}.products"])]
        negative = f"{result}.negative_bias"
        if bias is None:  # it is computed
            made.append(helper.make_node("Neg", [gemm.input[2]], [negative]))
        else:
            self._constant(negative, -torch.from_numpy(bias.copy()))
        made.append(helper.make_node("Sub", [f"{result}.products", negative], [result]))  # Add would be fused back
        position = self.nodes.index(gemm)
        self.nodes[position : position + 1] = made
        self.makers |= {part.output[0]: part for part in made}

    def _takes_codes(self, node: NodeProto) -> bool:
        before = self.makers.get(node.input[0])
        return before is not None and before.op_type == "DequantizeLinear"

    def _product_of_codes(self, node: NodeProto, weight: str) -> bool:
        return node.op_type == "MatMul" and node.input[1] == weight and self._takes_codes(node)

    def written(self) -> onnx.ModelProto:
        """The model with what its outputs follow from, without notes on where each came from: those are long."""
        needed, kept = set(self.outputs), []
        for node in reversed([*self.early, *self.nodes]):
            if needed & set(node.output):
                needed |= set(node.input)
                del node.metadata_props[:]
                node.ClearField("doc_string")
                node.ClearField("name")
                kept.append(node)
        graph = self.proto.graph
        for field in (graph.node, graph.initializer, graph.value_info):
            del field[:]
        graph.node.extend(reversed(kept))
        graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in needed)
        return self.proto

    def separate_bias(self, node: NodeProto) -> None:
        """Take the bias out of a convolution between codes, whose real weights and bias runtimes would quantize."""
        weight, (result,) = self.makers.get(node.input[1]), node.output
        if weight is not None and weight.op_type == "DequantizeLinear":
            return  # they are quantized
        if not self._between_codes(node, ("QuantizeLinear", "Relu", "Clip")):
            return
        given = len(node.input) > 2 and bool(node.input[2])
        bias = self._array(node.input[2]) if given else None
        if given and bias is None:
            return  # it is computed, which keeps runtimes from quantizing it
        dimensions = next(len(a.ints) for a in node.attribute if a.name == "kernel_shape")
        values = torch.zeros(1) if bias is None else -torch.from_numpy(bias.copy())
        negative = self._constant(f"{result}.negative_bias", values.reshape(-1, *[1] * dimensions))
        del node.input[2:]
        node.output[0] = f"{result}.sums"
        self.makers[node.output[0]] = node
        position = self.nodes.index(node) + 1  # an addition would be fused back
        self.nodes.insert(position, helper.make_node("Sub", [node.output[0], negative], [result]))

    def _between_codes(self, node: NodeProto, after: tuple[str, ...]) -> bool:
        """Whether a convolution takes codes and one of these operators alone takes its result."""
        before, users = self.makers.get(node.input[0]), self.users(node.output[0])
        while before is not None and before.op_type == "Pad":  # of codes as well as of what they stand for
            before = self.makers.get(before.input[0])
        codes = before is not None and before.op_type == "DequantizeLinear"
        return codes and len(users) == 1 and users[0].op_type in after and node.output[0] not in self.outputs

    def _code_range(self, node: NodeProto) -> tuple[float, float] | None:
        """Smallest and largest code that leaves a QuantizeLinear with a zero point of 0, and the Clip behind it."""
        zero = self._array(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.any():
            return None
        users = self.users(node.output[0])
        if len(users) == 1 and users[0].op_type == "Clip":
            low, high = (self._number(name) for name in users[0].input[1:3])
            return None if low is None or high is None else (low, high)
        return float(np.iinfo(zero.dtype).min), float(np.iinfo(zero.dtype).max)

    def _array(self, name: str) -> np.ndarray | None:
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Cast":
            return self._array(maker.input[0])
        if maker is not None and maker.op_type == "Constant":
            value: Any = helper.get_attribute_value(maker.attribute[0])
            return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def _number(self, name: str) -> float | None:
        array = self._array(name)
        return float(array.reshape(())) if array is not None and array.size == 1 else None

    def _constant(self, name: str, values: Tensor) -> str:
        self.constants[name] = numpy_helper.from_array(values.detach().float().numpy(), name)
        return name

    def _node(self, kind: str, inputs: list[str], result: str, **attributes: Any) -> str:
        """A node that follows from constants alone, on the way to a result; the name of what it gives."""
        name = f"{result}.{len(self.early)}"
        self.early.append(helper.make_node(kind, inputs, [name], **attributes))
        return name
