"""Deployed networks side by side: accuracy, agreement, size and speed on the same images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lq.deployed import Deployed
from lq.text import format_table

__all__ = ["EvaluationReport", "EvaluationRow", "evaluate"]


@dataclass
class EvaluationRow:
    """Figures of one network.

    Args:
        name: of the network.
        kind: of the network.
        bytes: of the network.
        right: images it classified rightly.
        seconds: that it computed.
        same: images for which each network, in the order of the report, gave the same class.
    """

    name: str
    kind: str
    bytes: int
    right: int = 0
    seconds: float = 0.0
    same: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationReport:
    """Figures of all networks.

    Args:
        rows: one per network.
        images: that were looked at.
    """

    rows: tuple[EvaluationRow, ...]
    images: int

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary per network, agreement in fractions of the images."""
        return [
            {
                "network": row.name,
                "kind": row.kind,
                "accuracy": row.right / self.images,
                "bytes": row.bytes,
                "images_per_second": self.images / max(row.seconds, 1e-9),
                **{f"same_class_as_{i + 1}": same / self.images for i, same in enumerate(row.same)},
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        """A table; the last columns say how often two networks gave the same class."""
        same = [f"same as {i + 1}" for i in range(len(self.rows))]
        rows = []
        for i, row in enumerate(self.to_dicts()):
            name, kind, accuracy, size, speed, *agreement = row.values()
            shares = [f"{share:.2%}" for share in agreement]
            rows.append((f"{i + 1}", name, kind, f"{accuracy:.2%}", f"{size:,}", f"{speed:.0f}", *shares))
        table = format_table(("", "network", "kind", "accuracy", "bytes", "images/s", *same), rows)
        return f"{table}\n\n{self.images:,} images; accuracy has a standard error of {self._error():.2%}"

    def _error(self) -> float:
        best = max(row.right for row in self.rows) / self.images
        return (best * (1 - best) / self.images) ** 0.5


@torch.inference_mode()
def evaluate(
    networks: Sequence[Deployed], batches: Iterable[Any], *, images: int | None = None, progress: bool = True
) -> EvaluationReport:
    """Run networks on the same images.

    Args:
        networks: what to run.
        batches: pairs of images ``(N, C, H, W)`` and classes ``(N,)``.
        images: how many to look at; None for all.
        progress: whether to show a bar.

    Returns:
        The figures.

    Raises:
        ValueError: for a network that takes images of another shape, for no networks and for no images.

    >>> network = Deployed("sign", "float", 0, lambda x: torch.cat([-x, x], 1).mean((2, 3)))
    >>> batch = torch.tensor([-1.0, 2.0]).reshape(2, 1, 1, 1), torch.tensor([0, 0])
    >>> evaluate([network], [batch], progress=False).to_dicts()[0]["accuracy"]
    0.5
    """
    if not networks:
        raise ValueError("networks must hold at least one, got none: open one with lq.deployed.open_deployed")
    if images is not None and images < 1:
        raise ValueError(f"images must be at least 1, got {images}: leave it out for all")
    rows = [EvaluationRow(n.name, n.kind, n.bytes, same=[0] * len(networks)) for n in networks]
    total = 0
    for x, y in tqdm(batches, desc="Evaluating", unit="batch", disable=not progress, leave=False):
        if images is not None:
            x, y = x[: images - total], y[: images - total]
        _check_shapes(networks, tuple(x.shape[1:]))
        classes = [_classes(network, row, x) for network, row in zip(networks, rows, strict=True)]
        for row, mine in zip(rows, classes, strict=True):
            row.right += int((mine == y).sum())
            row.same = [count + int((mine == other).sum()) for count, other in zip(row.same, classes, strict=True)]
        total += len(y)
        if total == images:
            break
    if not total:
        raise ValueError("batches must hold at least one image, got none: check the DataModule")
    return EvaluationReport(tuple(rows), total)


def _classes(network: Deployed, row: EvaluationRow, x: Tensor) -> Tensor:
    start = network.clock()
    logits = network.run(x)
    row.seconds += network.clock() - start
    return logits.argmax(1).cpu()


def _check_shapes(networks: Sequence[Deployed], shape: tuple[int, ...]) -> None:
    for network in networks:
        if network.shape is not None and network.shape != shape:
            raise ValueError(
                f"{network.name} takes images of shape {list(network.shape)}, the data have {list(shape)}: choose the "
                "data that it was trained on, data=..."
            )
