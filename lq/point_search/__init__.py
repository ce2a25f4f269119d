"""Post-training: choose points for every layer of a trained network, and everything that helps the result."""

from lq.point_search.fold import equalize, fold_batch_norms
from lq.point_search.graph import trace_chains
from lq.point_search.report import BlockResult, LayerResult, SearchReport
from lq.point_search.search import search
from lq.point_search.store import StaleResultError

__all__ = [
    "BlockResult",
    "LayerResult",
    "SearchReport",
    "StaleResultError",
    "equalize",
    "fold_batch_norms",
    "search",
    "trace_chains",
]
