"""Search of one layer: its levels, and how they compare with other ways to choose them."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from lq.functional.codebook import codebook_rows
from lq.functional.hard import hard_quantize
from lq.functional.levels import code_range
from lq.functional.scale_search import best_step
from lq.point_search.report import LayerResult, as_powers
from lq.quantizers import PointQuantizer, Quantizer
from lq.search_spec import SearchSpec
from lq.spec import LayerSpec

__all__ = ["search_layer"]


@torch.no_grad()
def search_layer(
    path: str, quantizer: Quantizer, weight: Tensor, h: Tensor | None, layer: LayerSpec, spec: SearchSpec, digest: str
) -> LayerResult:
    """Choose the levels of a weight quantizer, in place.

    Args:
        path: of the layer.
        quantizer: of its weight.
        weight: float weight.
        h: importance, shape of the weight, or None.
        layer: spec of the layer.
        spec: of the search.
        digest: of the inputs.

    Returns:
        What was found.
    """
    start = time.perf_counter()
    quantizer.calibrate_(weight, layer.scale_init, importance=h, power=layer.power)
    seconds = time.perf_counter() - start
    value = quantizer.hard(weight).double()
    error = (weight.double() - value).abs_()
    loss = _sum(error.pow(layer.power), h)
    energy, squared = float(weight.double().square().sum()), float(error.square().sum())
    points = None
    if isinstance(quantizer, PointQuantizer):
        first = quantizer.points if quantizer.points.dim() == 1 else quantizer.points[0]
        points = tuple(first.tolist())
    result = LayerResult(
        path=path,
        shape="x".join(map(str, weight.shape)),
        bits=quantizer.codes.bits,
        quantizer=layer.quantizer if points is not None else f"uniform ({layer.weight_grid})",
        points=points,
        powers=as_powers(points) if points is not None and layer.quantizer == "subset" else None,
        scale=float(quantizer.scale.mean()),
        scales=quantizer.scale.numel(),
        loss=loss,
        sqnr_db=float(10 * torch.tensor(energy / max(squared, 1e-300)).log10()),
        reference_loss=None,
        mid_tread_loss=None,
        mid_rise_loss=None,
        zero_channels=int((quantizer.layout.rows(weight) == 0).all(1).sum()),
        activation=None,
        seconds=seconds,
        digest=digest,
    )
    return _compared(result, quantizer, weight, h, layer) if spec.reference and points is not None else result


def _sum(terms: Tensor, h: Tensor | None) -> float:
    return float((terms if h is None else terms * h).sum())


def _compared(
    result: LayerResult, quantizer: Quantizer, weight: Tensor, h: Tensor | None, layer: LayerSpec
) -> LayerResult:
    """Losses of free levels and of uniform ones, at the same granularity, importance and power."""
    rows = quantizer.layout.rows(weight).to(torch.promote_types(weight.dtype, torch.float32))
    weights = quantizer.layout.importance_rows(h, weight)
    count = 2**layer.bits if layer.signed_points else 2 ** (layer.bits - 1)
    _, free = codebook_rows(rows if layer.signed_points else rows.abs(), weights, count, layer.power)
    uniform = {}
    for grid in ("mid_tread", "mid_rise"):
        codes = code_range(layer.bits, grid=grid)
        step = best_step(rows, weights, codes, layer.power)[:, None]
        error = (rows.double() - hard_quantize(rows.double(), step, **codes._asdict())).abs_().pow_(layer.power)
        uniform[grid] = _sum(error, weights)
    return replace(
        result,
        reference_loss=float(free.sum()),
        mid_tread_loss=uniform["mid_tread"],
        mid_rise_loss=uniform["mid_rise"],
    )
