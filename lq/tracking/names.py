"""Metric names: stable, because users build dashboards on them."""

__all__ = ["PREFIX", "layer_metric", "metric"]

PREFIX = "lq/"
_NAMES = frozenset(
    (
        "loss_total",
        "alignment",
        "alignment_soft",
        "quantization_loss",
        "sqnr_db",
        "slope",
        "regularizer",
        "distillation_loss",
        "clipped_fraction",
        "zero_fraction",
        "frozen_fraction",
        "size_bytes",
        "bits_per_weight",
    )
)


def metric(name: str) -> str:
    """Full name of a metric of the whole network.

    Args:
        name: short name.

    Returns:
        The name with its prefix.

    Raises:
        ValueError: for a name that is not on the list.

    >>> metric("alignment")
    'lq/alignment'
    """
    if name not in _NAMES:
        raise ValueError(f"metric name must be one of {sorted(_NAMES)}, got {name!r}: choose one of those")
    return PREFIX + name


def layer_metric(name: str, path: str) -> str:
    """Full name of a metric of one layer.

    Args:
        name: short name.
        path: module path.

    Returns:
        The name with prefix and path.

    >>> layer_metric("alignment", "layer1.0.conv1")
    'lq/alignment/layer1.0.conv1'
    """
    return f"{metric(name)}/{path}"
