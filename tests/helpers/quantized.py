"""Networks that are quantized, calibrated and ready to export."""

import torch
from torch import nn

import lq


def quantized(model: nn.Module, shape: tuple[int, ...], **spec) -> nn.Module:
    """Randomised batch norms, quantized, calibrated, in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(-1.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
            module.running_mean.uniform_(-1, 1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    lq.quantize_model(model, lq.QuantSpec(**spec))
    if spec.get("activation", "auto") is not None:
        lq.calibrate(model, [torch.randn(16, *shape, generator=generator)])
    return model.eval()
