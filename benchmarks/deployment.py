"""What is deployed: sizes, agreement and speed of the artifact, the integer engine, C and ONNX, on CIFAR-10's test set.

    LQ_DATA=/path python benchmarks/deployment.py --network resnet20 --bits 4 3 2

Weights and inputs have the same width, the first and last layer 8 bits; quantized after training with error
feedback and bias correction on 512 training images. Points (`subset`) run on shifters, uniform levels on multipliers.
Speeds are
ratios: medians of interleaved runs in one process, one thread.
"""

import argparse
import csv
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from search_table import network

import lq
from lq.exporting import integer_cost
from lq.exporting.c import write_c
from lq.exporting.onnx import write_onnx
from lq.functional.packing import pack, unpack

RESULTS = Path(__file__).parent / "results" / "deployment.csv"
SHAPE = (3, 32, 32)
TYPES = {"int8_t": torch.int8, "uint8_t": torch.uint8, "int16_t": torch.int16}


def median_seconds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of each, one after the other in every round."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in spent.items()}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options)


def compile_c(integers: lq.IntegerNetwork, folder: Path) -> tuple[Any, Path]:
    source = write_c(integers, folder / "net.c")
    binary = folder / "net"
    build = ["gcc", "-O2", "-Wall", "-Werror", str(folder / "net.c"), "-o", str(binary)]
    subprocess.run(build, check=True)
    return source, binary


def run_c(binary: Path, source: Any, codes: torch.Tensor, repeats: int = 1) -> tuple[torch.Tensor, float]:
    """Logits, and microseconds per image."""
    images = binary.with_suffix(".bin")
    images.write_bytes(codes.to(TYPES[source.input_type]).numpy().tobytes())
    done = subprocess.run([binary, images, str(repeats)], check=True, capture_output=True, text=True)
    logits = torch.tensor([[int(v) for v in line.split()] for line in done.stdout.splitlines()])
    return logits, float(done.stderr.rsplit(",", 1)[1].split()[0])


def evaluate(name: str, kind: str, bits: int, folder: Path, images: int) -> dict[str, Any]:
    """One row."""
    float_model, data = network(name, os.environ["LQ_DATA"])
    model, _ = network(name, os.environ["LQ_DATA"])
    data.setup("fit")
    uniform: dict[str, Any] = {"quantizer": "lsq", "grid": "mid_rise" if bits == 2 else "mid_tread"}
    inputs: dict[str, Any] = {"activation": "auto", "activation_bits": bits}
    rounding: dict[str, Any] = {"importance": "inputs", "bias_correction": True, "rounding": "error_feedback"}
    levels = uniform if kind == "uniform" else {}
    spec = lq.SearchSpec(bits=bits, reference=False, **inputs, **rounding, **levels)
    lq.search(model, data.calibration_batches(512, 64), spec, progress=False)
    path = lq.save(model, folder / "net.lq.safetensors", architecture={"name": f"cifar_{name}"})
    integers, graph = lq.IntegerNetwork(model, SHAPE), session(write_onnx(model, folder / "net.onnx", SHAPE))
    float_onnx = folder / "float.onnx"
    torch.onnx.export(float_model.eval(), (torch.zeros(1, *SHAPE),), str(float_onnx), dynamo=True, verbose=False)
    source, binary = compile_c(integers, folder)
    same = same_onnx = right = right_int = total = 0
    worst, equal_c = 0.0, True
    with torch.inference_mode():
        for x, y in data.test_dataloader():
            if total >= images:
                break
            fake, integer = model(x), integers(x)
            other = torch.from_numpy(graph.run(None, {"input": x.numpy()})[0])
            if total < 100:
                codes = integers.encode(x[:100])
                equal_c &= torch.equal(run_c(binary, source, codes)[0], integers.run(codes))
            same += int((fake.argmax(1) == integer.argmax(1)).sum())
            same_onnx += int((fake.argmax(1) == other.argmax(1)).sum())
            worst = max(worst, float((fake - other).abs().max()))
            right, right_int = right + int((fake.argmax(1) == y).sum()), right_int + int((integer.argmax(1) == y).sum())
            total += len(y)
        x = next(iter(data.test_dataloader()))[0]
        one, floats = x[:1], session(float_onnx)
        speed = median_seconds({"float": lambda: float_model(x), "integer": lambda: integers(x)}, 5)
        feed = floats.get_inputs()[0].name
        runs = {
            "float": lambda: floats.run(None, {feed: one.numpy()}),
            "quantized": lambda: graph.run(None, {"input": one.numpy()}),
            "c": lambda: run_c(binary, source, integers.encode(one), 20)[1],
        }
        onnx_speed = median_seconds({k: runs[k] for k in ("float", "quantized")}, 200)
        c_micro = statistics.median(run_c(binary, source, integers.encode(one), 20)[1] for _ in range(9))
    cost = integer_cost(integers).total
    return {
        "network": name,
        "levels": kind,
        "bits": bits,
        "images": total,
        "fake_quantized_accuracy": f"{100 * right / total:.2f}",
        "integer_accuracy": f"{100 * right_int / total:.2f}",
        "integer_same_top1": f"{100 * same / total:.2f}",
        "onnx_same_top1": f"{100 * same_onnx / total:.2f}",
        "onnx_largest_error": f"{worst:.3g}",
        "c_equals_integer_100_images": equal_c,
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
        "c_over_float_onnx": f"{c_micro / 1e6 / onnx_speed['float']:.2f}",
    }


def packing() -> None:
    """Gigabytes of codes per second, one thread."""
    for bits in range(2, 9):
        codes = torch.randint(0, 2**bits, (1 << 25,), dtype=torch.uint8)
        packed = pack(codes, bits)
        runs = {"pack": lambda c=codes, b=bits: pack(c, b), "unpack": lambda p=packed, b=bits: unpack(p, b, 1 << 25)}
        spent = median_seconds(runs, 7)
        print(f"{bits} bits: " + ", ".join(f"{name} {codes.numel() / s / 1e9:.2f} GB/s" for name, s in spent.items()))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["resnet20", "resnet56"], default="resnet20")
    parser.add_argument("--levels", nargs="+", choices=["uniform", "subset"], default=["uniform", "subset"])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--images", type=int, default=10_000, help="of the test set [%(default)s]")
    parser.add_argument("--packing", action="store_true", help="speed of packing alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.packing:
        packing()
        return
    done = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    for bits in options.bits:
        for kind in options.levels:
            if kind == "subset" and bits > 4:
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = evaluate(options.network, kind, bits, Path(folder), options.images)
            key = ("network", "levels", "bits")
            done = [r for r in done if any(str(r[k]) != str(row[k]) for k in key)] + [row]
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
                writer.writerows(done)
            print(row, flush=True)


if __name__ == "__main__":
    main()
