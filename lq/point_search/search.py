"""The whole post-training search: `search`."""

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from lq.nn import QuantLayer, named_quantized_layers
from lq.point_search.activations import calibrate_inputs
from lq.point_search.adopt import adopt
from lq.point_search.bias import correct_biases, mean_inputs
from lq.point_search.fold import equalize, fold_batch_norms
from lq.point_search.graph import Chain, trace_chains
from lq.point_search.inputs import Forward, fisher_importance, hessians, input_importance, run, tensors_of, with_patches
from lq.point_search.layer import search_layer
from lq.point_search.report import LayerResult, SearchReport
from lq.point_search.rounding import feed_back, reconstruct
from lq.point_search.store import Store, digest_of
from lq.quantizers import PointQuantizer, Quantizer
from lq.search_spec import SearchSpec
from lq.surgery import apply_plan, dequantize_model, execution_order, make_plan
from lq.surgery.plan import Plan

__all__ = ["search"]

_SAME = 1e-2  # largest relative change of the output that folding and equalizing may cause by rounding


def search(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    spec: SearchSpec | None = None,
    *,
    folder: str | Path | None = None,
    forward: Forward | None = None,
    progress: bool = True,
) -> SearchReport:
    """Quantize a trained network without training it: the best points and scales of every layer, and what helps them.

    In this order, each if the spec asks for it: fold batch norms, equalize, measure importance, search every layer, set
    input quantizers, correct biases, round with error feedback, reconstruct block by block. All of it happens on a
    copy; the model changes at the very end, in place, and is then in evaluation mode with its levels chosen. It can be
    trained further with `lq.LearnedQuantization`.

    Args:
        model: float, not wrapped for distributed training.
        batches: calibration data on the model's device: tensors, tuples that start with one, or mappings. Needed for
            input quantizers, importance, bias correction, error feedback and reconstruction.
        spec: what to do; the default searches 4-bit subsets for all weights but those of the first and last layer.
        folder: where finished layers and blocks are kept, so that an interrupted search goes on where it was.
        forward: runs the model on a batch; by default a mapping as keywords, the first of a tuple, else the batch.
        progress: whether to show a progress bar.

    Returns:
        What was found and done.

    Raises:
        TypeError: for a wrapped model or something that is no spec.
        ValueError: for missing or unfitting batches, weights that are not finite or all zero, globs without a match.
        StaleResultError: where ``folder`` holds results of other weights or settings.

    >>> torch.manual_seed(0).seed() and None
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> report = search(net, spec=SearchSpec(bits=3), progress=False)
    >>> [(row.path, row.quantizer, row.bits) for row in report.rows]
    [('0', 'uniform (mid_tread)', 8), ('2', 'subset', 3), ('4', 'uniform (mid_tread)', 8)]
    """
    spec = SearchSpec() if spec is None else spec
    if isinstance(model, DistributedDataParallel | nn.DataParallel):
        raise TypeError(f"model must not be wrapped in {type(model).__name__}: pass its .module")
    if not isinstance(spec, SearchSpec):
        raise TypeError(f"spec must be an lq.SearchSpec, got {spec!r}: write lq.SearchSpec(bits=4)")
    if isinstance(batches, Tensor | Mapping):
        raise TypeError(f"batches must be several, got one {type(batches).__name__}: put it into a list")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("lq.search must not run under torch.inference_mode, which forbids gradients: leave it first")
    data = [] if batches is None else list(batches)
    if spec.needs_batches and not data:
        raise ValueError(
            "batches must hold calibration data for what the spec asks for, got none: pass some hundred training "
            "inputs, or leave out importance, activation, bias_correction, rounding and reconstruct"
        )
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        work = _Search(model, data, spec, Store(folder), forward, progress)
        report = work.run()
    adopt(model, work.model)
    return replace(report, seconds=time.perf_counter() - start)


class _Search:
    """One search, on a copy of the model."""

    def __init__(
        self, model: nn.Module, data: list[Any], spec: SearchSpec, store: Store, forward: Forward | None, progress: bool
    ) -> None:
        try:
            self.model = copy.deepcopy(model).eval()
        except RuntimeError as error:
            raise ValueError(
                f"model must be one that can be copied, got {type(model).__name__}: {error}. Use "
                "torch.nn.utils.parametrizations in place of hooks that compute weights, or remove them"
            ) from error
        self.was_quantized = dequantize_model(self.model, keep_latent=True)
        self.data, self.spec, self.store, self.forward = data, spec, store, forward
        self.progress = progress
        self.source = ""
        self.results: dict[str, LayerResult] = {}

    def run(self) -> SearchReport:
        """All stages."""
        spec, model = self.spec, self.model
        order = execution_order(model, lambda: run(model, self.data[:1], self.forward)) if self.data else None
        plan = make_plan(model, spec, order)
        folded, equalized, chains, notes = self._prepare()
        # of what everything below follows from: figures derived from it may differ in the last digit between machines
        if spec.importance or spec.reconstruct:
            self.source = digest_of([*model.state_dict().values(), *tensors_of(self.data)], {})
        names = list(plan.specs)
        layers = {path: model.get_submodule(path) for path in names}
        importance = self._importance(layers)
        means = mean_inputs(model, layers, self.data, self.forward) if spec.bias_correction else {}
        products = hessians(model, with_patches(layers), self.data, self.forward) if self._feeds_back else {}
        float_model = copy.deepcopy(model) if spec.reconstruct else model
        swap = self._search_layers(plan, importance)
        quantized = {path: layer for path, layer in named_quantized_layers(model).items() if path in self.results}
        if spec.activation is not None:
            calibrate_inputs(model, named_quantized_layers(model), self.data, self.forward)
        floats = {path: layer.float_weight().detach().clone() for path, layer in quantized.items() if path in means}
        fed_back = feed_back(model, quantized, products, progress=self.progress) if self._feeds_back else {}
        corrected = correct_biases(model, quantized, floats, means, chains) if spec.bias_correction else []
        blocks = ()
        if spec.reconstruct:
            ordered = [p for p in order or names if p in quantized]
            blocks = reconstruct(
                model,
                float_model,
                ordered,
                self.data,
                spec,
                (self.store, digest_of([], {"source": self.source, "spec": spec.to_dict()})),
                forward=self.forward,
                progress=self.progress,
            )
        rows = tuple(self._with_input(row, quantized[path]) for path, row in self.results.items())
        return SearchReport(rows, swap, folded, equalized, tuple(corrected), fed_back, tuple(blocks), tuple(notes))

    @property
    def _feeds_back(self) -> bool:
        return self.spec.rounding == "error_feedback"

    def _prepare(self) -> tuple[dict[str, str], dict[str, str], dict[str, Chain], list[str]]:
        """Fold and equalize, and see that the network computes what it did."""
        spec, model = self.spec, self.model
        notes: list[str] = []
        if self.was_quantized:
            notes.append(
                f"{len(self.was_quantized)} layers were quantized before: searched anew from their latent weights"
            )
        if not (spec.fold_batch_norm or spec.equalize or spec.bias_correction):
            return {}, {}, {}, notes
        chains, obstacle = trace_chains(model)
        if obstacle:
            notes.append(f"batch norms not folded, layers not equalized: the network cannot be traced ({obstacle})")
            return {}, {}, {}, notes
        before = self._outputs()
        folded = fold_batch_norms(model, chains) if spec.fold_batch_norm else {}
        equalized = equalize(model, chains) if spec.equalize else {}
        after = self._outputs()
        if before is not None and after is not None:
            change = float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))
            if not change <= _SAME:
                raise ValueError(
                    f"folding and equalizing must not change what the model computes, got a change of {change:.2g}: "
                    "set fold_batch_norm=False and equalize=False, and report the model"
                )
        return folded, equalized, chains, notes

    @torch.no_grad()
    def _outputs(self) -> Tensor | None:
        seen: list[Any] = []
        if not self.data:
            return None
        handle = self.model.register_forward_hook(lambda *args: seen.append(args[-1]))
        try:
            run(self.model, self.data[:1], self.forward)
        finally:
            handle.remove()
        return seen[0].detach().clone() if seen and isinstance(seen[0], Tensor) else None

    def _importance(self, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        if self.spec.importance == "inputs":
            return input_importance(self.model, layers, self.data, self.forward)
        if self.spec.importance == "fisher":
            return fisher_importance(self.model, layers, self.data, self.forward, self.spec.search_seed)
        return {}

    def _search_layers(self, plan: Plan, importance: Mapping[str, Tensor]) -> Any:
        """Search each layer, or take it from the store."""
        specs = plan.specs
        bar = tqdm(total=len(specs), desc="searching layers", unit="layer", disable=not self.progress)

        def calibrate(path: str, quantizer: Quantizer, weight: Tensor) -> None:
            layer, h = specs[path], importance.get(path)
            if not bool((weight != 0).any()):
                raise ValueError(f"weight of {path} must not be all zero, got nothing to quantize: exclude it")
            settings = {"layer": layer.to_dict(), "importance": self.spec.importance, "compare": self.spec.reference}
            source = self.source if self.spec.importance else ""
            digest = digest_of([weight], {"path": path, "source": source, **settings})
            stored = self.store.load(f"layer-{path}", digest)
            if stored is None:
                self.results[path] = search_layer(path, quantizer, weight, h, layer, self.spec, digest)
                self.store.save(f"layer-{path}", digest, _tensors(quantizer), self.results[path])
            else:
                tensors, values = stored
                quantizer.load_state_dict(tensors, strict=False)
                points = values["points"]
                self.results[path] = LayerResult(**{**values, "points": None if points is None else tuple(points)})
            bar.set_postfix_str(path)
            bar.update()

        try:
            return apply_plan(self.model, plan, calibrate)
        finally:
            bar.close()

    def _with_input(self, row: LayerResult, layer: QuantLayer) -> LayerResult:
        inputs = layer.input_quantizer
        if inputs is None or not inputs.is_calibrated:
            return row
        kind = "subset" if isinstance(inputs.quantizer, PointQuantizer) else "uniform"
        sign = "signed" if inputs.quantizer.codes.lo < 0 else "unsigned"
        return replace(row, activation=f"{inputs.quantizer.codes.bits} bits {sign} {kind}")


def _tensors(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: cast(Tensor, value) for name, value in quantizer.state_dict().items() if name in ("scale", "points")}
