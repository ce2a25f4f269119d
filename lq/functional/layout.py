"""Shapes that all quantizers share: scales against tensors, and reductions back to the shape of the scale."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["SMALLEST_SCALE", "ScaleLayout", "damped", "in_memory_order", "pass_inside", "positive", "reduce_to_scale"]

SMALLEST_SCALE = 1e-12
_LARGEST_DOT = 2**31 - 1  # BLAS counts in 32 bits


def positive(scale: Tensor) -> Tensor:
    """Magnitude of a learned scale, kept off zero, in at least float32: ``max(|s|, 1e-12)``.

    Args:
        scale: any shape; a step of the optimizer may have carried it across zero.

    Returns:
        Positive scale of the same shape.

    >>> positive(torch.tensor([-0.5, 0.0]))
    tensor([5.0000e-01, 1.0000e-12])
    """
    if scale.dtype in (torch.float16, torch.bfloat16):
        scale = scale.float()
    return scale.abs().clamp_min(SMALLEST_SCALE)


class _Damped(torch.autograd.Function):
    @staticmethod
    def forward(parameter: Tensor, factor: float | Tensor) -> Tensor:  # type: ignore[override]
        return parameter.view_as(parameter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


def damped(parameter: Tensor, factor: float | Tensor) -> Tensor:
    """The very same values, with the gradient multiplied by a factor.

    Args:
        parameter: any shape.
        factor: on its gradient; a number, or broadcastable to ``parameter`` and without a gradient of its own.

    Returns:
        Values of the parameter.

    >>> scale = torch.ones(1, requires_grad=True)
    >>> damped(scale, 0.5).backward()
    >>> scale.grad
    tensor([0.5000])
    """
    return _Damped.apply(parameter, factor)  # type: ignore[no-any-return]


def pass_inside(grad: Tensor, t: Tensor, low: float, high: float) -> Tensor:
    """Gradient of clipping: ``grad`` where ``low <= t <= high``, 0 elsewhere.

    The fused kernel behind hardtanh does it in one pass, many times faster on a CPU than masks; it is strict at the
    bounds, which are therefore widened by a millionth, so that weights that lie on an end level still learn.

    Args:
        grad: upstream gradient.
        t: clipped argument, shape of ``grad``.
        low: lower bound.
        high: upper bound.

    Returns:
        Gradient, shape of ``t``.

    >>> pass_inside(torch.ones(3), torch.tensor([-1.0, 1.0, 1.1]), -1.0, 1.0)
    tensor([1., 1., 0.])
    """
    margin = 1e-6 * max(abs(low), abs(high))
    return torch.ops.aten.hardtanh_backward(grad, t, low - margin, high + margin)


def reduce_to_scale(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Sum of ``a * b`` over everything that shares one scale, in the shape of the scale.

    Args:
        a: any shape.
        b: shape of ``a``.
        scale: shape broadcastable to ``a``; dimensions of size 1 are summed over.

    Returns:
        Sums, shape of ``scale``.

    >>> reduce_to_scale(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1))
    tensor([[3.],
            [3.]])
    """
    if scale.numel() == 1:
        if a.numel() <= _LARGEST_DOT and a.dtype == b.dtype:
            if _channels_last(a) and _channels_last(b):
                a, b = in_memory_order(a), in_memory_order(b)
            return torch.dot(a.reshape(-1), b.reshape(-1)).to(scale.dtype).reshape(scale.shape)
        return (a * b).sum(dtype=scale.dtype).reshape(scale.shape)
    return (a * b).to(scale.dtype).sum_to_size(scale.shape)


def in_memory_order(x: Tensor) -> Tensor:
    """The same values with axes in the order in which they lie, which makes it flat without a copy.

    Args:
        x: any shape.

    Returns:
        Of images with their channels side by side a view ``(N, H, W, C)``, else ``x`` itself.

    >>> in_memory_order(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)).shape
    torch.Size([2, 4, 5, 3])
    """
    return x.permute(0, 2, 3, 1) if _channels_last(x) and not x.is_contiguous() else x


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


class ScaleLayout(NamedTuple):
    """Which values of a tensor share a scale, and how to bring the two together.

    Args:
        scales: number of scales.
        shape: shape in which the tensor is viewed, or None to leave it as it is.
        axes: axes of that view that have scales of their own, the product of whose sizes is ``scales``.

    >>> ScaleLayout.per_channel((6, 2, 3, 3)).broadcast(torch.ones(6)).shape
    torch.Size([6, 1, 1, 1])
    >>> ScaleLayout.per_channel((4, 3, 2, 2), transposed=True, groups=2).scales
    6
    """

    scales: int = 1
    shape: tuple[int, ...] | None = None
    axes: tuple[int, ...] = ()

    @classmethod
    def per_channel(cls, shape: Sequence[int], *, transposed: bool = False, groups: int = 1) -> "ScaleLayout":
        """One scale per output channel of a weight.

        Args:
            shape: of the weight: ``(O, I/g, ...)``, or ``(I, O/g, ...)`` where transposed.
            transposed: whether the layer is a transposed convolution.
            groups: its groups g.

        Returns:
            The layout.
        """
        if not transposed:
            return cls(shape[0], tuple(shape), (0,))
        view = (groups, shape[0] // groups, *shape[1:])
        return cls(groups * shape[1], view, (0, 2))

    @classmethod
    def along(cls, shape: Sequence[int], channel_axis: int | None) -> "ScaleLayout":
        """One scale per index of one axis.

        Args:
            shape: of the tensor.
            channel_axis: the axis, None for one scale in all.

        Returns:
            The layout.

        Raises:
            ValueError: for an axis that the tensor does not have.
        """
        if channel_axis is None:
            return cls()
        if not -len(shape) <= channel_axis < len(shape):
            raise ValueError(f"channel_axis must be an axis of the weight, got {channel_axis} for shape {tuple(shape)}")
        axis = channel_axis % len(shape)
        return cls(shape[axis], tuple(shape), (axis,))

    def view(self, x: Tensor) -> Tensor:
        """The tensor in the shape that scales broadcast to."""
        return x if self.shape is None else x.reshape(self.shape)

    def broadcast(self, scale: Tensor) -> Tensor:
        """The scales in the shape that broadcasts to `view`."""
        if self.shape is None:
            return scale
        return scale.reshape([n if i in self.axes else 1 for i, n in enumerate(self.shape)])

    def rows(self, x: Tensor) -> Tensor:
        """The values of each scale as a row, shape ``(scales, N)``."""
        if self.shape is None:
            return x.reshape(1, -1)
        others = [i for i in range(len(self.shape)) if i not in self.axes]
        return x.reshape(self.shape).permute(*self.axes, *others).reshape(self.scales, -1)

    def importance_rows(self, importance: Tensor | None, x: Tensor) -> Tensor | None:
        """Importance of each value as rows: float64, and 1 throughout a row that has none.

        Args:
            importance: broadcastable to ``x``, or None.
            x: the values.

        Returns:
            Shape ``(scales, N)``, or None for None.
        """
        if importance is None:
            return None
        rows = self.rows(importance.detach().to(x.device).expand(x.shape)).double()
        return torch.where(rows.sum(1, keepdim=True) > 0, rows, torch.ones_like(rows))

    def unrows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of `rows`.

        Args:
            rows: shape ``(scales, N)``.
            shape: of the tensor that the rows were made from.

        Returns:
            Tensor of that shape.
        """
        if self.shape is None:
            return rows.reshape(tuple(shape))
        others = [i for i in range(len(self.shape)) if i not in self.axes]
        order = [*self.axes, *others]
        values = rows.reshape([self.shape[i] for i in order])
        return values.permute([order.index(i) for i in range(len(order))]).reshape(tuple(shape))
