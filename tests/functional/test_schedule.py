import pytest

from lq.functional import ramp


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_boundaries(kind):
    value = ramp(2.0, 10.0, 100, kind)
    assert value(0) == 2.0
    assert 2.0 < value(1) < 2.1
    assert 9.9 < value(99) < 10.0
    assert value(100) == value(101) == value(10**6) == 10.0
    assert value(50) == pytest.approx(6.0)


def test_bad_input():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        ramp(0, 1, 0)
    with pytest.raises(ValueError, match="schedule must be one of .* got 'step'"):
        ramp(0, 1, 1, "step")
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        ramp(0, 1, 1)(-1)
