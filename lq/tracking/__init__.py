"""Names, figures and artifacts for any Lightning logger."""

from lq.tracking.artifacts import is_mlflow, log_rows, log_text
from lq.tracking.names import layer_metric, metric
from lq.tracking.values import network_metrics

__all__ = ["is_mlflow", "layer_metric", "log_rows", "log_text", "metric", "network_metrics"]
