"""Students that do more than take an input and return logits."""

import pytest
import torch
from torch import nn

import lq
from lq.functional.distillation import feature_loss
from tests.callbacks.test_distillation import QUANTIZATION, sgd
from tests.helpers.modules import Plain, fit, loader, mlp


class Shifts(nn.Module):
    """Normalizes its input in place."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x.sub_(0.5).div_(0.25))


@pytest.mark.parametrize("frozen", [False, True])
def test_teacher_and_student_see_the_same_where_they_change_it_in_place(frozen):
    torch.manual_seed(0)
    changing = Plain(Shifts())
    changing.net.net[0].requires_grad_(not frozen)
    seen = []
    distillation = lq.SelfDistillation(student="net", logits=lambda z: seen.append(z.detach().clone()) or z)
    callbacks = [lq.LearnedQuantization(bits=8, calibration_batches=1, slope_end=8.0), distillation]
    fit(changing, callbacks, loader(1))
    torch.testing.assert_close(seen[0], seen[1], atol=0.1, rtol=0.1)  # 8 bits beside float


class Again(nn.Module):
    """Calls itself on another input first."""

    def __init__(self):
        super().__init__()
        self.net, self.inner = mlp(), False

    def forward(self, x):
        if not self.inner:
            self.inner = True
            self(3 * x)
            self.inner = False
        return self.net(x)


def test_features_are_those_of_the_call_that_is_compared(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lq.callbacks.distillation.feature_loss", lambda a, b: seen.append((a, b)) or feature_loss(a, b)
    )
    torch.manual_seed(0)
    distillation = lq.SelfDistillation("net", features=["net.0"], feature_weight=1.0)
    fit(Plain(Again()), [lq.LearnedQuantization(bits=8, calibration_batches=1), distillation], loader(1))
    for mine, theirs in seen:  # 8 bits beside float, of one input
        torch.testing.assert_close(mine, theirs, atol=0.1, rtol=0.1)


class Skips(nn.Module):
    """Leaves a part out from its third call on."""

    def __init__(self):
        super().__init__()
        self.first, self.part, self.last, self.calls = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4), 0

    def forward(self, x):
        self.calls += 1
        x = self.first(x).relu()
        return self.last(self.part(x) if self.calls < 3 else x)


def test_a_part_that_no_longer_runs_is_named():
    distillation = lq.SelfDistillation("net", features=["part"], feature_weight=1.0)
    with pytest.raises(ValueError, match="got 'part', which did not run in the student"):
        fit(Plain(Skips()), [distillation], loader(5))


def test_the_student_is_no_teacher_of_itself():
    plain = Plain()
    distillation = lq.SelfDistillation("net", teacher=plain.net)
    with pytest.raises(
        ValueError, match="teacher must be another network than the student, got Sequential, .* leave it out"
    ):
        fit(plain, [lq.LearnedQuantization(bits=3), distillation], loader(2))


class Checkpointed(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.network, x, use_reentrant=False)


def test_a_student_whose_activations_are_computed_twice_is_taught_as_without():
    def trained(wrap, student):
        torch.manual_seed(0)
        plain = Plain(wrap(mlp()), optimizer=sgd)
        fit(plain, [lq.SelfDistillation(student), lq.LearnedQuantization(**QUANTIZATION)], loader())
        return list(plain.parameters())

    saved, twice = trained(nn.Sequential, "net.0"), trained(Checkpointed, "net.network")
    assert all(torch.equal(a, b) for a, b in zip(saved, twice, strict=True))
