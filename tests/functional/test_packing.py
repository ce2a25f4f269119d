import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lq.functional.packing import pack, packed_bytes, unpack


@given(st.integers(1, 8), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_packing_is_the_stream_of_bits_and_comes_back(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count)
    stream = [(int(code) >> bit) & 1 for code in codes for bit in range(bits)]
    expected = np.packbits(np.array(stream, dtype=np.uint8), bitorder="little")
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.tolist() == expected.tolist()
    assert packed.numel() == packed_bytes(count, bits)
    assert unpack(packed, bits, count).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", range(1, 9))
def test_many_codes_of_any_shape_and_stride(bits):
    codes = torch.randint(0, 2**bits, (3, 7, 40_003), dtype=torch.uint8)[:, ::2]
    assert torch.equal(unpack(pack(codes, bits), bits, codes.numel()).reshape(codes.shape), codes)
    part = codes.reshape(-1)[3:]
    assert torch.equal(unpack(pack(part, bits), bits, part.numel()), part)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_may_lie_anywhere_in_memory(bits):
    codes = torch.arange(64).remainder(1 << bits).to(torch.uint8)
    packed = pack(codes, bits)
    for start in range(1, 4):
        moved = torch.cat([packed.new_zeros(start), packed])[start:]
        assert torch.equal(unpack(moved, bits, 64), codes)
        assert torch.equal(pack(torch.cat([codes.new_zeros(start), codes])[start:], bits), packed)


def test_codes_that_do_not_fit_and_bytes_that_are_not_theirs_are_refused():
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.7 for 3 bits, got 0\.\.8"):
        pack(torch.tensor([0, 8]), 3)
    with pytest.raises(ValueError, match="codes must lie in"):
        pack(torch.tensor([-1]), 3)
    with pytest.raises(ValueError, match="packed must be 2 bytes for 3 codes of 3 bits"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 3)
    with pytest.raises(ValueError, match="bits must be from 1 to 8, got 9"):
        pack(torch.tensor([0]), 9)
