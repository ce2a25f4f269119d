"""What an artifact holds, told without building the network."""

from pathlib import Path

import torch

from lq.exporting.artifact import read_header
from lq.functional.packing import packed_bytes
from lq.text import format_table

__all__ = ["describe"]


def describe(path: str | Path) -> str:
    """Layer by layer, in bits and bytes.

    Args:
        path: of the artifact.

    Returns:
        A table, totals, and what the file says of its origin.

    Raises:
        lq.exporting.ArtifactError: for a file that is not sound.
    """
    tensors, header, specs = read_header(path)
    rows, weights, packed, beside = [], 0, 0, 0
    for layer, spec in specs.items():
        entry = header["layers"][layer]
        count = torch.Size(entry["shape"]).numel()
        prefix = f"{layer}.weight_quantizer." if layer else "weight_quantizer."
        tables = [t for name, t in tensors.items() if name.startswith(prefix) and not name.endswith("slope")]
        table_bytes = sum(t.numel() * t.element_size() for t in tables)
        stored = 0 if "tied" in entry else packed_bytes(count, spec.weight_codes.bits)
        inputs = "-" if spec.activation is None else spec.activation_codes(signed=True).bits
        shape = "x".join(map(str, entry["shape"]))
        row = (layer, shape, spec.quantizer, spec.weight_codes.bits, spec.granularity, inputs, stored, table_bytes)
        rows.append(row)
        weights, packed, beside = weights + count, packed + stored, beside + table_bytes
    headers = ("layer", "weight", "quantizer", "bits", "granularity", "input bits", "packed B", "scales, points B")
    size = Path(path).stat().st_size
    lines = [
        format_table(headers, rows),
        "",
        f"{weights:,} weights in {packed:,} bytes and {beside:,} bytes of scales and points: "
        f"{8 * (packed + beside) / max(weights, 1):.2f} bits per weight, "
        f"1/{4 * weights / max(packed + beside, 1):.1f} of float; the file has {size:,} bytes",
    ]
    for name in ("architecture", "input", "metrics", "provenance"):
        if header.get(name):
            lines.append(f"{name}: {', '.join(f'{k}={v}' for k, v in header[name].items())}")
    return "\n".join(lines)
