"""What holds for every integer network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lq


def check_accumulators_are_exact(network: lq.IntegerNetwork, model: nn.Module, codes: Tensor) -> None:
    """Accumulators equal a convolution in double precision and lie in their bounds; integers are the weights."""
    seen = {}
    network.run(codes, lambda path, what, t: seen.update({(path, what): t}))
    for plan in network.layers:
        layer, x = model.get_submodule(plan.path), seen[plan.path, "inputs"].double()
        x = x.reshape(*x.shape, 1, 1) if x.dim() == 2 else x
        conv = {k: v for k, v in plan.conv.items() if k != "padding"}
        exact = F.conv2d(F.pad(x, plan.conv["padding"]), plan.weight.double(), **conv)
        acc = seen[plan.path, "accumulators"]
        assert acc.dtype == torch.int32
        assert torch.equal(acc.double(), exact)
        assert bool((acc >= plan.bounds[0].reshape(-1, 1, 1)).all())
        assert bool((acc <= plan.bounds[1].reshape(-1, 1, 1)).all())
        weight = layer.quantized_weight().double()  # the integers are the weights, over one real number per channel
        unit = (weight.flatten(1).norm(dim=1) / plan.weight.double().flatten(1).norm(dim=1).clamp_min(1e-9))[:, None]
        torch.testing.assert_close(plan.weight.double().flatten(1) * unit, weight.flatten(1), rtol=1e-5, atol=1e-7)
