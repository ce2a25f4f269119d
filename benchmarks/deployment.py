"""What is deployed: sizes, agreement and speed of the artifact, the integer engine, C and ONNX, on test images.

    LQ_DATA=/path python benchmarks/deployment.py --network resnet20 --bits 4 3 2

Weights and inputs have the same width unless told otherwise, the first and last layer 8 bits; quantized after training
with error feedback and bias correction on 512 training images (MobileNet: 500 of its 1000, scored on the rest). Points
(`subset`) run on shifters, uniform levels on multipliers.
Speeds are ratios: medians of interleaved runs in one process, one thread. "double" is the same network in float64: how
often it gives the class of the float32 one is how much agreement any other order of summation can have.
"""

import argparse
import copy
import csv
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from search_table import network
from timing import interleaved
from torch import nn

import lq
from lq.exporting import integer_cost
from lq.exporting.c import CProgram, write_c
from lq.exporting.onnx import write_onnx
from lq.functional.packing import pack, unpack

RESULTS = Path(__file__).parent / "results" / "deployment.csv"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet20": {"name": "cifar_resnet20"},
    "resnet56": {"name": "cifar_resnet56"},
    "mobilenetv1": {"name": "mobilenetv1_075_same", "num_classes": 1000},
}


def median_seconds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of each, one after the other in every round."""
    return {name: statistics.median(spent) for name, spent in interleaved(runs, rounds, warmup=1).items()}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options)


def searched(name: str, kind: str, bits: int, activation_bits: int) -> tuple[nn.Module, Any]:
    """A quantized network and its data."""
    model, data = network(name, os.environ["LQ_DATA"])
    data.setup("fit")
    uniform: dict[str, Any] = {"quantizer": "lsq", "grid": "mid_rise" if bits == 2 else "mid_tread"}
    inputs: dict[str, Any] = {"activation": "auto", "activation_bits": activation_bits}
    rounding: dict[str, Any] = {"importance": "inputs", "bias_correction": True, "rounding": "error_feedback"}
    levels = uniform if kind == "uniform" else {}
    spec = lq.SearchSpec(bits=bits, reference=False, **inputs, **rounding, **levels)
    lq.search(model, data.calibration_batches(512, 64), spec, progress=False)
    data.setup("test")
    return model.eval(), data


@torch.inference_mode()
def agreement(forms: dict[str, Callable[[torch.Tensor], torch.Tensor]], data: Any, images: int) -> dict[str, Any]:
    """Accuracy and agreement of all forms with the first one, and whether C gives the very numbers of the integers."""
    same, right = dict.fromkeys(forms, 0), dict.fromkeys(forms, 0)
    total, worst, equal = 0, 0.0, True
    for x, y in data.test_dataloader():
        if total >= images:
            break
        x, y = x[: images - total], y[: images - total]
        logits = {name: run(x) for name, run in forms.items()}
        first = logits["fake"]
        for name, values in logits.items():
            same[name] += int((values.argmax(1) == first.argmax(1)).sum())
            right[name] += int((values.argmax(1) == y).sum())
        equal &= torch.equal(logits["c"], logits["integer"])
        worst, total = max(worst, float((first - logits["onnx"]).abs().max())), total + len(y)
    return {
        "images": total,
        **{f"{name}_accuracy": f"{100 * right[name] / total:.2f}" for name in ("fake", "integer", "onnx")},
        **{f"{name}_same_top1": f"{100 * same[name] / total:.2f}" for name in ("double", "integer", "onnx")},
        "onnx_largest_error": f"{worst:.3g}",
        "c_equals_integer": equal,
    }


def evaluate(name: str, kind: str, bits: int, activation_bits: int, folder: Path, images: int) -> dict[str, Any]:
    """One row."""
    float_model, _ = network(name, os.environ["LQ_DATA"])
    model, data = searched(name, kind, bits, activation_bits)
    x = next(iter(data.test_dataloader()))[0]
    shape = tuple(x.shape[1:])
    path = lq.save(model, folder / "net.lq.safetensors", architecture=ARCHITECTURES[name])
    integers, graph = lq.IntegerNetwork(model, shape), session(write_onnx(model, folder / "net.onnx", shape))
    float_onnx = folder / "float.onnx"
    torch.onnx.export(float_model.eval(), (torch.zeros(1, *shape),), str(float_onnx), dynamo=True, verbose=False)
    source = write_c(integers, folder / "net.c")
    program, double = CProgram(folder / "net.c"), copy.deepcopy(model).double()
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fake": model,
        "double": lambda x: double(x.double()),
        "integer": integers,
        "onnx": lambda x: torch.from_numpy(graph.run(None, {"input": x.numpy()})[0]),
        "c": program,
    }
    found = agreement(forms, data, images)
    one, few, floats = x[:1], x[:32], session(float_onnx)
    feed = floats.get_inputs()[0].name
    speed = median_seconds({"float": lambda: float_model(few), "integer": lambda: integers(few)}, 5)
    runs: dict[str, Callable[[], Any]] = {
        "float": lambda: floats.run(None, {feed: one.numpy()}),
        "quantized": lambda: graph.run(None, {"input": one.numpy()}),
    }
    onnx_speed = median_seconds(runs, 200)
    c_seconds = statistics.median(c_seconds_per_image(program, one) for _ in range(25))
    cost = integer_cost(integers).total
    return {
        "network": name,
        "levels": kind,
        "bits": bits,
        "activation_bits": activation_bits,
        **found,
        "packed_bytes": cost.packed_bytes,
        "artifact_bytes": path.stat().st_size,
        "onnx_bytes": (folder / "net.onnx").stat().st_size,
        "float_onnx_bytes": sum(p.stat().st_size for p in folder.glob("float.onnx*")),
        "flash_bytes": source.flash_bytes,
        "ram_bytes": source.ram_bytes,
        "multiplies": cost.multiplies,
        "shifts": cost.shifts,
        "accumulator_bits_bound": cost.bound_bits,
        "accumulator_bits_observed": cost.observed_bits,
        "integer_over_float": f"{speed['integer'] / speed['float']:.2f}",
        "onnx_over_float_onnx": f"{onnx_speed['quantized'] / onnx_speed['float']:.2f}",
        "c_over_float_onnx": f"{c_seconds / onnx_speed['float']:.2f}",
    }


def c_seconds_per_image(program: CProgram, x: torch.Tensor) -> float:
    before = program.seconds
    program(x.repeat(10, 1, 1, 1))
    return (program.seconds - before) / 10


def packing() -> None:
    """Gigabytes of codes per second, one thread, as many codes as a large layer has."""
    for bits in range(2, 9):
        codes = torch.randint(0, 2**bits, (1 << 22,), dtype=torch.uint8)
        packed = pack(codes, bits)
        runs = {"pack": lambda c=codes, b=bits: pack(c, b), "unpack": lambda p=packed, b=bits: unpack(p, b, 1 << 22)}
        spent = median_seconds(runs, 51)
        print(f"{bits} bits: " + ", ".join(f"{name} {codes.numel() / s / 1e9:.2f} GB/s" for name, s in spent.items()))


def loading() -> None:
    """Seconds to load ResNet-50, 25 million weights at 4 bits, one thread."""
    model = timm.create_model("resnet50", pretrained=False)
    lq.quantize_model(model, lq.QuantSpec(bits=4))
    with tempfile.TemporaryDirectory() as folder:
        architecture = {"name": "resnet50", "num_classes": 1000}
        path = lq.save(model, Path(folder) / "net.lq.safetensors", architecture=architecture)
        seconds = median_seconds({"load": lambda: lq.load(path)}, 9)["load"]
        print(f"ResNet-50, {path.stat().st_size / 1e6:.1f} MB: loaded in {seconds:.2f} s")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(ARCHITECTURES), default="resnet20")
    parser.add_argument("--levels", nargs="+", choices=["uniform", "subset"], default=["uniform", "subset"])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--activation-bits", type=int, help="of inputs [as weights]")
    parser.add_argument("--images", type=int, default=10_000, help="of the test set [%(default)s]")
    parser.add_argument("--packing", action="store_true", help="speed of packing and loading alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.packing:
        packing()
        loading()
        return
    done = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    for bits in options.bits:
        for kind in options.levels:
            if kind == "subset" and bits > 4:
                continue
            with tempfile.TemporaryDirectory() as folder:
                inputs = options.activation_bits or bits
                row = evaluate(options.network, kind, bits, inputs, Path(folder), options.images)
            key = ("network", "levels", "bits", "activation_bits")
            done = [r for r in done if any(str(r[k]) != str(row[k]) for k in key)] + [row]
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
                writer.writerows(done)
            print(row, flush=True)


if __name__ == "__main__":
    main()
