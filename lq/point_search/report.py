"""What a search found, layer by layer and block by block."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lq.functional.candidates import powers_of_two
from lq.surgery import SwapReport
from lq.text import format_table

__all__ = ["BlockResult", "LayerResult", "SearchReport", "as_powers"]

_HEADERS = tuple(
    "layer weight bits levels points scale loss SQNR(dB) /k-means /mid-tread /mid-rise input seconds".split()
)


@dataclass(frozen=True)
class LayerResult:
    """One searched layer.

    Args:
        path: module path.
        shape: of the weight, such as "16x3x3x3".
        bits: width of a code.
        quantizer: "subset", "codebook", or the name of the uniform method.
        points: chosen points before scaling, of the first channel where each has its own; None for uniform levels.
        powers: the same as sums of powers of two.
        scale: mean of the scales.
        scales: number of scales.
        loss: minimised ``sum h |w - Q(w)|^p``.
        sqnr_db: ``10 log10(sum w^2 / sum (w - Q(w))^2)``.
        reference_loss: of as many free levels (p = 2: a lower bound); None where it was not asked for.
        mid_tread_loss: of the best uniform levels with a zero, of the same bits, or None.
        mid_rise_loss: of the best uniform levels without a zero, or None.
        zero_channels: output channels whose weights are all zero.
        activation: sign and width of the input's codes, or None for a float input.
        seconds: that the search of this layer took.
        digest: hash of what the result depends on.
    """

    path: str
    shape: str
    bits: int
    quantizer: str
    points: tuple[float, ...] | None
    powers: str | None
    scale: float
    scales: int
    loss: float
    sqnr_db: float
    reference_loss: float | None
    mid_tread_loss: float | None
    mid_rise_loss: float | None
    zero_channels: int
    activation: str | None
    seconds: float
    digest: str

    def ratio(self, name: str) -> float | None:
        """Loss relative to that of another way to choose levels.

        Args:
            name: "reference", "mid_tread" or "mid_rise".

        Returns:
            The ratio, or None where the other is not known or zero.
        """
        other = getattr(self, f"{name}_loss")
        return self.loss / other if other else None


@dataclass(frozen=True)
class BlockResult:
    """One reconstructed block.

    Args:
        path: module path.
        layers: paths of its layers.
        before: mean squared error of its output relative to the float block's mean square, before.
        after: the same after.
        skipped: why it was left as it was; empty where it was reconstructed.
    """

    path: str
    layers: tuple[str, ...]
    before: float | None = None
    after: float | None = None
    skipped: str = ""

    @property
    def kept(self) -> str:
        """Remark where the block was left as it was because its error would have grown."""
        worse = self.before is not None and self.after is not None and not self.after < self.before
        return ", left as it was" if worse else ""


@dataclass(frozen=True)
class SearchReport:
    """What was done to a network.

    Args:
        rows: one per quantized layer.
        swap: every layer, with the reason of each that was skipped.
        folded: layer before a batch norm to "" where it was folded, else to the reason why not.
        equalized: the same for equalization.
        corrected: layers whose bias was corrected.
        fed_back: layer to "" where rounding fed its error back, else to the reason why not.
        blocks: results of the reconstruction.
        notes: what else there is to know.
        seconds: that everything took.
    """

    rows: tuple[LayerResult, ...]
    swap: SwapReport
    folded: Mapping[str, str] = field(default_factory=dict)
    equalized: Mapping[str, str] = field(default_factory=dict)
    corrected: tuple[str, ...] = ()
    fed_back: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[BlockResult, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as plain dictionaries, for tables in a tracking store.

        Returns:
            One dictionary per layer.
        """
        return [{**asdict(row), "points": None if row.points is None else list(row.points)} for row in self.rows]

    def __str__(self) -> str:
        """The table, then one line for each stage and what it left out."""
        cells = [
            (
                *(r.path, r.shape, r.bits, r.quantizer, r.powers, r.scale, r.loss, r.sqnr_db),
                *(r.ratio("reference"), r.ratio("mid_tread"), r.ratio("mid_rise"), r.activation, r.seconds),
            )
            for r in self.rows
        ]
        lines = [format_table(_HEADERS, cells)]
        lines.append(f"{len(self.rows)} of {len(self.swap.rows)} layers quantized; ends by {self.swap.order}")
        lines += [f"skipped {row.path}: {row.reason}" for row in self.swap.skipped]
        lines += [f"{r.path}: {r.zero_channels} channels are all zero" for r in self.rows if r.zero_channels]
        for what, done in (
            ("batch norms folded", self.folded),
            ("pairs equalized", self.equalized),
            ("layers rounded with error feedback", self.fed_back),
        ):
            if done:
                lines.append(f"{what}: {sum(not reason for reason in done.values())} of {len(done)}")
                lines += [f"  not {path}: {reason}" for path, reason in done.items() if reason]
        if self.corrected:
            lines.append(f"biases corrected: {len(self.corrected)}")
        if self.blocks:
            lines.append("reconstructed blocks, error relative to the float output before and after:")
            lines += [
                f"  {b.path}: {b.skipped}" if b.skipped else f"  {b.path}: {b.before:.4g} -> {b.after:.4g}{b.kept}"
                for b in self.blocks
            ]
        return "\n".join([*lines, *self.notes])


def as_powers(points: tuple[float, ...]) -> str:
    """Points as sums of powers of two.

    Args:
        points: magnitudes or signed points.

    Returns:
        For example "0, 2^-2, 2^-1+2^-3"; points of more than four powers as decimals.

    >>> as_powers((0.0, 0.25, -0.625))
    '0, 2^-2, -(2^-1+2^-3)'
    """
    texts = []
    for point in points:
        powers = powers_of_two(abs(point))
        text = "+".join(f"2^{e}" if e else "1" for e in powers) or "0"
        if len(powers) > 4:
            text = f"{abs(point):.4g}"
        if point < 0:
            text = f"-({text})" if "+" in text else f"-{text}"
        texts.append(text)
    return ", ".join(texts)
