"""Counts equal an independent computation, sums are within bounds, and TORQ does what it says."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mxtorq.errors import FormatError, ModelError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.inspection.measures import Lengths, Measure, picture
from mxtorq.models.family import SiteName
from mxtorq.reports.inspection import Picture
from mxtorq.surgery.outliers import channel_factors, profile_called
from mxtorq.transforms import TORQ, Hadamard
from mxtorq.transforms.base import SiteStatistics, Transform

MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def awkward(rows: int = 200, width: int = 96) -> torch.Tensor:
    """Loud channels, ties, zeros of both signs, blocks of zeros, tiny and huge blocks."""
    draw = torch.Generator().manual_seed(3)
    values = torch.randn(rows, width, generator=draw)
    values[:, 40] *= 60
    values[::3] = (values[::3] * 8).round() / 8  # many of them on a cut between two codes
    values[5, :32] = 0.0
    values[6, 32:64] = -0.0
    values[7] *= 2.0**-140
    values[8] *= 2.0**100
    return values


def by_definition(values: NDArray[np.float32]) -> dict[str, object]:
    """OCP's floor rule and nearest codes, ties to even, in exact float64 arithmetic."""
    blocks = values.astype(np.float64).reshape(len(values), -1, 32)
    amax = np.abs(blocks).max(-1)
    exponent = np.where(amax > 0, np.frexp(amax)[1] - 1 - 2, -127).clip(-127, 127)
    scaled = np.abs(blocks) / np.exp2(exponent.astype(np.float64))[..., None]
    distance = np.abs(np.minimum(scaled, 6.0)[..., None] - MAGNITUDES)
    nearest = distance.min(-1, keepdims=True)
    # Of two codes at the same distance the even one.
    odd = np.arange(8) % 2
    code = np.where(distance == nearest, odd, 2).argmin(-1)
    rounded = MAGNITUDES[code] * np.exp2(exponent.astype(np.float64))[..., None]
    code = code + 8 * np.signbit(blocks)
    square = blocks**2
    return {
        "codes": [int((code == each).sum()) for each in range(16)],
        "cut": int((scaled > 6).sum()),
        "scales": {str(e): int((exponent == e).sum()) for e in np.unique(exponent).tolist()},
        "blocks": square.mean((0, 2)),
        "positions": square.mean((0, 1)),
        "channels": square.sum(0).reshape(-1) / square.sum(),
        "error": ((np.abs(blocks) - rounded) ** 2).sum() / square.sum(),
    }


def test_everything_equals_its_definition() -> None:
    values = awkward()
    found, expected = picture(values), by_definition(values.numpy())
    assert found.rows == 200
    assert found.code_counts == expected["codes"]
    assert found.cut == expected["cut"]
    assert found.scale_exponents == expected["scales"]
    # Sums of at most 200 * 96 positive float64 numbers, in any order, on both sides.
    bound = 2 * 200 * 96 * np.finfo(np.float64).eps
    np.testing.assert_allclose(found.block_variances, expected["blocks"], rtol=bound)
    np.testing.assert_allclose(found.position_variances, expected["positions"], rtol=bound)
    assert math.isclose(found.relative_error, float(expected["error"]), rel_tol=bound)  # type: ignore[arg-type]
    shares = np.asarray(expected["channels"])
    assert [each.index for each in found.worst_channels] == np.argsort(-shares)[:8].tolist()
    for each in found.worst_channels:
        assert math.isclose(each.share, shares[each.index], rel_tol=bound)


def test_figures_are_made_of_counts() -> None:
    values = awkward()
    found, expected = picture(values), by_definition(values.numpy())
    codes = np.array(expected["codes"], dtype=np.float64)
    words = np.array([codes[0] + codes[8], *codes[1:8], *codes[9:]]) / codes.sum()
    assert len(words) == len(found.codeword_counts) == 15
    entropy = -(words[words > 0] * np.log2(words[words > 0])).sum()
    assert math.isclose(found.entropy, entropy, rel_tol=15 * np.finfo(np.float64).eps)
    assert found.zero_share == (codes[0] + codes[8]) / codes.sum()
    assert found.cut_share == found.cut / values.numel()
    variances = np.asarray(expected["blocks"])
    bound = 2 * 200 * 96 * np.finfo(np.float64).eps
    assert math.isclose(found.max_over_mean, variances.max() / variances.mean(), rel_tol=bound)
    assert math.isclose(
        found.max_over_median, variances.max() / np.median(variances), rel_tol=bound
    )
    # Values of E2M1 in their order, -6 to 6, for pictures.
    assert found.codeword_counts[0] == found.code_counts[15]
    assert found.codeword_counts[7] == found.code_counts[0] + found.code_counts[8]
    assert found.codeword_counts[14] == found.code_counts[7]


def test_edges_of_the_figures() -> None:
    zeros = picture(torch.zeros(2, 64))
    assert (zeros.entropy, zeros.zero_share, zeros.relative_error) == (0.0, 1.0, 0.0)
    assert (zeros.max_over_mean, zeros.max_over_median, zeros.sqnr) == (1.0, 1.0, math.inf)
    assert zeros.scale_exponents == {"-127": 4}
    even = torch.tensor([*MAGNITUDES[1:], *-MAGNITUDES[1:], 0.0]).float()
    whole = torch.cat([even, even, torch.tensor([6.0, -6.0])])[None]  # amax 6: scale 1, exact
    assert picture(whole).sqnr == math.inf
    shares = np.array([2] * 12 + [2] + [3, 3]) / 32
    assert math.isclose(picture(whole).entropy, -(shares * np.log2(shares)).sum(), rel_tol=1e-14)
    lonely = torch.zeros(1, 96)
    lonely[0, 0] = 1.0
    assert picture(lonely).max_over_median == math.inf


@pytest.mark.parametrize("rule", list(ScaleRule))
def test_cut_values_are_those_that_the_rule_lets_out(rule: ScaleRule) -> None:
    found = picture(awkward(), rule)
    never = rule in (ScaleRule.RCEIL, ScaleRule.CEIL)
    assert (found.cut == 0) is never
    assert sum(found.scale_exponents.values()) == 200 * 3


def test_parts_give_what_the_whole_gives() -> None:
    values = awkward()
    measure = Measure(96)
    for part in values.view(10, 20, 96).split(3):
        measure.add(part)
    parts, whole = measure.finish(), picture(values)
    exact = ("rows", "code_counts", "cut", "scale_exponents")
    assert all(getattr(parts, name) == getattr(whole, name) for name in exact)
    np.testing.assert_allclose(
        parts.block_variances, whole.block_variances, rtol=200 * 96 * np.finfo(np.float64).eps
    )


def test_what_has_no_picture_is_refused() -> None:
    with pytest.raises(FormatError, match="blocks of 32"):
        picture(torch.ones(4, 40))
    with pytest.raises(ModelError, match="NaN or Inf in 1 blocks") as caught:
        picture(
            torch.ones(4, 64)
            .index_fill(0, torch.tensor([2]), 1.0)
            .put_(torch.tensor([70]), torch.tensor([math.inf]))
        )
    assert caught.value.todo


def test_long_rows_are_found_across_parts() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(101, 32, generator=draw)
    rows[77] *= 50
    rows[12] *= 9
    lengths = Lengths()
    for part in rows.split(40):
        lengths.add(part)
    found = lengths.longest(2)
    assert [row.index for row in found] == [77, 12]
    norms = np.linalg.norm(rows.numpy().astype(np.float64), axis=1)
    # A float32 sum of 32 squares and its root; the median is one of them.
    bound = 2 * 40 * np.finfo(np.float32).eps
    assert math.isclose(found[0].ratio, norms[77] / np.median(norms), rel_tol=bound)
    zero = Lengths()
    zero.add(torch.zeros(5, 32))
    assert zero.longest() == []


def shaped(channels: torch.Tensor) -> torch.Tensor:
    """Activations whose channels have these root mean squares, with tails heavier than normal."""
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(1536, len(channels), generator=draw)
    return plain * plain.abs().sqrt() * channels


def packaged() -> torch.Tensor:
    """The packaged profile of Qwen3-0.6B at its own width, channels shuffled."""
    factors = channel_factors(profile_called("qwen3-0.6b"), 0.5, SiteName.QKV_IN, 1024)
    return shaped(factors[torch.randperm(1024, generator=torch.Generator().manual_seed(1))])


def fitted(values: torch.Tensor, method: TORQ | Hadamard) -> Transform:
    exact = values.double()
    return method.fit(
        SiteStatistics(
            site="s",
            name=SiteName.QKV_IN,
            tokens=len(values),
            second_moment=exact.T @ exact / len(values),
            amax=values.abs().amax(0),
            sample=values[:512],
            weights=(),
        ),
        0,
    )


def check_torq(values: torch.Tensor) -> tuple[Picture, Picture]:
    before = picture(values)
    after = picture(fitted(values, TORQ(rounds=2)).apply(values))
    blocks = values.shape[1] // 32
    # The chain makes every block's mean square equal to 1e-13. Applied in float32, each of B - 1
    # rotations of pairs errs by at most 3 u of a row's length, and 32 products of 32 terms each by
    # 32 * sqrt(32) u; by Cauchy and Schwarz a block of 1 / B of the energy then errs by at most
    # 2 e sqrt(B) + e^2 B of its own.
    error = (3 * (blocks - 1) + 32 * math.sqrt(32)) * 2.0**-24
    bound = 2 * error * math.sqrt(blocks) + error**2 * blocks
    assert after.max_over_mean <= (1 + bound) / (1 - bound)
    assert before.max_over_mean > 2
    assert after.entropy > before.entropy
    assert after.zero_share < before.zero_share
    assert after.relative_error < before.relative_error
    return before, after


def test_torq_equalises_blocks_and_raises_entropy_on_a_real_profile() -> None:
    check_torq(packaged())


def test_torq_on_measured_channels(data: Path) -> None:
    """The mean squares that were measured at a qkv input of Qwen3-0.6B, in their real order."""
    measured = np.load(data / "actstats" / "qwen3-0.6b.meansq.npz")
    check_torq(shaped(torch.from_numpy(measured["model.layers.13.self_attn.q_proj"]).sqrt()))


def test_a_rotation_within_blocks_leaves_their_variances() -> None:
    """The control: Hadamard evens the codes and moves no energy between blocks."""
    values = packaged()
    before = picture(values)
    after = picture(fitted(values, Hadamard()).apply(values))
    # Of orthogonal maps in float32: 32 products of 32 terms, as above without the other blocks.
    bound = 3 * 32 * math.sqrt(32) * 2.0**-24
    np.testing.assert_allclose(after.block_variances, before.block_variances, rtol=bound)
    assert after.entropy > before.entropy
