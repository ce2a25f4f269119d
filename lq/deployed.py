"""Networks in every form they are deployed in, each as a function of images."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.checkpoints import load_from_checkpoint
from lq.classifier import Classifier
from lq.exporting import IntegerNetwork, architecture_of, load_with_header, network_of
from lq.exporting.c import CProgram

__all__ = ["INTEGER", "Deployed", "load_network", "open_deployed"]

INTEGER = "integer:"


@dataclass(frozen=True)
class Deployed:
    """A network that gives logits.

    Args:
        name: by which a person tells it from others.
        kind: "float", "checkpoint", "artifact", "integer", "onnx" or "c".
        bytes: of its file; of a C network its constants; of a float network its parameters.
        run: images ``(N, C, H, W)`` to logits ``(N, classes)``.
        shape: of one image, where it says so.
        clock: seconds, from any start; a clock of its own where starting it costs time that does not count.
    """

    name: str
    kind: str
    bytes: int
    run: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] | None = None
    clock: Callable[[], float] = time.perf_counter


def load_network(path: Path, allow: Collection[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """A quantized network from a checkpoint or an artifact.

    Args:
        path: of the file.
        allow: import paths that an artifact may call.

    Returns:
        The network, in evaluation mode, and what the file says: architecture, input, metrics.
    """
    if path.suffix != ".ckpt":
        return load_with_header(path, allow)
    module = load_from_checkpoint(Classifier, path, map_location="cpu")
    return network_of(module).eval(), {"architecture": architecture_of(module), "input": {}, "metrics": {}}


def open_deployed(file: str, shape: tuple[int, ...], allow: Collection[str] = ()) -> Deployed:
    """Open a network.

    Args:
        file: a checkpoint ("net.ckpt"), an artifact ("net.lq.safetensors"), an ONNX file, a C file or a program made
            from one; with "integer:" before a checkpoint or an artifact, the integer engine on it.
        shape: of one image.
        allow: import paths that an artifact may call.

    Returns:
        The network, in evaluation mode.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for another kind of file.
        lq.UnsupportedError: for a network that has no integer form.
    """
    path = Path(file.removeprefix(INTEGER))
    if not path.is_file():
        raise FileNotFoundError(f"files must exist, got {str(path)!r} which does not")
    try:
        return _open(file, path, shape, allow)
    except (ValueError, ImportError, FileNotFoundError):
        raise
    except Exception as error:  # whatever a loader makes of a file that is not what its name says
        raise ValueError(f"files must be sound, {str(path)!r} is not: {type(error).__name__}: {error}") from error


def _open(file: str, path: Path, shape: tuple[int, ...], allow: Collection[str]) -> Deployed:
    size = path.stat().st_size
    if path.suffix in (".ckpt", ".safetensors"):
        network, header = load_network(path, allow)
        given = tuple(header.get("input", {}).get("shape", ())) or None
        if file.startswith(INTEGER):
            return Deployed(file, "integer", size, IntegerNetwork(network, given or shape), given)
        return Deployed(file, "checkpoint" if path.suffix == ".ckpt" else "artifact", size, network, given)
    if file.startswith(INTEGER):
        raise ValueError(f"files must name a checkpoint or an artifact after 'integer:', got {file!r}")
    if path.suffix == ".onnx":
        return Deployed(file, "onnx", size, *_onnx(path))
    if path.suffix == ".c" or path.stat().st_mode & 0o111:
        program = CProgram(path)
        return Deployed(file, "c", program.input["flash"], program, program.shape, lambda: program.seconds)
    raise ValueError(f"files must end in .ckpt, .lq.safetensors, .onnx or .c, or be programs, got {file!r}")


def _onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...] | None]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path} needs onnxruntime: pip install 'lq[onnx]'") from error
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    sizes = tuple(given.shape[1:])
    shape = sizes if all(isinstance(n, int) for n in sizes) else None
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0]), shape
