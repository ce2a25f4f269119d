"""How long the point-subset search takes, against a sort, against enumeration, and as layers grow.

    python benchmarks/search_speed.py --threads 2                 all parts
    python benchmarks/search_speed.py --only layer growth         some

layer        one layer of 2.36 million weights, 4 bits, 15 candidates, 200 scales jointly, over torch.sort of it
network      all layers of a ResNet-50 with random weights, per tensor and per channel
enumeration  the published method on a layer of 36 864 weights: all 6435 subsets, up to 1000 alternating passes over the
             whole layer; a sample of subsets is timed and the rest extrapolated
growth       10^4 to 10^8 weights, seconds and peak memory of a process of its own
"""

import argparse
import csv
import itertools
import resource
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from timing import interleaved, ratio
from torch import Tensor, nn

import lq
from lq.functional import scale_grid

RESULTS = Path(__file__).parent / "results" / "search_speed.csv"
PARTS = ("layer", "network", "enumeration", "growth")


def layer(rounds: int) -> list[tuple[str, float]]:
    """Ratios to a sort of the same tensor."""
    torch.manual_seed(0)
    weight = torch.randn(512, 512, 3, 3)
    scales = scale_grid(200) * weight.abs().max()
    seconds = interleaved(
        {
            "sort": lambda: weight.flatten().sort(),
            "200 scales": lambda: lq.search_subset(weight, scales=scales),
            "200 scales and polish": lambda: lq.search_subset(weight),
            "200 scales, p=4": lambda: lq.search_subset(weight, power=4, scales=scales),
        },
        rounds,
    )
    rows = [("layer: torch.sort, seconds", sorted(seconds["sort"])[rounds // 2])]
    return rows + [(f"layer: {k}, over sort", ratio(seconds, k, "sort")[0]) for k in list(seconds)[1:]]


def network() -> list[tuple[str, float]]:
    """Seconds for every convolution and linear layer of a ResNet-50."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50")
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    rows = [("network: weights", float(sum(w.numel() for w in weights)))]
    for name, axis in (("per tensor", None), ("per channel", 0)):
        start = time.perf_counter()
        for weight in weights:
            lq.search_subset(weight, channel_axis=axis)
        rows.append((f"network: {name}, seconds", time.perf_counter() - start))
    return rows


def _alternate(x: Tensor, points: Tensor, passes: int) -> float:
    """Nearest point and least-squares scale in turn, on the whole layer; x in units of its maximum."""
    scale, last = 1.0, float("inf")
    loss = last
    for _ in range(passes):
        q = points[(x[:, None] / scale - points).abs().argmin(1)]
        scale = float((q * x).sum() / (q * q).sum())
        loss = float((x - scale * q).square().sum())
        if abs(last - loss) < 1e-5:
            break
        last = loss
    return loss


def enumeration(sample: int) -> list[tuple[str, float]]:
    """Seconds of the published search, extrapolated from a sample, and of this one on the same layer."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64, 3, 3)
    x = weight.abs().flatten() / weight.abs().max()
    subsets = list(itertools.combinations(lq.two_word_candidates().tolist(), 8))
    picks = torch.randperm(len(subsets))[:sample].tolist()
    start = time.perf_counter()
    for pick in picks:
        points = torch.tensor(subsets[pick])
        _alternate(x, points / points.max(), 1000)
    published = (time.perf_counter() - start) / sample * len(subsets)
    lq.search_subset(weight)
    start = time.perf_counter()
    result = lq.search_subset(weight)
    mine = time.perf_counter() - start
    start = time.perf_counter()
    lq.search_subset(weight, scales=scale_grid(200) * weight.abs().max())
    grid = time.perf_counter() - start
    own = result.points / result.points.max()
    others = [torch.tensor(subsets[k]) for k in picks]
    losses = [_alternate(x, points, 1000) for points in (own, *(p / p.max() for p in others))]
    best = min(losses) * float(weight.abs().max()) ** 2
    return [
        ("enumeration: published, seconds (extrapolated)", published),
        ("enumeration: search and polish, seconds", mine),
        ("enumeration: 200 scales, seconds", grid),
        ("enumeration: published over search and polish", published / mine),
        ("enumeration: published over 200 scales", published / grid),
        ("enumeration: our loss over the best of the sample and of our subset", float(result.loss) / best),
    ]


def growth(sizes: list[int]) -> list[tuple[str, float]]:
    """Seconds and peak memory for one tensor of each size, in a process of its own."""
    rows = []
    for size in sizes:
        command = [sys.executable, __file__, "--one", str(size), "--threads", str(torch.get_num_threads())]
        seconds, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        rows += [(f"growth: {size} weights, seconds", float(seconds))]
        rows += [(f"growth: {size} weights, peak MB beside them", float(memory))]
    return rows


def one(size: int) -> None:
    """Child of `growth`."""
    torch.manual_seed(0)
    lq.search_subset(torch.randn(1000))
    weight = torch.randn(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    lq.search_subset(weight)
    print(time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Run the parts asked for and store their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sample", type=int, default=40, help="subsets timed of the enumeration [%(default)s]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        one(options.one)
        return
    runs = {
        "layer": lambda: layer(options.rounds),
        "network": network,
        "enumeration": lambda: enumeration(options.sample),
        "growth": lambda: growth([10**e for e in range(4, 9)]),
    }
    old = [tuple(row) for row in csv.reader(RESULTS.open())][1:] if RESULTS.exists() else []
    rows = [row for row in old if row[0].split(":")[0] not in options.only]
    for part in options.only:
        for name, value in runs[part]():
            print(f"{name:<62} {value:.4g}", flush=True)
            rows.append((name, f"{value:.4g}"))
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("what", "value"), *rows])


if __name__ == "__main__":
    main()
