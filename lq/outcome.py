"""What a run of the recipes has found."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lq.network import NetworkSize
from lq.text import format_table

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """Figures of a finished run; accuracies from 0 to 1.

    Args:
        float_accuracy: of the float network on the test set; None without a test, or after the resume of a run that
            trained it and has not stored it.
        accuracy: of the trained network, hard quantized, on the test set; None without a test.
        held_out_accuracy: of the same on the held-out images; None where there are none.
        alignment: of its weights; None for a float network, as is the size.
        size: of its weights.
        network: the packed network, for `lq.load`; a float one's weights, for ``model.checkpoint``.
    """

    float_accuracy: float | None
    accuracy: float | None
    held_out_accuracy: float | None = None
    alignment: float | None = None
    size: NetworkSize | None = None
    network: Path | None = None

    @property
    def objective(self) -> float:
        """What sweepers maximise: the accuracy on the test set, without a test on held-out images."""
        found = self.held_out_accuracy if self.accuracy is None else self.accuracy
        return float("nan") if found is None else found

    def __str__(self) -> str:
        """A short table."""
        kind, size = "float" if self.size is None else "quantized", self.size
        rows = [
            ("test accuracy, float" + (" at the start" if size is None else ""), _percent(self.float_accuracy)),
            (f"test accuracy, {kind}", _percent(self.accuracy)),
            (f"held-out accuracy, {kind}", _percent(self.held_out_accuracy)),
        ]
        if size is not None:
            ratio = size.float_bytes / size.packed_bytes
            packed = f"{size.packed_bytes:,} bytes ({size.bits_per_weight:.2f} bits each, 1/{ratio:.1f})"
            rows += [("weights, float", f"{size.float_bytes:,} bytes"), ("weights, quantized", packed)]
            rows += [("alignment", f"{self.alignment:.3f}")]
        rows += [("network, float" if size is None else "network, packed", str(self.network))]
        return format_table(("result", "value"), rows)

    def to_json(self) -> str:
        """The figures, for programs."""
        return json.dumps(asdict(self), default=str, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        """Inverse of `to_json`.

        Args:
            text: what it returned.

        Returns:
            The outcome.
        """
        found = json.loads(text)
        size, network = found.pop("size"), found.pop("network")
        return cls(**found, size=size and NetworkSize(**size), network=network and Path(network))


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2%}"
