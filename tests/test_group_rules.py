import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lq
from lq.group_rules import GroupRules, decay_rules, scale_rules
from lq.network import positive_scales, scale_parameters


def test_parametrized_weights_of_few_bits_decay_less_too():
    layers = [nn.Linear(4, 4) for _ in range(4)]
    parametrizations.weight_norm(layers[2])
    model = nn.Sequential(*layers)
    lq.quantize_model(model, lq.QuantSpec(bits=2))
    (rule,) = decay_rules(layer for layer in model)
    own = {id(p) for p in model[2].parametrizations.weight.parameters() if p.dim() > 1}
    assert own
    assert {id(p) for p in rule.parameters} == {id(model[1].weight)} | own


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_step_changes_a_scale_by_more_than_half_and_others_as_ever(kind):
    scale, offset, weight = (nn.Parameter(torch.tensor([0.007, 0.007, 5.0])) for _ in range(3))
    twin = nn.Parameter(scale.detach().clone())
    bound = OPTIMIZERS[kind]([{"params": [scale, offset]}, {"params": [weight]}])
    GroupRules(bound, scale_rules([scale, offset], [scale]))
    free = OPTIMIZERS[kind]([twin])
    GroupRules(free, scale_rules([twin], []))
    generator, lowest = torch.Generator().manual_seed(0), []
    for step in range(50):
        before = scale.detach().clone()
        gradient = torch.randn(3, generator=generator) * torch.tensor([1.0, 1e-4, 1e-2])
        scale.grad, offset.grad, weight.grad, twin.grad = (gradient.clone() for _ in range(4))
        bound.step()
        free.step()
        assert ((scale - before).abs() <= 0.5 * before + 1e-9).all()
        if step == 0:
            torch.testing.assert_close(scale[2], twin[2])  # an ordinary step is what it was
        torch.testing.assert_close(offset, twin)
        assert len(bound.param_groups) == 2
        lowest.append(twin.min().item())
    assert (scale > 0).all()
    assert min(lowest) < 0  # without the bound the small ones are carried past zero


def test_scales_are_bound_and_offsets_are_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    lq.quantize_model(model, lq.QuantSpec(quantizer="lsq_plus", activation="signed", first_last_bits=None))
    rules = scale_rules(scale_parameters(model), positive_scales(model), lr=0.5)
    assert [rule.change for rule in rules] == [0.5, None]
    assert {(rule.lr, rule.weight_decay) for rule in rules} == {(0.5, 0.0)}
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    bound, others = ({names[id(p)] for p in rule.parameters} for rule in rules)
    assert bound == {"scale"}
    assert others == {"offset"}
