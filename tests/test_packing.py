"""Packing: what goes in comes out, in exactly b bits per code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdm.errors import QuantDMError
from quantdm.quantizers import pack_codes, packed_size, unpack_codes

ALL_BITS = range(2, 9)


def random_codes(count: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=generator)


@settings(deadline=None, max_examples=80)
@given(bits=st.integers(2, 8), data=st.data())
def test_codes_survive_packing(bits: int, data: st.DataObject) -> None:
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=90)), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.numel() == packed_size(codes.numel(), bits)
    assert torch.equal(unpack_codes(packed, bits, codes.numel()), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, 4096])
def test_packed_size_is_b_bits_per_code_and_less_than_8_bytes_of_padding(bits: int, count: int) -> None:
    padding = 8 * pack_codes(random_codes(count, bits), bits).numel() - bits * count
    assert 0 <= padding < 64


@pytest.mark.parametrize("bits", ALL_BITS)
def test_extreme_codes_survive(bits: int) -> None:
    for code in (0, 2**bits - 1):
        codes = torch.full((37,), code, dtype=torch.uint8)
        assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 37), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_decodes_into_the_given_buffer_and_no_further(bits: int) -> None:
    codes = random_codes(101, bits)
    buffer = torch.full((130,), 255, dtype=torch.uint8)
    out = buffer[:101]
    assert unpack_codes(pack_codes(codes, bits), bits, 101, out=out) is out
    assert torch.equal(out, codes)
    assert (buffer[101:] == 255).all()


def test_the_layout_is_planar() -> None:
    codes = random_codes(64, 3)
    packed = pack_codes(codes, 3)
    low = torch.cat([(packed[:16] >> (2 * s)) & 3 for s in range(4)])  # field s of the 2-bit plane: a contiguous slice
    high = torch.cat([(packed[16:] >> s) & 1 for s in range(8)])
    assert torch.equal(low | (high << 2), codes)


@pytest.mark.parametrize("bits", [1, 9])
def test_refuses_other_widths(bits: int) -> None:
    with pytest.raises(QuantDMError, match="expected 2 to 8"):
        pack_codes(random_codes(8, 2), bits)


def test_refuses_codes_that_do_not_fit() -> None:
    with pytest.raises(QuantDMError, match="code of 9, expected at most 7"):
        pack_codes(torch.tensor([1, 9], dtype=torch.uint8), 3)
    with pytest.raises(QuantDMError, match=r"expected flat torch\.uint8"):
        pack_codes(torch.zeros(8), 3)


def test_refuses_buffers_that_do_not_fit() -> None:
    packed = pack_codes(random_codes(20, 4), 4)
    with pytest.raises(QuantDMError, match=r"got 12 bytes, expected 16"):
        unpack_codes(packed, 4, 30)
    with pytest.raises(QuantDMError, match="out: got"):
        unpack_codes(packed, 4, 20, out=torch.zeros(21, dtype=torch.uint8))
    with pytest.raises(QuantDMError, match="out: got"):
        unpack_codes(packed, 4, 20, out=torch.zeros(40, dtype=torch.uint8)[::2])
