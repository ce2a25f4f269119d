"""The picture in the README: the soft staircase sharpening.

python benchmarks/staircase.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from lq.functional import code_range, soft_staircase

OUT = Path(__file__).parent / "results" / "staircase.png"


def main() -> None:
    x, scale = torch.linspace(-4.6, 4.6, 2000), torch.tensor([1.0])
    codes = code_range(3)
    slopes = (0.0, 2.0, 5.0, 16.0)
    figure = Figure(figsize=(11, 3), layout="constrained")
    for i, slope in enumerate(slopes):
        axes = figure.add_subplot(1, len(slopes), i + 1)
        y = soft_staircase(x, scale, torch.tensor([slope]), lo=codes.lo, hi=codes.hi)
        axes.plot(x, x, color="0.8", linewidth=1)
        axes.plot(x, y, color="tab:blue")
        axes.set_title(f"slope {slope:g}", fontsize=10)
        axes.set_xticks(range(-4, 5), minor=False)
        axes.set_yticks(range(codes.lo, codes.hi + 1))
        axes.grid(alpha=0.3)
        axes.set_xlabel("weight, in steps")
    figure.axes[0].set_ylabel("what training sees")
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
