"""Quantization-aware training written out by hand in plain autograd, for comparison with the callback."""

import copy

import torch
from torch import nn

import lq
from tests.helpers.modules import Manual, Plain

STRENGTH, STEPS, SLOPE_START, SLOPE_END = 0.7, 8, 1.0, 9.0
SETTINGS = {
    "bits": 3,
    "grid": "mid_tread",
    "first_last_bits": None,
    "forward": "soft",
    "scale_gradient": "exact",
    "slope_start": SLOPE_START,
    "slope_end": SLOPE_END,
    "anneal_steps": STEPS,
    "strength": STRENGTH,
    "strength_start": 0,
    "slope_backward_max": None,
    "calibration_batches": 2,
}


CAP = 1.0  # default of slope_backward_max


class HandLinear(nn.Linear):
    """LSQ activations and soft-staircase weights from their formulas.

    ``exact`` takes the staircase and its own gradients; else the defaults: weights rounded, the slope capped in their
    gradient, and the scale's gradient straight through.
    """

    exact = True

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features)
        self.load_state_dict({k: v for k, v in source.state_dict().items() if "quantizer" not in k})
        weight, inputs = source.weight_quantizer, source.input_quantizer.quantizer
        self.n, self.lo, self.hi = weight.codes.hi, inputs.codes.lo, inputs.codes.hi
        self.weight_scale = nn.Parameter(weight.scale.detach().clone())
        self.input_scale = nn.Parameter(inputs.scale.detach().clone())
        self.slope = SLOPE_START

    @staticmethod
    def damped(scale, factor):
        return scale * factor + (scale - scale * factor).detach()

    def forward(self, x):
        dtype, x = x.dtype, x.float()
        s = self.damped(self.input_scale, (x[0].numel() * self.hi) ** -0.5)
        u = (x / s).clamp(self.lo, self.hi)
        x = ((u + (u.round() - u).detach()) * s).to(dtype)
        usual = 2 * self.weight.detach().abs().mean() / self.n**0.5  # LSQ's own first scale
        parity = (self.weight_scale.detach() / usual).square().clamp(max=1)
        s = self.damped(self.weight_scale, parity * (self.weight.numel() * self.n) ** -0.5)
        if self.exact:
            return nn.functional.linear(x, self.staircase(self.weight, s, self.slope), self.bias)
        value = (s * (self.weight / s).clamp(-self.n, self.n).round()).detach()
        by_weight = self.staircase(self.weight, s.detach(), min(self.slope, CAP))
        t = (self.weight / s).detach()
        by_scale = s * (value / s.detach() - torch.where(t.abs() <= self.n, t, 0.0))
        surrogate = by_weight + by_scale
        return nn.functional.linear(x, value + surrogate - surrogate.detach(), self.bias)

    def staircase(self, weight, s, k):
        u = (weight / s).clamp(-self.n, self.n)
        f = u.detach().floor().clamp(max=self.n - 1)
        half = torch.tanh(torch.tensor(k / 2))
        return (f + 0.5 + torch.tanh(k * (u - f - 0.5)) / (2 * half)) * s

    def regularizer(self):
        s = self.weight_scale.detach()
        u = (self.weight / s).clamp(-self.n, self.n)
        return 0.5 * (s**2 * (u - u.detach().round()) ** 2).sum()


class ByHand(Plain):
    """`Plain` with quantizers, schedule and loss term written into it; ``steps_per_update`` batches per step."""

    def __init__(self, net: nn.Module, every: int = 1, **kwargs) -> None:
        super().__init__(net, **kwargs)
        self.every = every

    def layers(self):
        return [m for m in self.net if isinstance(m, HandLinear)]

    def loss(self, batch):
        loss = super().loss(batch)
        if not self.training:
            return loss
        return loss + self.strength * sum(layer.regularizer() for layer in self.layers())

    def training_step(self, batch, batch_idx):
        t = min(batch_idx // self.every / STEPS, 1.0)
        self.strength = STRENGTH * t
        for layer in self.layers():
            layer.slope = SLOPE_START + (SLOPE_END - SLOPE_START) * t
        return super().training_step(batch, batch_idx)


class ByHandManual(ByHand, Manual):
    """The same under manual optimization."""


def by_hand_net(net: nn.Module, batches, first_last_bits: int | None = None) -> nn.Sequential:
    """The hand-written twin of a float network, with the first scales that lq gives it."""
    net = copy.deepcopy(net).train()
    forward = "soft" if HandLinear.exact else "hard"
    widths = {k: SETTINGS[k] for k in ("bits", "grid")} | {"first_last_bits": first_last_bits}
    lq.quantize_model(net, lq.QuantSpec(**widths, forward=forward))
    lq.set_slope(net, SLOPE_START)  # what training sees first
    lq.calibrate(net, batches)
    return nn.Sequential(*(HandLinear(m) if isinstance(m, nn.Linear) else m for m in net))


def weights_of(module) -> dict[str, torch.Tensor]:
    """Parameters under the names of the hand-written twin."""
    names = {"weight_quantizer.scale": "weight_scale", "input_quantizer.quantizer.scale": "input_scale"}
    found = {}
    for name, parameter in module.named_parameters():
        for long, short in names.items():
            name = name.replace(long, short)
        found[name.replace("_orig_mod.", "")] = parameter.detach().clone()
    return found
