import numpy as np
import pytest
import torch

from lq.functional.layout import ScaleLayout
from lq.functional.levels import CodeRange, code_range
from lq.quantizers.minmax import MinMaxQuantizer, MovingRangeQuantizer


@pytest.mark.parametrize("channel", [False, True])
def test_the_largest_weight_is_the_largest_level_at_every_step(channel):
    torch.manual_seed(0)
    layout = ScaleLayout.per_channel((4, 30)) if channel else ScaleLayout()
    quantizer = MinMaxQuantizer(code_range(8), layout=layout)
    for factor in (1.0, 3.0, 0.2):
        weight = (torch.randn(4, 30) * factor).requires_grad_()
        y = quantizer.train()(weight)
        largest = weight.detach().abs().amax(1, keepdim=True) if channel else weight.detach().abs().max()
        torch.testing.assert_close(y.detach().abs().amax(), weight.detach().abs().amax())
        scale = largest / 127
        torch.testing.assert_close(y.detach(), (weight.detach() / scale).round() * scale)
        upstream = torch.randn_like(weight)
        y.backward(upstream)
        assert torch.equal(weight.grad, upstream)  # nothing is clipped
        assert torch.equal(quantizer.eval()(weight), y)


@pytest.mark.parametrize("codes", [CodeRange(0, 15, 0.0), CodeRange(-7, 7, 0.0)])
def test_ranges_of_activations_are_a_moving_average(codes):
    torch.manual_seed(0)
    quantizer = MovingRangeQuantizer(codes, momentum=0.9)
    quantizer.calibrate_(torch.tensor([0.0, 3.0]))
    expected = 3.0 / codes.hi
    for _ in range(20):
        x = torch.randn(50) * 2
        quantizer.train()(x.relu() if codes.lo == 0 else x)
        largest = float(x.max() if codes.lo == 0 else x.abs().max())
        expected = 0.9 * expected + 0.1 * largest / codes.hi
    np.testing.assert_allclose(quantizer.scale, [expected], rtol=1e-5)
    before = quantizer.scale.clone()
    x = torch.linspace(-9, 9, 100, requires_grad=True)
    quantizer.eval()(x)
    assert torch.equal(quantizer.scale, before)
    y = quantizer(x)
    y.sum().backward()
    inside = (x.detach() >= codes.lo * before) & (x.detach() <= codes.hi * before)
    assert torch.equal(x.grad, inside.float())
