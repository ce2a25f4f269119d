"""Run by test_ddp.py in two processes: train with the callback and by hand, write the weights of both."""

import copy
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

import lq
from lq.metrics import Alignment
from tests.helpers.by_hand import SETTINGS, ByHand, ByHandManual, by_hand_net, weights_of
from tests.helpers.modules import Manual, Plain, fit, loader, mlp

MODES = {
    "plain": {},
    "accumulation-clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "manual": {},
    "compiled": {},
}


def sgd(params):
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def sharded(rank: int) -> DataLoader:
    """Each rank its own images, in a fixed order."""
    dataset = loader(16).dataset
    sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=False)
    return DataLoader(dataset, batch_size=8, sampler=sampler)


def main(out: Path, mode: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    every = 2 if mode in ("accumulation-clipping", "manual") else 1
    plain, hand = (Manual, ByHandManual) if mode == "manual" else (Plain, ByHand)
    common = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, **MODES[mode]}

    torch.manual_seed(0)
    net = mlp()
    module = plain(copy.deepcopy(net), optimizer=sgd)
    target = torch.compile(module, backend="aot_eager") if mode == "compiled" else module
    callback = lq.LearnedQuantization(**SETTINGS)
    fit(target, [callback], sharded(rank), **common)

    # by hand, from scales calibrated on what both ranks see
    twin = by_hand_net(net, islice(sharded(rank), SETTINGS["calibration_batches"]))
    fit(hand(twin, optimizer=sgd, every=every), [], sharded(rank), **common)

    quantizer = module.net[0].weight_quantizer
    metric, whole = Alignment(), Alignment()
    values = torch.tensor([[1.0, 1.0], [0.0, 0.25]]) * quantizer.scale.detach()
    metric.update(values[rank], quantizer)
    whole.update(values, quantizer)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    result = {
        "callback": weights_of(module),
        "by_hand": weights_of(twin),
        "buffers": buffers,
        "alignment": torch.stack([metric.compute(), whole.compute()]),
        "step": torch.tensor(callback.annealing.step),
    }
    torch.save(result, out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
