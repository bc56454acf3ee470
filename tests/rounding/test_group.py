"""GPTQ's group step against scalars of NumPy's float32: every operation rounded by itself."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from mxtorq.errors import UsageError
from mxtorq.formats import reference
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.rounding.group import fix_group_

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest(multiple: np.float32) -> int:
    """The code of a number under the scale 1."""
    return reference.element_code(float(multiple), 127)


def scalar_by_scalar(
    columns: np.ndarray, follow: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values; numpy float32 scalars round after every operation."""
    codes, values = np.zeros(columns.shape, np.uint8), np.zeros_like(columns)
    for row in range(columns.shape[1]):
        w = columns[:, row].copy()
        for j in range(32):
            s = scales[j, row]
            code = nearest(w[j] / s)
            value = np.float32(MAGNITUDES[code & 7] * (-1 if code & 8 else 1)) * s
            error = w[j] - value
            codes[j, row], values[j, row] = code, value
            for k in range(j + 1, 32):
                part = follow[j, k] * error
                w[k] = w[k] - part
    return codes, values


def group(rows: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    columns = torch.randn(32, rows, generator=draw)
    columns[:, 3], columns[4] = 0.0, -0.0
    follow = 0.4 * torch.randn(32, 32, generator=draw).triu()
    return columns, follow, 0.3 + torch.rand(1, rows, generator=draw)


@pytest.mark.parametrize("rule", [*ScaleRule, None])
def test_it_is_scalar_by_scalar(rule: ScaleRule | None) -> None:
    columns, follow, scales = group()
    if rule is not None:
        peaks = columns.abs().amax(0).tolist()
        powers = [2.0 ** (reference.scale_byte(peak, rule) - 127) for peak in peaks]
        expected_scales = torch.tensor([powers], dtype=torch.float32)
    else:
        expected_scales = scales.clone()
    for_each = expected_scales.repeat(32, 1).numpy()
    codes, values = scalar_by_scalar(columns.numpy(), follow.numpy(), for_each)
    found = fix_group_(columns, follow, scales, [0] * 32, rule, "eager")
    assert torch.equal(scales, expected_scales)
    assert np.array_equal(found.numpy(), codes)
    assert np.array_equal(columns.numpy(), values)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_no_product_is_fused_with_its_difference(backend: str) -> None:
    """Column 1 ends on the cut at a quarter, a tie that becomes 0; rounded once, it would lie
    beside the cut, and on its upper side half of the time."""
    draw = torch.Generator().manual_seed(2)
    columns, follow = torch.zeros(32, 100), torch.zeros(32, 32)
    columns[0] = 12 + 4 * torch.rand(100, generator=draw)  # cut to 6
    follow[0, 1] = 1.37
    part = follow[0, 1] * (columns[0] - 6)
    columns[1] = part + 0.25
    assert torch.equal(columns[1].double(), part.double() + 0.25)
    exact = [Fraction(error) * Fraction(float(follow[0, 1])) for error in (columns[0] - 6).tolist()]
    above = [
        product < Fraction(float(rounded)) for product, rounded in zip(exact, part, strict=True)
    ]
    assert 0 < sum(above) < 100
    codes = fix_group_(columns, follow, torch.ones(1, 100), [0] * 32, None, backend)
    assert not codes[1].any()


def test_each_column_has_the_scale_of_its_group() -> None:
    """Three groups in turns, as an order of columns by size may have them."""
    columns, follow, _ = group()
    scales = torch.tensor([[0.25], [1.1], [3.0]]).repeat(1, columns.shape[1])
    groups = [j % 3 for j in range(32)]
    codes, values = scalar_by_scalar(columns.numpy(), follow.numpy(), scales[groups].numpy())
    found = fix_group_(columns, follow, scales, groups, None, "eager")
    assert np.array_equal(found.numpy(), codes)
    assert np.array_equal(columns.numpy(), values)


def test_a_backend_that_there_is_not_is_refused() -> None:
    columns, follow, scales = group()
    with pytest.raises(UsageError, match="eager, numba, triton"):
        fix_group_(columns, follow, scales, [0] * 32, None, "fast")
