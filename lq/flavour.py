"""A packed network as an MLflow model: the file itself is the model, without pickle and without code of the user's."""

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lq.exporting import load_with_header, read_header
from lq.tracking import is_mlflow

__all__ = ["PackedModel", "log_packed_model"]

_ALLOW = "lq_allow.json"


class PackedModel:
    """What MLflow asks for predictions.

    Args:
        path: of the artifact.
        allow: import paths that the artifact may call.
    """

    def __init__(self, path: str | Path, allow: Collection[str] = ()) -> None:
        """Load the network and what its input must look like."""
        self.network, header = load_with_header(path, allow)
        self.input = header.get("input", {})

    @torch.inference_mode()
    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """Outputs of the network.

        Args:
            model_input: images from 0 to 1, float ``(N, C, H, W)``; normalised here where the file says how.
            params: has no meaning here.

        Returns:
            Float array ``(N, classes)``.
        """
        x = torch.as_tensor(np.asarray(model_input), dtype=torch.float32)
        if "mean" in self.input and "std" in self.input:
            mean, std = (torch.tensor(self.input[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
            x = (x - mean) / std
        return self.network(x).numpy()


def _load_pyfunc(path: str) -> PackedModel:
    """What MLflow calls with the folder it stored."""
    folder = Path(path)
    if folder.is_file():
        return PackedModel(folder)
    allow = json.loads((folder / _ALLOW).read_text(encoding="utf-8"))
    (network,) = folder.glob("*.safetensors")
    return PackedModel(network, allow)


def log_packed_model(
    loggers: Collection[Any], path: str | Path, *, registered_name: str | None = None, allow: Collection[str] = ()
) -> None:
    """Log an artifact as an MLflow model that ``mlflow models serve`` and ``mlflow.pyfunc.load_model`` run.

    Args:
        loggers: Lightning loggers; those of other stores are passed over.
        path: of the artifact.
        registered_name: name in the model registry; None to log it with the run alone.
        allow: import paths that the artifact may call wherever the model is loaded.
    """
    for logger in filter(is_mlflow, loggers):
        import mlflow
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        import lq

        shape = read_header(path)[1].get("input", {}).get("shape")
        described: dict[str, Any] = {}
        if shape:
            images, logits = (TensorSpec(np.dtype(np.float32), (-1, *size)) for size in (shape, (-1,)))
            described["signature"] = ModelSignature(Schema([images]), Schema([logits]))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "network"
            folder.mkdir()
            (folder / Path(path).name).write_bytes(Path(path).read_bytes())
            (folder / _ALLOW).write_text(json.dumps(sorted(allow)), encoding="utf-8")
            before = mlflow.get_tracking_uri()
            mlflow.set_tracking_uri(logger.experiment.tracking_uri)
            try:
                with mlflow.start_run(run_id=logger.run_id):
                    mlflow.pyfunc.log_model(
                        name="network",
                        loader_module="lq.flavour",
                        data_path=str(folder),
                        registered_model_name=registered_name,
                        pip_requirements=[f"lq=={lq.__version__}"],
                        **described,
                    )
            finally:
                mlflow.set_tracking_uri(before)
