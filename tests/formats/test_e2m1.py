"""Elements: sixteen codes, two a byte, and every finite bfloat16 under several scales.

Two witnesses: exact fractions, and ml_dtypes' float4_e2m1fn, written by other hands.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

from mxtorq.formats import e2m1, e8m0

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ALL_CODES = torch.arange(16, dtype=torch.uint8)


def bits(values):
    return values.view(torch.int32).tolist()


def finite_bfloat16():
    values = torch.arange(65536).to(torch.int16).view(torch.bfloat16).float()
    return values[values.isfinite()]


def test_the_sixteen_values():
    values = e2m1.decode(ALL_CODES)
    assert values.dtype == torch.float32
    # By bits: the value of code 8 is -0.0, and == would not see it.
    assert bits(values) == bits(torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)]))


def test_ml_dtypes_knows_the_same_sixteen_values():
    witness = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert bits(e2m1.decode(ALL_CODES)) == bits(torch.from_numpy(witness))


def test_encode_inverts_decode():
    assert torch.equal(e2m1.encode(e2m1.decode(ALL_CODES)), ALL_CODES)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.25, 0),
        (0.75, 2),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (5.0, 6),
    ],
)
def test_ties_go_to_the_even_code_and_their_neighbours_to_the_nearest(value, code):
    tie = torch.tensor([value])
    below, above = (torch.nextafter(tie, torch.tensor([end])) for end in (0.0, 9.0))
    codes = e2m1.encode(torch.cat([below, tie, above])).tolist()
    lower = code if value > MAGNITUDES[code] else code - 1
    assert codes == [lower, code, lower + 1]
    assert e2m1.encode(-torch.cat([below, tie, above])).tolist() == [c + 8 for c in codes]


def test_saturation():
    large = torch.tensor([6.0, 6.5, 8.0, 1e30, 3.4e38, float("inf")])
    assert e2m1.encode(large).tolist() == [7] * 6
    assert e2m1.encode(-large).tolist() == [15] * 6


def test_the_sign_is_always_kept():
    values = torch.tensor([0.0, 0.01, 2.0**-149, -0.0, -0.01, -(2.0**-149), -0.25])
    assert e2m1.encode(values).tolist() == [0, 0, 0, 8, 8, 8, 8]


def test_nan_has_no_code_and_does_not_pass_for_a_small_number():
    """Blocks with NaN are marked by their scale; the element alone saturates."""
    nans = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF], dtype=torch.int32)
    values = torch.cat([nans, nans | -(1 << 31)]).view(torch.float32)
    assert e2m1.encode(values).tolist() == [7, 7, 7, 15, 15, 15]


@pytest.mark.parametrize("byte", [0, 126, 127, 128, 253])
def test_every_finite_bfloat16(exact, byte):
    """The product with the inverse scale overflows and underflows at the ends; no code may care."""
    values = finite_bfloat16()
    assert values.numel() == 65280
    inverse = e8m0.decode_inverse(torch.tensor(byte, dtype=torch.uint8))
    codes = e2m1.encode(values * inverse)
    assert codes.dtype == torch.uint8
    for value, code in zip(values.tolist(), codes.tolist(), strict=True):
        assert code == exact.element_code(value, byte), f"{value!r} under byte {byte}"


def test_every_finite_bfloat16_as_ml_dtypes():
    values = finite_bfloat16()
    witness = values.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert torch.equal(e2m1.encode(values), torch.from_numpy(witness))


def test_float32_next_to_every_cut(exact):
    """Several ulps around each cut and each value, both signs."""
    centres = torch.tensor([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6])
    near = centres.view(torch.int32)[:, None] + torch.arange(-4, 5, dtype=torch.int32)
    values = near.flatten().view(torch.float32)
    values = torch.cat([values, -values])
    codes = e2m1.encode(values).tolist()
    assert codes == [exact.element_code(v, 127) for v in values.tolist()]


def test_the_even_element_has_the_low_nibble():
    codes = e2m1.encode(torch.tensor([0.5, -6.0]))
    assert codes.tolist() == [1, 15]
    assert e2m1.pack(codes).tolist() == [0xF1]


def test_unpack_then_pack_gives_every_byte_back():
    every = torch.arange(256, dtype=torch.uint8)
    codes = e2m1.unpack(every)
    assert codes.tolist() == [nibble for b in range(256) for nibble in (b % 16, b // 16)]
    packed = e2m1.pack(codes)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, every)


def test_pack_then_unpack_keeps_rows_apart():
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(16, (3, 5, 32), dtype=torch.uint8, generator=generator)
    packed = e2m1.pack(codes)
    assert packed.shape == (3, 5, 16)
    assert torch.equal(e2m1.unpack(packed), codes)
    assert torch.equal(e2m1.pack(codes[1, 2]), packed[1, 2])
