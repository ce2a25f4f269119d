"""What each part of the soft staircase's training is worth: one changed at a time, the same seeds, budget and extras.

    LQ_DATA=/path python benchmarks/ablation.py --bits 2
    LQ_DATA=/path python benchmarks/ablation.py --bits 4 --method lsq --network resnet20_unseen --changes extras

Every row is a short fine-tuning as in ``accuracy.py --trial`` (one epoch, distillation, batch norms re-estimated),
scored on 5000 held-out training images after its last epoch; the test set is not read. Rows are those of
accuracy_trials.csv: what is there is kept. Prints, for each change, the accuracy and its difference from the unchanged
method, seed by seed.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable

from accuracy import RESULTS, fill, key_of, positive, unfinished, with_defaults
from accuracy_rows import key_in, rows_of
from accuracy_settings import EXTRAS, METHODS, NETWORKS
from accuracy_table import spread

PATH = RESULTS / "accuracy_trials.csv"
BASE = "soft"
EARLY, SOFT = "schedule.strength_start=0", "quantizer.forward=soft"
OWN = {  # what the method is made of
    "unchanged": [],
    "weights: soft forward": [SOFT],
    "levels: mid-tread": ["quantizer.grid=mid_tread"],
    "regularizer: none": ["schedule=plain"],
    "regularizer: from the start": [EARLY],
    "batch norms: not re-estimated": ["schedule.reestimate_bn=0"],
    "backward: cap 2": ["quantizer.slope_backward_max=2"],
    "backward: cap 4": ["quantizer.slope_backward_max=4"],
    "backward: no cap": ["quantizer.slope_backward_max=null"],
    "soft forward, slope 16 from the start": [SOFT, "schedule.slope_start=16"],
    "soft forward, backward without a cap": [SOFT, "quantizer.slope_backward_max=null"],
    "scales: per channel": ["quantizer.granularity=channel"],
    "weights: normalized": ["quantizer.normalize=true"],
    "activations: soft forward": ["quantizer.activation_forward=soft"],
    "soft forward, slope to 8": [SOFT, "schedule.slope_end=8"],
    "soft forward, slope to 32": [SOFT, "schedule.slope_end=32"],
    "soft forward, slope rises to the end": [SOFT, "schedule.anneal_steps=1.0"],
    "soft forward, slope held from step 140 on": [SOFT, "schedule.hold={_target_: lq.HoldAtStep, step: 140}"],
    "scales: exact gradient": ["quantizer.scale_gradient=exact"],
    "regularizer: strength 0.2": ["schedule.strength=0.2"],
    "regularizer: strength 30": ["schedule.strength=30"],
    "regularizer: l1": ["schedule.regularizer=l1"],
    "regularizer: sine": ["schedule.regularizer=sine"],
    "regularizer: scales learn from it": ["schedule.regularizer_scale_gradient=true"],
    "regularizer: of quantized weights": ["schedule.regularizer_on=quantized"],
}
DISTILL = "callbacks.distillation"
EXTRA = {  # what any quantizer can be trained with
    "no distillation": [f"{DISTILL}.weight=0"],
    "distillation: the teacher alone": [f"{DISTILL}.task_weight=0"],
    "distillation: weight 4": [f"{DISTILL}.weight=4"],
    "distillation: temperature 2": [f"{DISTILL}.temperature=2"],
    "distillation: temperature 4": [f"{DISTILL}.temperature=4"],
    "distillation: temperature 8": [f"{DISTILL}.temperature=8"],
    "distillation: temperature 4, the teacher alone": [f"{DISTILL}.temperature=4", f"{DISTILL}.task_weight=0"],
    "distillation: of features, too": [f"{DISTILL}.features=[layer1,layer2,layer3]", f"{DISTILL}.feature_weight=1"],
    "weights rounded with error feedback first": ["schedule.start_rounding=error_feedback"],
    "weights averaged": [
        "+callbacks.averaging={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.99}"
    ],
    "8, then 4 bits in the first half": [
        "+callbacks.progressive={_target_: lq.ProgressiveBits, bits: [8, 4], until: 0.5}"
    ],
    "float activations in the first third": ["+callbacks.delay={_target_: lq.DelayedActivations, until: 0.3}"],
    "oscillations: dampened": ["schedule=dampen"],
    "oscillations: frozen": [
        "+callbacks.freezing={_target_: lq.IterativeFreezing, threshold_start: 0.1, threshold_end: 0.01}"
    ],
    "scales: a tenth of the learning rate": ["schedule.scale_lr_factor=0.1"],
    "weight decay of all widths alike": ["optimizer.weight_decay=1e-4"],
    "learning rate 0.003": ["optimizer.lr=0.003"],
    "learning rate 0.03": ["optimizer.lr=0.03"],
}
CHANGES = OWN | EXTRA


def settings(options: argparse.Namespace, change: str) -> argparse.Namespace:
    """What ``accuracy.py`` gets for one change."""
    return argparse.Namespace(**vars(options), methods=[options.method], set=CHANGES[change], trial=True)


def found(options: argparse.Namespace, change: str) -> dict[int, float]:
    """Accuracy by seed."""
    rows = {key_in(row): float(row["held_out"]) for row in rows_of(PATH)}
    wanted = {seed: key_in(key_of(settings(options, change), options.method, seed)) for seed in options.seeds}
    return {seed: rows[key] for seed, key in wanted.items() if key in rows}


def show(options: argparse.Namespace) -> str:
    """Accuracy and difference from the unchanged method, a table in Markdown for the method and one for the extras."""
    tables = filter(None, [_table(options, OWN), _table(options, ["unchanged", *EXTRA])])
    return "\n\n".join(tables) or f"nothing but unchanged, if that, has rows of these settings in {PATH.name}"


def _table(options: argparse.Namespace, changes: Iterable[str]) -> str:
    """Of what has been run; empty where that is nothing but the unchanged method."""
    base = found(options, "unchanged")
    lines = [f"| W{options.bits}A{options.bits}, held-out images | accuracy | difference |", "| --- | --: | --: |"]
    for change in changes:
        values = found(options, change)
        if not values:
            continue
        differences = [] if change == "unchanged" else [values[seed] - base[seed] for seed in values if seed in base]
        lines.append(f"| {change} | {spread(list(values.values()))} | {spread(differences, sign=True)} |")
    return "\n".join(lines) if len(lines) > 3 else ""


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20", help="default %(default)s")
    parser.add_argument(
        "--method", choices=METHODS, default=BASE, metavar="METHOD", help="what is changed, default %(default)s"
    )
    parser.add_argument(
        "--bits", type=int, choices=range(2, 9), default=2, help="of weights and activations, default %(default)s"
    )
    parser.add_argument(
        "--changes",
        nargs="+",
        choices=[*CHANGES, "extras"],
        default=list(CHANGES),
        metavar="CHANGE",
        help="without it all but extras, all that any quantizer can be trained with: "
        + ", ".join(map(shlex.quote, [*CHANGES, "extras"])),
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default 0 1 2")
    parser.add_argument("--epochs", type=positive(int), default=1, help="default %(default)s")
    parser.add_argument("--lr", type=positive(float), help="peak learning rate")
    parser.add_argument("--extras", choices=EXTRAS, help="as in accuracy.py")
    parser.add_argument("--show", action="store_true", help="print what there is")
    options = with_defaults(parser.parse_args())
    wanted = [] if options.show else [c for name in options.changes for c in (EXTRA if name == "extras" else [name])]
    failed = [change for change in wanted if fill(settings(options, change), PATH)]
    print(show(options))
    sys.exit(unfinished(failed))


if __name__ == "__main__":
    main()
