"""What the accuracy benchmark gives ``lq train``: of each method, of the extras of all, and of each network."""

import argparse
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "benchmarks" / "cache"
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
    decay = network.weight_decay * (1.0 if plain else DECAY_FACTOR.get(options.bits, 1.0))
    given = [
        *network.recipe,
        *([] if plain else [f"quantizer.bits={options.bits}", f"quantizer.granularity={network.granularity}"]),
        *METHODS[method],
        f"optimizer.lr={options.lr}",
        f"optimizer.weight_decay={decay}",
        f"trainer.max_epochs={options.epochs}",
        f"test={'false' if options.trial else 'true'}",
        "experiment=accuracy",
    ]
    given += [extra for extra in EXTRAS[options.extras][1] if not (plain and extra.startswith("schedule."))]
    return given + options.set
