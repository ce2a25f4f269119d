import shutil
import subprocess

import pytest
import torch
from torch import nn

import lq
from lq.exporting.c import CProgram, c_source, write_c
from lq.exporting.c.memory import Buffer, place
from lq.models import MobileNetV1, create_model
from tests.exporting.test_integer import SHAPE, SPECS
from tests.helpers.modules import SmallResidual, small_cnn
from tests.helpers.quantized import quantized

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
TYPES = {"int8_t": torch.int8, "uint8_t": torch.uint8, "int16_t": torch.int16}


def run_c(network, codes, folder, sanitize=False):
    """Compile and run, for this processor and for any: the logits, and what it said of itself."""
    source = write_c(network, folder / "net.c")
    build = ["gcc", "-O1" if sanitize else "-O2", "-std=c99", "-Wall", "-Wextra", "-Werror"]
    build += ["-fsanitize=address,undefined", "-fno-sanitize=shift-base"] if sanitize else []
    (folder / "images.bin").write_bytes(codes.to(TYPES[source.input_type]).numpy().tobytes())
    logits = []
    for flags in (["-DLQ_PORTABLE"], []):
        command = [*build, *flags, str(folder / "net.c"), "-o", str(folder / "net")]
        subprocess.run(command, check=True, capture_output=True)
        done = subprocess.run([folder / "net", folder / "images.bin"], check=True, capture_output=True, text=True)
        logits.append(torch.tensor([[int(v) for v in line.split()] for line in done.stdout.splitlines()]))
    assert torch.equal(*logits)
    return logits[0], done.stderr, source


@pytest.mark.parametrize("spec", SPECS)
def test_a_program_is_a_function_of_images(tmp_path, spec):
    network = lq.IntegerNetwork(quantized(SmallResidual(), SHAPE, **SPECS[spec]), SHAPE)
    write_c(network, tmp_path / "net.c")
    program, x = CProgram(tmp_path / "net.c"), torch.randn(3, *SHAPE)
    assert torch.equal(program.encode(x).int(), network.encode(x))
    assert torch.equal(program(x), network(x))
    assert program.shape == SHAPE
    assert program(x[:0]).shape == (0, network(x).shape[1])
    with pytest.raises(ValueError, match="codes must have shape"):
        program(torch.zeros(1, 3, 5, 5))
    assert torch.equal(CProgram(program.program)(x), network(x))  # one that is compiled already


def test_programs_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CProgram(tmp_path / "none.c")
    (tmp_path / "broken.c").write_text("int main(void) { return }")
    with pytest.raises(ValueError, match="does not compile"):
        CProgram(tmp_path / "broken.c")
    (tmp_path / "other.c").write_text('#include <stdio.h>\nint main(void) { puts("{}"); return 0; }')
    with pytest.raises(ValueError, match="made by lq export target=c"):
        CProgram(tmp_path / "other.c")
    with pytest.raises(FileNotFoundError, match="install a C compiler"):
        CProgram(tmp_path / "other.c", compiler="no-such-compiler")


@pytest.mark.parametrize("spec", SPECS)
def test_c_computes_what_the_integer_engine_computes(tmp_path, spec):
    network = lq.IntegerNetwork(quantized(SmallResidual(), SHAPE, **SPECS[spec]), SHAPE)
    codes = network.encode(torch.randn(5, *SHAPE))
    logits, said, source = run_c(network, codes, tmp_path, spec == "subset, inputs too")
    assert torch.equal(logits, network.run(codes))
    assert f"flash {source.flash_bytes} bytes of constants, ram {source.ram_bytes} bytes" in said


NETWORKS = {
    "sequential, grouped and dilated": (small_cnn, SHAPE),
    "residual with zero channels": (lambda: create_model("cifar_resnet8"), (3, 16, 16)),
    "depthwise, same padding": (lambda: MobileNetV1(0.25, num_classes=3), (3, 32, 32)),
}


class Pooled(nn.Module):
    """A pool whose result is added to what it still reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1), nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        x = self.first(x)
        return self.second(self.pool(x) + x).flatten(1)


def strided():
    """Every stride that kernels tell apart, numbers of channels and taps that no block divides, odd widths."""
    layers = [nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 10, 3, 2, 2), nn.ReLU()]
    layers += [nn.Conv2d(10, 10, 3, (1, 2), 1, groups=2), nn.Conv2d(10, 5, 3, 3, 2), nn.Conv2d(5, 6, (1, 3), (2, 1))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3))


NETWORKS["a pool added to its input"] = (Pooled, (3, 8, 8))
NETWORKS["strided"] = (strided, (3, 23, 29))
KINDS = {
    "points": {"bits": 3, "quantizer": "subset", "granularity": "channel"},
    "8 bits": {"bits": 8},
    "without a zero": {"bits": 2, "grid": "mid_rise", "activation": "signed"},
    "wide inputs": {"bits": 3, "activation_bits": 8, "activation": "signed", "first_last_bits": None},
}


CASES = [(name, "points") for name in NETWORKS] + [("strided", kind) for kind in KINDS if kind != "points"]


@pytest.mark.parametrize(("name", "kind"), [*CASES, ("depthwise, same padding", "8 bits")])
def test_networks_of_all_kinds(tmp_path, name, kind):
    make, shape = NETWORKS[name]
    network = lq.IntegerNetwork(quantized(make(), shape, **KINDS[kind]), shape)
    codes = network.encode(torch.randn(2, *shape))
    assert torch.equal(
        run_c(network, codes, tmp_path, sanitize=name == "strided" and kind in ("points", "wide inputs"))[0],
        network.run(codes),
    )


def test_many_large_inputs_on_one_shifter(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 600, 1), nn.ReLU(), nn.Conv2d(600, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(0.5)
    spec = {"bits": 3, "quantizer": "subset", "activation_bits": 8, "first_last_bits": None}
    network = lq.IntegerNetwork(quantized(model, (1, 2, 2), **spec), (1, 2, 2))
    codes = network.encode(torch.full((1, 1, 2, 2), 9.0))
    assert torch.equal(run_c(network, codes, tmp_path)[0], network.run(codes))


def test_the_hot_path_has_no_floating_point_and_no_allocation():
    network = lq.IntegerNetwork(quantized(SmallResidual(), SHAPE, bits=4), SHAPE)
    text = c_source(network).text
    for word in ("float", "double", "malloc", "calloc"):
        assert word not in text.split("#ifndef LQ_NO_MAIN")[0]


def test_buffers_that_live_together_do_not_overlap():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(1, 200, (60, 3), generator=generator).tolist()
    buffers = [Buffer(size, first, first + length % 9) for size, first, length in draws]
    total = place(buffers)
    for i, a in enumerate(buffers):
        assert a.start + a.size <= total
        for b in buffers[:i]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or a.start + a.size <= b.start or b.start + b.size <= a.start
