"""Learning rates and weight decay of their own, in optimizers of all kinds."""

import pytest
import timm.optim
import torch
from torch import nn

import lq
from lq.group_rules import GroupRules, Rule
from tests.helpers.modules import Plain, fit


@pytest.mark.parametrize("name", ["momentum", "lookahead_momentum"])
def test_rules_reach_the_optimizer_inside_another_one(name):
    scale, weight = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = timm.optim.create_optimizer_v2([scale, weight], opt=name, lr=0.1, weight_decay=0.0)
    rules = GroupRules(optimizer, lambda: [Rule([scale], lr=0.0)])
    for _ in range(12):
        for parameter in (scale, weight):
            parameter.grad = torch.ones(2)
        optimizer.step()
    assert torch.equal(scale, torch.ones(2))
    assert bool((weight < 0).all())
    assert len(optimizer.param_groups) == 1
    rules.remove()


def test_an_optimizer_of_a_single_group_is_left_alone_where_nothing_differs():
    class Closure(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)

    before = Closure()
    start = before.net[0].weight.detach().clone()
    fit(before, [lq.LearnedQuantization(bits=4, regularizer=None)])
    assert not torch.equal(before.net[0].weight, start)
    with pytest.raises(ValueError, match="scale_lr_factor must be 1 with LBFGS, which has one learning rate for all"):
        fit(Closure(), [lq.LearnedQuantization(bits=4, regularizer=None, scale_lr_factor=0.1)])
