"""Accuracy of every method at equal budget: same data order, augmentation, optimizer, epochs, extras and seeds.

    LQ_DATA=/path python benchmarks/accuracy.py --bits 2 --methods lsq "soft, mid-rise" --seeds 0 1 2

Fine-tunes a given float network with W = A = ``--bits``, first and last layer 8 bits, by ``lq train --multirun``, one
sweep over seeds per method; every run is in MLflow (``./mlflow.db``, experiment "accuracy"). A row holds the accuracy
after the last epoch on the test set, by which nothing is chosen (it is read for the float network before, too), and on
5000 held-out training images (MobileNet's sample has none: there both are the images of the test, and ``--trial`` is
refused). Rows that are in the file already are kept, and a fit that was interrupted goes on from its last whole epoch
(benchmarks/cache/fits), as long as its settings and this package's version are the same. ``--show`` prints the table
and draws it beside the rows.

``--trial`` never reads the test set and writes to a file of its own: settings are chosen there. The given ResNet-20 was
trained on the held-out images, too, and knows 98 % of them; ``--network resnet20_unseen`` is one that was not, trained
on the first call (45 minutes of a CPU core) and kept in benchmarks/cache. It is fine-tuned in bfloat16, which takes two
thirds of the time on processors that multiply it.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accuracy_fits import fits
from accuracy_rows import KEY, append, key_in, rows_of
from accuracy_settings import CACHE, EXTRAS, METHODS, NETWORKS, ROOT, UNSEEN, overrides
from accuracy_table import picture, show

RESULTS, FITS = ROOT / "benchmarks" / "results", CACHE / "fits"
ARGUMENTS = {
    "optimizer.lr": "--lr",
    "trainer.max_epochs": "--epochs",
    "quantizer.bits": "--bits",
    "seed": "--seeds",
    "test": "--trial",
}


def run(options: argparse.Namespace, method: str, seeds: list[int], path: Path) -> None:
    """One sweep over seeds; a row for each run that ends, even where a later one fails."""
    given = overrides(options, method)
    folder = FITS / _digest({**key_of(options, method, 0), "seed": "", "trial": str(options.trial)}, given)
    for seed, outcome, seconds in fits(folder, given, seeds):
        append(path, _row(key_of(options, method, seed), outcome, seconds))


def _digest(name: dict[str, str], given: list[str]) -> str:
    """Tells fits apart by all that makes their settings, so that none goes on, or is taken, under other ones."""
    found = hashlib.sha256(json.dumps([name, given, version("lq"), os.environ.get("LQ_DATA")]).encode())
    settings = [file for folder in ("conf", "recipes") for file in sorted((ROOT / folder).rglob("*.yaml"))]
    for file in [*settings, *filter(Path.is_file, [UNSEEN])]:
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def _row(key: dict[str, str], outcome: dict, seconds: float) -> dict[str, str]:
    names = {"held_out": "held_out_accuracy", "test": "accuracy", "float": "float_accuracy"}
    return {**key, **{column: _percent(outcome[name]) for column, name in names.items()}, "seconds": f"{seconds:.0f}"}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def key_of(options: argparse.Namespace, method: str, seed: int) -> dict[str, str]:
    """What tells rows apart."""
    name = " ".join([method, *options.set]) if options.set else method
    values = (options.network, options.bits, name, EXTRAS[options.extras][0], options.epochs, options.lr, seed)
    return dict(zip(KEY, map(str, values), strict=True))


def fill(options: argparse.Namespace, path: Path) -> list[str]:
    """Run what the file lacks; returns methods whose fits did not end, which keep no other from its row."""
    failed, float_fit = [], NETWORKS[options.network].float_fit
    if float_fit and not UNSEEN.is_file():
        subprocess.run([sys.executable, "-m", "lq", "train", *float_fit], check=True)
    for method in options.methods:
        there = {key_in(row) for row in rows_of(path)}
        wanted = {seed: key_in(key_of(options, method, seed)) for seed in options.seeds}
        missing = [seed for seed, key in wanted.items() if key not in there]
        try:
            if missing:
                run(options, method, missing, path)
        except subprocess.CalledProcessError:
            failed.append(method)
    return failed


def unfinished(names: list[str]) -> str | None:
    """What to end with: nothing where all fits did."""
    return f"fits of {', '.join(names)} did not end: what they printed says why" if names else None


def positive(kind: type) -> Callable[[str], Any]:
    """A number above 0, as an argument."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says so of what is no number
    return parse


def override(text: str) -> str:
    """One of ``--set``; not of what an argument says already, or a row would say one thing and its fit do another."""
    name = text.lstrip("+~").split("=", 1)[0]
    if name in ARGUMENTS:
        raise argparse.ArgumentTypeError(f"{name} is given by {ARGUMENTS[name]}, got {text!r}")
    return text


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """What was not given, as is usual for the network."""
    usual = NETWORKS[options.network]
    if getattr(options, "trial", True) and not usual.held_out:
        sys.exit(f"--network {options.network} has no held-out images: settings cannot be chosen without the test's")
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{"lr": usual.lr, "epochs": usual.epochs, "extras": usual.extras, **given})


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20", help="default %(default)s")
    parser.add_argument(
        "--bits", type=int, choices=range(2, 9), default=2, help="of weights and activations, default %(default)s"
    )
    every = "without it all: " + ", ".join(map(shlex.quote, METHODS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="default 0")
    parser.add_argument("--epochs", type=positive(int), help="without it 3, 10 for MobileNet")
    parser.add_argument(
        "--lr", type=positive(float), help="peak learning rate of all methods; without it the network's own"
    )
    parser.add_argument(
        "--extras",
        choices=EXTRAS,
        help="the float network teaches beside the task's loss (at temperature 4 with temperature4), or alone (default "
        "for MobileNet), or ResNet-56 does; all re-estimate batch norms",
    )
    parser.add_argument("--trial", action="store_true", help="held-out images only")
    parser.add_argument(
        "--set", type=override, nargs="*", default=[], help="further overrides, part of the method's name"
    )
    parser.add_argument("--show", action="store_true", help="print and draw what there is")
    options = with_defaults(parser.parse_args())
    path = RESULTS / ("accuracy_trials.csv" if options.trial else "accuracy.csv")
    failed = None if options.show else unfinished(fill(options, path))
    if all(row["network"] != options.network for row in rows_of(path)):
        parser.error(f"{path.name} has no rows of {options.network} yet: {failed or 'run without --show first'}")
    print(show(path, options.network))
    print(picture(path, options.network))
    sys.exit(failed)


if __name__ == "__main__":
    main()
