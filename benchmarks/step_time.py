"""Training step of quantized networks against the float one, interleaved in one process, W4A4, batch 32, SGD.

    python benchmarks/step_time.py --threads 1 --rounds 45
    python benchmarks/step_time.py --threads 1 --rounds 10 --compile
    python benchmarks/step_time.py --threads 1 --memory          # peak memory of a step, median of five processes

Writes benchmarks/results/step_time.csv (or step_time_compile.csv, step_memory.csv; with --bf16, of steps in mixed
precision, step_time_bf16.csv and so on). Seed 0, random weights and images.
"""

import argparse
import csv
import ctypes
import statistics
import subprocess
import sys
from pathlib import Path

import timm
import torch
from timing import interleaved, ratio
from torch import nn

import lq
import lq.models

RESULTS = Path(__file__).parent / "results"
NETWORKS = {"resnet20_32px": ("cifar_resnet20", 10, 32), "resnet18_64px": ("resnet18", 1000, 64)}
VARIANTS = {
    "float": None,
    "soft": lq.QuantSpec(),
    "lsq": lq.QuantSpec(quantizer="lsq"),
    "soft, soft forward": lq.QuantSpec(forward="soft"),
    "soft, soft forward, activations too": lq.QuantSpec(forward="soft", activation_forward="soft"),
    "soft, per channel": lq.QuantSpec(granularity="channel"),
}


def build(network: str, variant: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network, a batch of images and its classes."""
    name, classes, size = NETWORKS[network]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes)
    images, targets = torch.randn(32, 3, size, size), torch.randint(classes, (32,))
    spec = VARIANTS[variant]
    if spec is not None:
        lq.quantize_model(model, spec, images[:2])
        lq.calibrate(model.train(), [images])
        lq.set_slope(model, 8.0)
    return model.train(), images, targets


def stepper(network: str, variant: str, compiled: bool, bf16: bool):
    """A function that takes one training step."""
    model, images, targets = build(network, variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    forward = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(forward(images), targets)
        loss.backward()
        optimizer.step()

    return step


def time_steps(options: argparse.Namespace) -> None:
    """Ratios to the float step."""
    rows = []
    for network in NETWORKS:
        steps = {variant: stepper(network, variant, options.compile, options.bf16) for variant in VARIANTS}
        seconds = interleaved(steps, options.rounds)
        base = sorted(seconds["float"])[options.rounds // 2] * 1e3
        for variant in VARIANTS:
            middle, low, high = ratio(seconds, variant, "float")
            rows.append([network, variant, f"{middle:.2f}", f"{low:.2f}", f"{high:.2f}", f"{base:.0f}"])
            print(*rows[-1], sep="\t", flush=True)
    write("step_time_compile" if options.compile else "step_time", rows, options)


def write(name: str, rows: list[list[str]], options: argparse.Namespace) -> None:
    header = ["network", "variant", "ratio", "lower quartile", "upper quartile", "float ms", "threads", "rounds"]
    if "memory" in name:
        header = ["network", "variant", "MB in a step above between steps", "ratio to float", "threads"]
    with (RESULTS / f"{name}{'_bf16' if options.bf16 else ''}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        tail = [options.threads] if "memory" in name else [options.threads, options.rounds]
        writer.writerows([*row, *tail] for row in rows)


def memory(options: argparse.Namespace) -> None:
    """Peak resident memory of a step above that between steps."""
    rows = []
    for network in NETWORKS:
        base = 0.0
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--threads", str(options.threads), "--child", network, variant]
            command += ["--bf16"] if options.bf16 else []
            runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(5)]
            used = statistics.median(float(run.stdout) for run in runs)  # what an allocator keeps differs by run
            base = base or used
            rows.append([network, variant, f"{used:.0f}", f"{used / base:.2f}"])
            print(*rows[-1], sep="\t", flush=True)
    write("step_memory", rows, options)


def child(network: str, variant: str, bf16: bool) -> None:
    step = stepper(network, variant, False, bf16)
    step()  # gradients and momentum stay; they are not what a step needs for itself
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step()
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    """Resident memory of this process in kilobytes, now (VmRSS) or at its peak (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, as trainer.precision=bf16-mixed")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    if parsed.child:
        network, variant = parsed.child
        child(network, variant, parsed.bf16)
    elif parsed.memory:
        memory(parsed)
    else:
        time_steps(parsed)
