"""The checks for quantizers of others find what is wrong with them, and their packages are found."""

import sys

import pytest
import torch
from torch import nn

import lq
from lq.cli.quantizers import details, main, table
from lq.functional.levels import CodeRange
from lq.quantizers import REGISTRY, CodebookQuantizer, LSQQuantizer, Method, find_method, method_names
from lq.spec import LayerSpec
from lq.testing import check_quantizer
from tests.helpers.commands import lq as command
from tests.helpers.modules import Plain, fit


class OffLevels(LSQQuantizer):
    def hard(self, x):
        return super().hard(x) * 1.001


class WrongCodes(LSQQuantizer):
    def encode(self, x):
        return -super().encode(x)


class Spread(LSQQuantizer):
    def encode(self, x):
        return super().encode(x).to(torch.int16) * 100

    def decode(self, codes):
        return super().decode((codes // 100).to(torch.int8))


class NoGradient(LSQQuantizer):
    def fake_quantize(self, x, scale, gradient_scale):
        return super().fake_quantize(x, scale.detach(), gradient_scale)


class Infinite(LSQQuantizer):
    def fake_quantize(self, x, scale, gradient_scale):
        return super().fake_quantize(x, scale, float("inf"))


class OtherType(LSQQuantizer):
    def forward(self, x):
        return super().forward(x).double()


class Forgets(LSQQuantizer):
    def calibrate_(self, *args, **kwargs):
        super().calibrate_(*args, **kwargs)
        self.bias = 0.5

    def fake_quantize(self, x, scale, gradient_scale):
        return super().fake_quantize(x, scale, gradient_scale) + getattr(self, "bias", 0.0)


class Unsettled(LSQQuantizer):
    def _nearest(self, view, scale):
        return super()._nearest(view + scale, scale)

    def _encode(self, view, scale):
        return super()._encode(view + scale, scale)


class NoZero(LSQQuantizer):
    def forward(self, x):
        y = super().forward(x)
        return torch.where(y == 0, self.level_values()[-1], y)


class DrawnToZero(LSQQuantizer):
    def regularizer(self, x, **how):
        return x.square().sum() / 2


class Optimistic(LSQQuantizer):
    def statistics(self, x, **how):
        found = super().statistics(x, **how)
        return found._replace(loss=found.loss / 2)


class Unranked(LSQQuantizer):
    def rank(self, codes):
        return codes.abs()


class NegatedGradient(LSQQuantizer):
    def fake_quantize(self, x, scale, gradient_scale):
        y = super().fake_quantize(x, scale, gradient_scale)
        return 2 * y.detach() - y


class SteepGradient(LSQQuantizer):
    def fake_quantize(self, x, scale, gradient_scale):
        y = super().fake_quantize(x, scale, gradient_scale)
        return 10 * y - 9 * y.detach()


class TrainsElsewhere(LSQQuantizer):
    def fake_quantize(self, x, scale, gradient_scale):
        return super().fake_quantize(x.flip(0), scale, gradient_scale)


class TrainsOnOtherLevels(LSQQuantizer):
    def fake_quantize(self, x, scale, gradient_scale):
        return super().fake_quantize(x, 1.3 * scale, gradient_scale)


class Wider(LSQQuantizer):
    def __init__(self, codes, **common):
        super().__init__(CodeRange(4 * codes.lo, 4 * codes.hi, codes.offset), **common)


class Uncalibrated(LSQQuantizer):
    def calibrate_(self, x, *args, **kwargs):
        pass


class KeepsWidth(LSQQuantizer):
    def __init__(self, codes, **common):
        super().__init__(codes, **common)
        self.first = codes

    def _rounding(self):
        return self.first._asdict()


class Bounded(LSQQuantizer):
    bound = 0.1

    def calibrate_(self, x, *args, **kwargs):
        super().calibrate_(x, *args, **kwargs)
        self.bound = float(x.max())

    def _nearest(self, view, scale):
        return super()._nearest(view.clamp_max(self.bound), scale)

    def _encode(self, view, scale):
        return super()._encode(view.clamp_max(self.bound), scale)


class ChangesInput(LSQQuantizer):
    def forward(self, x):
        x.data.mul_(1.01)
        return super().forward(x)


class Detached(LSQQuantizer):
    def forward(self, x):
        return super().forward(x).detach()


class WithoutLevels(LSQQuantizer):
    def level_values(self):
        return None


class OtherShape(LSQQuantizer):
    def forward(self, x):
        y = super().forward(x)
        return y[1:] if self.training else y


class Descends(LSQQuantizer):
    def level_values(self):
        return super().level_values().flip(-1)


class FollowsSilently(LSQQuantizer):
    def forward(self, x):
        if self.training:
            self.scale.data.copy_(self.layout.rows(x.detach()).abs().amax(1) / self.codes.hi)
        return super().forward(x)


def test_half_precision_is_for_those_who_ask_for_it():
    class Asks(OffLevels):
        takes_half = True

        def fake_quantize(self, x, scale, gradient_scale):
            return x

    assert LSQQuantizer.takes_half
    assert OffLevels.takes_half  # quantizes as LSQ
    assert not TrainsElsewhere.takes_half
    assert Asks.takes_half


def broken(kind, inputs=LSQQuantizer):
    def build(of):
        return lambda spec, codes, **common: of(codes, **common)

    return Method(build(kind), build(inputs), "broken")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (broken(OffLevels), "hard values must be among level_values"),
        (broken(WrongCodes), "codes must give back hard values"),
        (broken(Spread), r"codes must lie in \(-3, 3\), got -300..300"),
        (broken(DrawnToZero), "the regularizer must have the gradient"),
        (broken(Optimistic), "must have the loss of hard values"),
        (broken(Unranked), "must give back codes"),
        (broken(NoGradient), "scale must have a gradient"),
        (broken(Infinite), "the gradient of scale must be finite"),
        (broken(OtherType), "must come back as it was"),
        (broken(Forgets), "training must see the hard values"),
        (broken(Unsettled), "levels must be their own hard values"),
        (broken(LSQQuantizer, NoZero), "zero must stay zero"),
        (broken(LSQQuantizer, OtherType), "must come back as it was"),
        (broken(Wider), "codes must fit in 3 bits"),
        (broken(Detached), "what training sees must have a gradient"),
        (broken(WithoutLevels), "'broken' must come through the check of its levels, got AttributeError"),
        (broken(LSQQuantizer, WithoutLevels), "must come through the check of its activations, got AttributeError"),
        (broken(LSQQuantizer, Descends), "of activations must ascend"),
        (broken(OtherShape), "must have the shape|come through the check of its training"),
        (broken(FollowsSilently), "levels must not move with weights in training, or follows_weights say so"),
        (broken(KeepsWidth), "a layer that changes to 2 bits must be as one of them"),
        (broken(LSQQuantizer, KeepsWidth), "a layer that changes to 2 bits must be as one of them"),
        *(
            (broken(*kinds), message)
            for kind, message in (
                (NegatedGradient, "the gradient of the input must be .*, got -"),
                (SteepGradient, "the gradient of the input must be .*, got [89]"),
                (TrainsElsewhere, "training must see the hard values"),
                (TrainsOnOtherLevels, "training must see the hard values"),
                (Uncalibrated, "must bring levels to the size of the data"),
                (Bounded, "its state must have the same hard values"),
                (ChangesInput, "what is quantized must stay as it is"),
            )
            for kinds in ((kind,), (LSQQuantizer, kind))
        ),
    ],
)
def test_what_is_broken_is_named(monkeypatch, method, message):
    monkeypatch.setitem(REGISTRY, "broken", method)
    with pytest.raises(AssertionError, match=message):
        check_quantizer(LayerSpec(quantizer="broken", bits=3))


class Points(CodebookQuantizer):
    """As another package may have them: registered under a name of its own."""


def test_points_of_another_package_change_their_width(monkeypatch):
    method = Method(
        lambda spec, codes, **common: Points(spec.bits, **common), broken(LSQQuantizer).activation, "points"
    )
    monkeypatch.setitem(REGISTRY, "points", method)
    check_quantizer(LayerSpec(quantizer="points", bits=3))
    module = Plain(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 4)))
    fit(module, [lq.LearnedQuantization(bits=3, quantizer="points"), lq.ProgressiveBits([8, 4])], max_epochs=3)
    quantizer = module.net[1].weight_quantizer
    assert (quantizer.codes.bits, quantizer.points.shape) == (3, (4,))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that offers a method by an entry point, and something else by another."""
    (tmp_path / "offered.py").write_text(
        "from lq.quantizers import LSQQuantizer, Method\n"
        "def build(spec, codes, **common): return LSQQuantizer(codes, **common)\n"
        "METHOD = Method(build, build, 'like lsq', source='someone')\n"
    )
    info = tmp_path / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lq.quantizers]\nmine = offered:METHOD\nwrong = offered:build\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    REGISTRY.pop("mine", None)
    sys.modules.pop("offered", None)


def test_a_method_of_another_package_is_found_and_passes_the_checks(package):
    assert method_names()[-2:] == ["mine", "wrong"]
    check_quantizer(LayerSpec(quantizer="mine", bits=3))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    lq.quantize_model(model, lq.QuantSpec(quantizer="mine"))
    assert isinstance(model[1].weight_quantizer, LSQQuantizer)
    with pytest.raises(ValueError, match=r"entry point 'wrong' of lq.quantizers must name a lq.quantizers.Method"):
        find_method("wrong")
    with pytest.raises(ValueError, match=r"quantizer must be one of .*'mine', 'wrong'.*got 'absent'"):
        find_method("absent")
    with pytest.raises(ValueError, match=r"quantizer must be one of .*got \['lsq'\]"):
        find_method(["lsq"])


def test_names_are_listed_once_and_our_own_stay_ours(package):
    find_method("mine")
    with pytest.raises(ValueError, match="got 'absent'") as caught:
        find_method("absent")
    assert str(caught.value).count("'mine'") == 1
    (package / "offered-1.0.dist-info" / "entry_points.txt").write_text("[lq.quantizers]\nlsq = offered:METHOD\n")
    with pytest.warns(UserWarning, match=r"entry point 'lsq' of lq.quantizers \(offered:METHOD\) is ignored"):
        assert method_names().count("lsq") == 1
    assert find_method("lsq").source.startswith("Esser")


def test_widths_that_a_method_lacks_are_refused(monkeypatch):
    method = Method(REGISTRY["lsq"].weight, REGISTRY["lsq"].activation, "of few bits", bits=(3, 4))
    monkeypatch.setitem(REGISTRY, "few", method)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    ends = {"*": {"quantizer": "lsq"}, "1": {"quantizer": "few"}}
    lq.quantize_model(model, lq.QuantSpec(bits=3, quantizer="few", overrides=ends))
    for spec, got in ((lq.QuantSpec(bits=2, quantizer="few", overrides=ends), 2), (lq.QuantSpec(quantizer="few"), 8)):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        with pytest.raises(ValueError, match=f"bits must lie from 3 to 4 for few, got {got}: choose another width"):
            lq.quantize_model(model, spec)


def test_a_package_that_is_broken_does_not_hide_the_others(package):
    text = table()
    assert "cannot be loaded: ValueError" in next(line for line in text.splitlines() if line.startswith("wrong"))
    entries = package / "offered-1.0.dist-info" / "entry_points.txt"
    entries.write_text("[lq.quantizers]\nmine = offered:METHOD\nlost = offered:LOST\n")
    with pytest.raises(ValueError, match=r"'lost' .* got 'offered:LOST', which cannot be loaded \(AttributeError"):
        find_method("lost")
    assert "like lsq" in text


def test_the_command_shows_what_one_heeds(tmp_path):
    done = command("quantizers", "pact", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fields = [
        line.split()[0] for line in done.stdout.split("Fields that it heeds:")[1].splitlines() if line[2:3].strip()
    ]
    assert fields == [
        *("bits", "activation_bits", "activation", "levels", "grid"),
        "granularity",
        "scale_init",
        "normalize",
    ]
    unknown = command("quantizers", "pakt", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "got 'pakt': choose one of those" in unknown.stderr


def test_the_command_says_that_a_package_cannot_be_loaded(monkeypatch, capsys):
    def find(name):
        raise ImportError("no module named 'theirs'")

    monkeypatch.setattr("lq.cli.quantizers.find_method", find)
    with pytest.raises(SystemExit) as end:
        main(["theirs"])
    assert end.value.code == 2
    assert "theirs cannot be loaded: ImportError: no module named 'theirs'" in capsys.readouterr().err


def test_a_package_says_what_its_method_heeds_or_that_it_does_not_say(package):
    assert "It does not say which other fields it heeds." in details("mine")
    assert "forward" not in details("mine")
    with pytest.raises(ValueError, match="options of a Method must be one of"):
        Method(None, None, "wrong", options=("fordward",))


def test_the_command_lists_them_all(tmp_path):
    done = command("quantizers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, method in REGISTRY.items():
        (line,) = [row for row in done.stdout.splitlines() if row.split()[0] == name]
        assert method.summary in line
        assert method.learned in line
        assert line.rstrip().endswith(method.source)
