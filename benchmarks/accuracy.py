"""Accuracy of every method at equal budget: same data order, augmentation, optimizer, epochs, extras and seeds.

    LQ_DATA=/path python benchmarks/accuracy.py --bits 2 --methods lsq "soft, mid-rise" --seeds 0 1 2

Fine-tunes a given float network with W = A = ``--bits``, first and last layer 8 bits, by ``lq train --multirun``, one
sweep over seeds per method; every run is in MLflow (``./mlflow.db``, experiment "accuracy"). A row holds the accuracy
after the last epoch on the test set, which is read once, and on 5000 held-out training images (MobileNet's sample has
none: there both are the images of the test, and ``--trial`` is refused). Rows that are in the file already are kept,
and a fit that was interrupted goes on from its last whole epoch (benchmarks/cache/fits). ``--show`` prints the table
and draws it beside the rows.

``--trial`` never reads the test set and writes to a file of its own: settings are chosen there. The given ResNet-20 was
trained on the held-out images, too, and knows 98 % of them; ``--network resnet20_unseen`` is one that was not, trained
on the first call (45 minutes of a CPU core) and kept in benchmarks/cache. It is fine-tuned in bfloat16, which takes two
thirds of the time on processors that multiply it.
"""

import argparse
import csv
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from accuracy_fits import fits
from accuracy_table import picture, rows_of, show

RESULTS, CACHE = Path(__file__).parent / "results", Path(__file__).parent / "cache"
FITS = CACHE / "fits"
MID_RISE, MID_TREAD = "quantizer.grid=mid_rise", "quantizer.grid=mid_tread"
# of each output's weights; accumulators of 16 bits would bound nothing here
BOUNDED = ["quantizer.granularity=channel", "quantizer.accumulator_bits=14"]
METHODS = {
    "float": ["quantizer=none"],
    "lsq": ["quantizer=lsq"],
    "lsq, full range": ["quantizer=lsq", "quantizer.grid=full_range"],
    "lsq, mid-rise": ["quantizer=lsq", MID_RISE],
    "lsq_plus": ["quantizer=lsq_plus"],
    "minmax": ["quantizer=minmax"],
    "minmax, folded": ["quantizer=minmax", "quantizer.fold_norms=true"],
    "pact": ["quantizer=pact"],
    "pact, mid-rise": ["quantizer=pact", MID_RISE],  # the published levels, of dsq, too
    "dsq": ["quantizer=dsq"],
    "dsq, mid-rise": ["quantizer=dsq", MID_RISE],
    "qn": ["quantizer=qn"],
    "apot": ["quantizer=apot"],
    "nulsq": ["quantizer=nulsq"],
    "log2": ["quantizer=log2"],
    "dlq": ["quantizer=dlq"],
    "codebook": ["quantizer=codebook"],
    "subset": ["quantizer=subset"],
    "subset, uneven inputs": [
        "quantizer=subset",
        "quantizer.activation_levels=subset",
        "quantizer.activation_candidates=apot",
    ],
    "a2q": ["quantizer=a2q", *BOUNDED],
    "a2q_plus": ["quantizer=a2q_plus", *BOUNDED],
    "oaq": ["quantizer=oaq"],  # minmax, where no sum overflows, as here below 8 bits
    "soft": ["quantizer=soft"],  # all of it as it is by default
    "soft, mid-rise": ["quantizer=soft", MID_RISE],
    "soft, mid-tread": ["quantizer=soft", MID_TREAD],
}
# weight decay falls with the width, as for LSQ (Esser et al. 2020, section 3)
DECAY_FACTOR = {2: 0.25, 3: 0.5}


def _distilled(callbacks: str, task_weight: int, temperature: int, *more: str) -> list[str]:
    settings = {"task_weight": task_weight, "temperature": temperature}
    given = [f"callbacks.distillation.{name}={value}" for name, value in settings.items()]
    return [f"callbacks={callbacks}", *given, *more, "schedule.reestimate_bn=20"]


_RESNET56 = (
    "callbacks.distillation.teacher.name=cifar_resnet56",
    "callbacks.distillation.teacher.checkpoint=${oc.env:LQ_DATA}/cifar10_resnet56.safetensors",
)
EXTRAS = {  # as in rows and on the command line
    "none": ("none", ["callbacks=default", "schedule.reestimate_bn=0"]),
    "distill": ("distillation, batch norms", _distilled("distill", 1, 1)),
    "temperature4": ("distillation at temperature 4, batch norms", _distilled("distill", 1, 4)),
    "teacher": ("teacher alone, batch norms", _distilled("distill", 0, 1)),
    "resnet56": ("ResNet-56 alone, batch norms", _distilled("teacher", 0, 1, *_RESNET56)),
    "resnet56_temperature4": ("ResNet-56 at temperature 4, batch norms", _distilled("teacher", 1, 4, *_RESNET56)),
}
KEY = "network bits method extras epochs lr seed".split()
FIELDS = [*KEY, "held_out", "test", "float", "seconds"]


@dataclass(frozen=True)
class Network:
    """How a float network is fine-tuned, whatever quantizes it."""

    recipe: list[str]
    lr: float = 0.01
    weight_decay: float = 1e-4
    epochs: int = 3
    extras: str = "distill"
    granularity: str = "tensor"
    held_out: bool = True  # whether there are images beside those that train and those of the test
    float_fit: list[str] | None = None  # makes the float network, where it is not given


RESNET = ["recipes=cifar10_resnet20", "model.channels_last=true"]
UNSEEN = CACHE / "resnet20_unseen" / "network.safetensors"
NETWORKS = {
    "resnet20": Network(RESNET),
    "resnet20_unseen": Network(
        [*RESNET, f"model.checkpoint={UNSEEN}", "trainer.precision=bf16-mixed"],
        float_fit=[
            *RESNET,
            "quantizer=none",
            "model.checkpoint=null",
            "optimizer.lr=0.1",
            "optimizer.weight_decay=5e-4",
            "optimizer.warmup=0.03",
            "trainer.max_epochs=24",
            "trainer.precision=bf16-mixed",
            "test=false",
            "experiment=accuracy",
            f"hydra.run.dir={UNSEEN.parent}",
        ],
    ),
    "resnet56": Network(
        [*RESNET, "model.name=cifar_resnet56", "model.checkpoint=${data.root}/cifar10_resnet56.safetensors"]
    ),
    "vit": Network(["recipes=cifar10_vit"], lr=5e-4, weight_decay=0.05),
    # one image per class: labels of what trains say nothing of what is scored
    "mobilenetv1": Network(
        ["recipes=imagenet_mobilenetv1"],
        lr=0.001,
        epochs=10,
        extras="teacher",
        granularity="channel",
        held_out=False,
    ),
}


def overrides(options: argparse.Namespace, method: str) -> list[str]:
    """What ``lq train --multirun`` gets for one method, whatever the seed."""
    plain, network = method == "float", NETWORKS[options.network]
    given = [
        *network.recipe,
        *([] if plain else [f"quantizer.bits={options.bits}", f"quantizer.granularity={network.granularity}"]),
        *METHODS[method],
        f"optimizer.lr={options.lr}",
        f"optimizer.weight_decay={network.weight_decay * DECAY_FACTOR.get(options.bits, 1.0)}",
        f"trainer.max_epochs={options.epochs}",
        f"test={'false' if options.trial else 'true'}",
        "experiment=accuracy",
    ]
    given += [extra for extra in EXTRAS[options.extras][1] if not (plain and extra.startswith("schedule."))]
    return given + options.set


def run(options: argparse.Namespace, method: str, seeds: list[int], path: Path) -> None:
    """One sweep over seeds; a row for each run that ends, even where a later one fails."""
    name = {**key_of(options, method, 0), "seed": "", "trial": str(options.trial)}
    folder = FITS / hashlib.sha256(json.dumps(name).encode()).hexdigest()[:16]
    for seed, outcome, seconds in fits(folder, overrides(options, method), seeds):
        _append(path, _row(key_of(options, method, seed), outcome, seconds))


def _row(key: dict[str, str], outcome: dict, seconds: float) -> dict[str, str]:
    names = {"held_out": "held_out_accuracy", "test": "accuracy", "float": "float_accuracy"}
    return {**key, **{column: _percent(outcome[name]) for column, name in names.items()}, "seconds": f"{seconds:.0f}"}


def _append(path: Path, row: dict[str, str]) -> None:
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(*row.values(), flush=True)


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
        there = [{k: row[k] for k in KEY} for row in rows_of(path)]
        missing = [seed for seed in options.seeds if key_of(options, method, seed) not in there]
        try:
            if missing:
                run(options, method, missing, path)
        except subprocess.CalledProcessError:
            failed.append(method)
    return failed


def unfinished(names: list[str]) -> str | None:
    """What to end with: nothing where all fits did."""
    return f"fits of {', '.join(names)} did not end: what they printed says why" if names else None


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
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--bits", type=int, default=2, help="of weights and activations")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="without it 3, 10 for MobileNet")
    parser.add_argument("--lr", type=float, help="peak learning rate of all methods; without it the network's own")
    parser.add_argument(
        "--extras",
        choices=EXTRAS,
        help="the float network teaches beside the task's loss (at temperature 4 with temperature4), or alone (default "
        "for MobileNet), or ResNet-56 does; all re-estimate batch norms",
    )
    parser.add_argument("--trial", action="store_true", help="held-out images only")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, part of the method's name")
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
