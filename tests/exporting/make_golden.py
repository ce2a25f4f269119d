"""Write the golden artifacts of format version 1. They were written once and must load forever: do not run again."""

import json
from pathlib import Path

import torch

import lq
from tests.helpers.modules import golden_network
from tests.helpers.quantized import quantized

FOLDER = Path(__file__).parent / "golden"
TARGET = "tests.helpers.modules:golden_network"
SPECS = {f"width{b}": {"bits": b, "granularity": "channel", "first_last_bits": None} for b in range(2, 9)} | {
    "mid_rise": {"bits": 3, "grid": "mid_rise", "activation": None},
    "subset": {"bits": 4, "quantizer": "subset", "first_last_bits": None},
    "codebook": {"bits": 3, "quantizer": "codebook", "granularity": "channel", "activation": None},
}


def inputs() -> torch.Tensor:
    return torch.linspace(-2, 2, 4 * 2 * 4 * 4).reshape(4, 2, 4, 4)


if __name__ == "__main__":
    expected = {}
    for name, spec in SPECS.items():
        torch.manual_seed(0)
        model = quantized(golden_network(), (2, 4, 4), **spec)
        target = {"import_path": TARGET, "arguments": {"width": 4}}
        lq.save(model, FOLDER / f"{name}.lq.safetensors", architecture=target)
        expected[name] = model(inputs()).tolist()
    (FOLDER / "expected.json").write_text(json.dumps(expected))
