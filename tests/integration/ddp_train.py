"""Run by test_ddp.py in two processes: in each mode train with the callback and by hand, write the weights of both."""

import copy
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import lq
from lq.callbacks import first_batches
from lq.metrics import Alignment
from lq.nn import named_quantized_layers
from lq.point_search.inputs import hessians
from lq.point_search.rounding import feed_back
from tests.helpers.by_hand import SETTINGS, ByHand, ByHandManual, by_hand_net, weights_of
from tests.helpers.modules import Manual, Plain, fit, loader, mlp

MODES = {
    "plain": {},
    "accumulation-clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "manual": {},
    "compiled": {},
    "rounded": {},
    "distilled": {},
}
WEIGHT, TEMPERATURE = 0.7, 3.0


def sgd(params):
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def sharded(rank: int) -> DataLoader:
    """Each rank its own images, in a fixed order."""
    dataset = loader(16).dataset
    sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=False)
    return DataLoader(dataset, batch_size=8, sampler=sampler)


class ByHandDistilled(ByHand):
    """With the divergence from a teacher in the loss, written out."""

    def __init__(self, net: nn.Module, teacher: nn.Module, **kwargs) -> None:
        super().__init__(net, **kwargs)
        self.taught_by = [copy.deepcopy(teacher).eval()]  # in a list, so that it is no part of the module

    def loss(self, batch):
        with torch.no_grad():
            target = (self.taught_by[0](batch[0]) / TEMPERATURE).log_softmax(1)
        found = (self(batch[0]) / TEMPERATURE).log_softmax(1)
        divergence = nn.functional.kl_div(found, target, reduction="batchmean", log_target=True) * TEMPERATURE**2
        return super().loss(batch) + WEIGHT * divergence


class First(Callback):
    """Keeps what the network is before the first step."""

    weights = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights = self.weights or weights_of(pl_module)


def rounded_(twin: nn.Sequential, net: nn.Sequential) -> None:
    """Give the twin the weights that error feedback finds on what both ranks see."""
    count = SETTINGS["calibration_batches"]
    images = [batch[0] for rank in (0, 1) for batch in islice(sharded(rank), count)]
    quantized = copy.deepcopy(net)
    lq.quantize_model(quantized, lq.QuantSpec(**{name: SETTINGS[name] for name in ("bits", "grid", "first_last_bits")}))
    layers = named_quantized_layers(quantized)
    feed_back(
        quantized, layers, hessians(net.eval(), {p: net.get_submodule(p) for p in layers}, images), progress=False
    )
    for path, layer in layers.items():
        twin.get_submodule(path).weight.data.copy_(layer.weight)


def rounded_otherwise(model, layers, products, **options):
    done = feed_back(model, layers, products, **options)
    next(iter(layers.values())).weight.data[0, 0] += 1
    return done


def compare(rank: int, mode: str) -> dict[str, Any]:
    """Train with the callback and by hand; what of both the ranks have to agree on."""
    every = 2 if mode in ("accumulation-clipping", "manual") else 1
    plain, hand = (Manual, ByHandManual) if mode == "manual" else (Plain, ByHand)
    common = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, **MODES[mode]}

    torch.manual_seed(0)
    net = mlp()
    module = plain(copy.deepcopy(net), optimizer=sgd)
    target = torch.compile(module, backend="aot_eager") if mode == "compiled" else module
    rounded = mode == "rounded"
    callback = lq.LearnedQuantization(**SETTINGS, start_rounding="error_feedback" if rounded else None)
    first = First()
    distilled = [lq.SelfDistillation("net", weight=WEIGHT, temperature=TEMPERATURE)] if mode == "distilled" else []
    with pytest.MonkeyPatch.context() as patch:
        if rounded and rank:  # as another processor might
            patch.setattr(first_batches, "feed_back", rounded_otherwise)
        fit(target, [*distilled, callback, first], sharded(rank), **common)
    if distilled:
        pairs = zip(distilled[0].teacher.parameters(), net.parameters(), strict=True)
        assert all(torch.equal(teaches, given) for teaches, given in pairs)

    # by hand, from scales calibrated on what both ranks see
    twin = by_hand_net(net, islice(sharded(rank), SETTINGS["calibration_batches"]))
    if rounded:
        rounded_(twin, net)
    else:
        by_hand = ByHandDistilled(twin, net, optimizer=sgd) if distilled else hand(twin, optimizer=sgd, every=every)
        fit(by_hand, [], sharded(rank), **common)

    quantizer = module.net[0].weight_quantizer
    metric, whole = Alignment(), Alignment()
    values = torch.tensor([[1.0, 1.0], [0.0, 0.25]]) * quantizer.scale.detach()
    metric.update(values[rank], quantizer)
    whole.update(values, quantizer)
    return {
        "callback": first.weights if rounded else weights_of(module),
        "by_hand": weights_of(twin),
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "alignment": torch.stack([metric.compute(), whole.compute()]),
        "step": torch.tensor(callback.annealing.step),
    }


def main(out: Path, modes: Sequence[str]) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for mode in modes:
        torch.save(compare(rank, mode), out / f"{mode}-rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(MODES))
