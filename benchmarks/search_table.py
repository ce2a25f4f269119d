"""Accuracy after post-training quantization, stage by stage, on real checkpoints.

    LQ_DATA=/path python benchmarks/search_table.py --network resnet20 --bits 4 3 2

One row per way to quantize and width; rows that are in the file already are kept, so that an interrupted run goes on.
Scales are per output channel, points per layer; the first and the last layer have 8 bits. Calibration on 512 training
images (MobileNet: 500 of its 1000), scored on the whole test set (MobileNet: the other 500). Seconds are of one CPU.
"""

import argparse
import csv
import os
import time
from pathlib import Path

import torch
from torch import nn

import lq
from lq.data import CIFAR10Data, ImagePackData
from lq.models import create_model

RESULTS = Path(__file__).parent / "results"
VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
LEVELS = {
    "uniform": {"quantizer": "lsq"},
    "mid-rise": {"quantizer": "lsq", "grid": "mid_rise"},
    "subset": {},
}
STAGES = {
    "importance": {"importance": "inputs"},
    "importance, bias": {"importance": "inputs", "bias_correction": True},
    "error feedback, bias": {"importance": "inputs", "rounding": "error_feedback", "bias_correction": True},
    "reconstruction": {"importance": "inputs", "bias_correction": True, "reconstruct": 0},
    "error feedback, reconstruction": {
        "importance": "inputs",
        "rounding": "error_feedback",
        "bias_correction": True,
        "reconstruct": 0,
    },
}
ALONE = {
    "uniform min-max": {"quantizer": "lsq", "scale_init": "max"},
    "log2": {"candidates": "log2"},
    "APoT": {"candidates": "apot"},
    "codebook": {"quantizer": "codebook"},
    "subset L4": {"power": 4},
    "subset, points per channel": {"points_per": "channel"},
    "subset, fisher": {"importance": "fisher"},
    "subset, importance, equalization, bias": {"importance": "inputs", "equalize": True, "bias_correction": True},
    "per tensor: uniform": {"quantizer": "lsq", "granularity": "tensor"},
    "per tensor: subset": {"granularity": "tensor"},
    "per tensor: subset, equalization, bias": {"granularity": "tensor", "equalize": True, "bias_correction": True},
}
FIELDS = "network weights activations method seed iterations accuracy float cpu_seconds".split()


def rows(key: bool, iterations: int) -> dict[str, dict]:
    """Every way to quantize, or those that matter most."""
    found = {name: dict(spec) for name, spec in LEVELS.items()}
    for stage, extra in STAGES.items():
        for name, spec in LEVELS.items():
            both = {**spec, **extra}
            found[f"{name}, {stage}"] = both | ({"reconstruct": iterations} if "reconstruct" in both else {})
    if key:
        return {name: spec for name, spec in found.items() if not name.endswith(", importance")}
    return found | ALONE


def network(name: str, root: str) -> tuple[nn.Module, CIFAR10Data | ImagePackData]:
    """A float network and its data."""
    if name == "mobilenetv1":
        path = f"{root}/in1k_mobilenetv1_075.safetensors"
        model = create_model("mobilenetv1_075_same", num_classes=1000, checkpoint=path)
        return model, ImagePackData(f"{root}/in1k_sample1000_256.npz", batch_size=50)
    if name == "vit":
        path = f"{root}/cifar10_vit_timm.safetensors"
        model = create_model("vit_tiny_patch16_224", checkpoint=path, options=VIT)
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        return model, CIFAR10Data(root, batch_size=250, mean=mean, std=std)
    model = create_model(f"cifar_{name}", checkpoint=f"{root}/cifar10_{name}.safetensors")
    return model, CIFAR10Data(root, batch_size=250)


@torch.inference_mode()
def accuracy(model: nn.Module, batches: list) -> float:
    """Per cent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def show(path: Path) -> str:
    """The rows of a network as a table in Markdown: methods down, widths across, mean over seeds."""
    cells: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(path.open()):
        width = f"W{row['weights']}" + (f"A{row['activations']}" if row["activations"] != "32" else "")
        cells.setdefault(row["method"], {}).setdefault(width, []).append(float(row["accuracy"]))
    widths = sorted({w for columns in cells.values() for w in columns}, key=lambda w: (len(w), w), reverse=False)
    lines = ["| | " + " | ".join(widths) + " |", "| --- |" + " --: |" * len(widths)]
    for method, columns in cells.items():
        values = [f"{sum(v) / len(v):.2f}" if (v := columns.get(w)) else "" for w in widths]
        lines.append(f"| {method} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def picture(path: Path) -> None:
    """Accuracy of uniform levels and of subsets after each stage, one panel per width, beside the table."""
    from matplotlib.figure import Figure

    rows_ = [row for row in csv.DictReader(path.open()) if row["activations"] == "32" and row["seed"] == "0"]
    widths = sorted({row["weights"] for row in rows_}, reverse=True)
    stages = ["nearest", *STAGES]
    figure = Figure(figsize=(4 * len(widths), 3.6), layout="constrained")
    for i, width in enumerate(widths):
        axes = figure.add_subplot(1, len(widths), i + 1)
        found = {row["method"]: float(row["accuracy"]) for row in rows_ if row["weights"] == width}
        for name, marker in zip(LEVELS, "x|o", strict=True):
            points = {s: found.get(name if s == "nearest" else f"{name}, {s}") for s in stages}
            shown = {s: a for s, a in points.items() if a is not None}
            axes.plot(list(shown), list(shown.values()), marker=marker, label=name, markersize=8)
        axes.axhline(float(rows_[0]["float"]), color="gray", linewidth=0.8)
        axes.set_title(f"{width} bits", fontsize=9)
        axes.tick_params(axis="x", rotation=30, labelsize=7)
        axes.set_ylabel("test accuracy in %" if i == 0 else "")
    axes.legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["resnet20", "resnet56", "vit", "mobilenetv1"], default="resnet20")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--activation-bits", type=int, help="quantize the inputs of layers, too [float]")
    parser.add_argument("--key", action="store_true", help="only the rows that matter most")
    parser.add_argument("--only", nargs="+", help="only these rows")
    parser.add_argument("--iterations", type=int, default=200, help="of reconstruction, per block [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=32, help="of reconstruction [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the table so far, draw it, and stop")
    options = parser.parse_args()
    if options.show:
        print(show(RESULTS / f"search_{options.network}.csv"))
        if options.network == "resnet20":  # the one table that is whole
            picture(RESULTS / f"search_{options.network}.csv")
        return
    torch.set_num_threads(options.threads)
    _, data = network(options.network, os.environ["LQ_DATA"])
    data.setup("fit")
    test = list(data.test_dataloader())
    path = RESULTS / f"search_{options.network}.csv"
    done = list(csv.DictReader(path.open())) if path.exists() else []
    whole, _ = network(options.network, os.environ["LQ_DATA"])
    float_accuracy = float(done[0]["float"]) if done else accuracy(whole, test)
    for seed in options.seeds:
        data.seed = seed
        batches = data.calibration_batches(512, 50)
        for bits in options.bits:
            for name, spec in rows(options.key, options.iterations).items():
                if options.only and name not in options.only:
                    continue
                width = str(options.activation_bits or 32)
                same = {"weights": str(bits), "activations": width, "method": name, "seed": str(seed)}
                if any(all(row[k] == v for k, v in same.items()) for row in done):
                    continue
                inputs = {"activation": "auto", "activation_bits": options.activation_bits, "drop": 0.5}
                common = {"bits": bits, "reference": False, "reconstruct_batch_size": options.batch_size}
                common |= {"search_seed": seed} | (inputs if options.activation_bits else {})
                model, _ = network(options.network, os.environ["LQ_DATA"])
                start = time.process_time()  # of one thread: the same on an idle and on a busy machine
                lq.search(model, batches, lq.SearchSpec(**{**common, **spec}), progress=False)
                seconds = time.process_time() - start
                row: dict[str, object] = {"network": options.network, **same, "iterations": spec.get("reconstruct", 0)}
                row |= {"accuracy": f"{accuracy(model, test):.2f}", "float": f"{float_accuracy:.2f}"}
                row |= {"cpu_seconds": f"{seconds:.1f}"}
                new = not path.exists()
                with path.open("a", newline="") as file:
                    writer = csv.DictWriter(file, list[str](FIELDS), lineterminator="\n")
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(" ".join(f"{v}" for v in row.values()), flush=True)


if __name__ == "__main__":
    main()
