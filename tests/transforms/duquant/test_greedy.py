"""DuQuant's greedy search: the base matrix, and the pruned search beside the obvious one."""

import math

import numpy as np
import pytest
import torch

import oracles
from mxtorq.transforms.duquant.greedy import (
    Index,
    exchange,
    greedy_rotation,
    random_base,
    sums_of_products,
    tie_width,
    uniform_base,
)

EPS = torch.finfo(torch.float64).eps


def slow_search(
    rows: torch.Tensor, base: torch.Tensor, steps: int, index: Index
) -> tuple[torch.Tensor, list[int], list[float]]:
    """All rows, one product a step, the released code's rule and the library's rule for ties."""
    size, data = len(base), rows.double()
    tie = tie_width(data.norm(dim=1).max().item(), size, steps)
    product = torch.eye(size, dtype=torch.float64)
    lowest, best, length = math.inf, product, 0
    channels: list[int] = []
    peaks: list[float] = []
    for step in range(steps + 1):
        high, low = data.max().item(), data.min().item()
        peaks.append(high - low)
        if peaks[-1] < lowest - 2 * tie:
            lowest, best, length = peaks[-1], product, step
        ties = data >= high - tie if high > -low + tie else data <= low + tie
        row, column = ties.nonzero()[0].tolist()
        channels.append(row % size if index is Index.ROW else column)
        rotation = exchange(base, channels[-1])
        product, data = product @ rotation, data @ rotation
    return best, channels[:length], peaks


def exact_search(
    rows: torch.Tensor, base: torch.Tensor, steps: int, index: Index
) -> tuple[torch.Tensor, list[int], list[float]]:
    """The same on entries summed from channel 0 up, all of them: the definition to the bit."""
    size, data = len(base), rows.double().numpy()
    tie = tie_width(rows.double().norm(dim=1).max().item(), size, steps)
    product = torch.eye(size, dtype=torch.float64)
    lowest, best, length = math.inf, product, 0
    channels: list[int] = []
    peaks: list[float] = []
    for step in range(steps + 1):
        entries = np.zeros_like(data)
        for channel in range(size):
            entries += data[:, channel : channel + 1] * product.numpy()[channel]
        high, low = entries.max(), entries.min()
        peaks.append(float(high - low))
        if peaks[-1] < lowest - 2 * tie:
            lowest, best, length = peaks[-1], product, step
        ties = entries >= high - tie if high > -low + tie else entries <= low + tie
        row, column = divmod(int(ties.argmax()), size)
        channels.append(row % size if index is Index.ROW else column)
        product = product @ exchange(base, channels[-1])
    return best, channels[:length], peaks


def base_of(size: int, seed: int = 0) -> torch.Tensor:
    return random_base(size, torch.Generator().manual_seed(seed))


def outliers(seed: int, width: int = 256) -> torch.Tensor:
    return oracles.activations(400, width, outliers=5, seed=seed)


def plain(seed: int, width: int = 256) -> torch.Tensor:
    return oracles.activations(400, width, outliers=0, seed=seed)


def repeated(seed: int, width: int = 256) -> torch.Tensor:
    """Equal tokens give equal rows: the extreme is held by many of them."""
    draw = torch.Generator().manual_seed(seed)
    return outliers(seed, width)[torch.randint(12, (400,), generator=draw)]


def mirrored(seed: int, width: int = 256) -> torch.Tensor:
    """Each row and its negative: max and -min tie in every step."""
    rows = plain(seed, width)
    return torch.cat((rows, -rows))


def one_sign(seed: int, width: int = 256) -> torch.Tensor:
    """All entries negative: max < 0, where no norm can exclude a row."""
    return -1 - plain(seed, width).abs()


def lopsided(seed: int, width: int = 256) -> torch.Tensor:
    """Rows of large norm are positive; the smallest entry stands alone in a row of small norm,
    below the largest entry: it may be missed only by those who take the norms of one side."""
    rows = plain(seed, width) / 1000
    rows[:96] = rows[:96].abs() + 3  # as blocks of 32, two whole chunks of 256 and 512
    rows[0, 0], rows[399, 100] = 6.0, -5.0
    return rows


def tied(seed: int, width: int = 256) -> torch.Tensor:
    """The largest entry stands twice, first in a row of smaller norm, which counts."""
    rows = plain(seed, width) / 1000
    rows[20:380] += 3
    rows[7, 9], rows[390, 70] = 7.0, 7.0
    rows[390, 71:79] = 5.0
    return rows


def crowded(seed: int, width: int = 256) -> torch.Tensor:
    """Tokens alike up to a billionth: float32 cannot tell which of them holds an extreme, and more
    than rounding in float64 lies between them."""
    draw = torch.Generator().manual_seed(seed)
    nearly = 1 + 1e-9 * torch.randn(400, 1, dtype=torch.float64, generator=draw)
    return outliers(seed, width)[:1].double() * nearly


@pytest.mark.parametrize("size", [2, 3, 16, 32, 128])
def test_the_base_is_the_product_of_givens_rotations(size: int) -> None:
    """G_{n-2} ... G_0 with cos = 1/sqrt(i+2), rows and columns 0 and n-1 exchanged. An entry of a
    product of n rotations is off by at most n eps; the closed form by a few eps."""
    product = torch.eye(size, dtype=torch.float64)
    for i in range(size - 1):
        cos, sin = 1 / math.sqrt(i + 2), math.sqrt((i + 1) / (i + 2))
        product = oracles.givens(size, i, i + 1, cos, sin) @ product
    swap = torch.eye(size, dtype=torch.float64)
    swap[[0, -1]] = swap[[-1, 0]]
    assert (uniform_base(size) - swap @ product @ swap).abs().max() <= 4 * size * EPS


@pytest.mark.parametrize("size", [2, 3, 32, 128])
def test_the_base_spreads_channel_0_evenly(size: int) -> None:
    base = uniform_base(size)
    assert (base[0].abs() - 1 / math.sqrt(size)).abs().max() <= EPS
    eye = torch.eye(size, dtype=torch.float64)
    assert (base @ base.T - eye).abs().max() <= 4 * size * EPS


def test_the_random_base_keeps_column_0_and_is_drawn_from_the_generator() -> None:
    first, again, other = base_of(32, 4), base_of(32, 4), base_of(32, 5)
    eye = torch.eye(32, dtype=torch.float64)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    assert (first[:, 0] - uniform_base(32)[:, 0]).abs().max() <= 32 * EPS
    assert (first.T @ first - eye).abs().max() <= 8 * 32 * EPS


def test_after_the_draw_row_0_is_no_longer_uniform() -> None:
    assert (base_of(32)[0].abs() - 1 / math.sqrt(32)).abs().max() > 0.01


def test_exchange_is_the_switch_matrix() -> None:
    matrix = base_of(8)
    switch = torch.eye(8, dtype=torch.float64)
    switch[[0, 5]] = switch[[5, 0]]
    assert torch.equal(exchange(matrix, 5), switch @ matrix @ switch)
    assert torch.equal(exchange(matrix, 0), matrix)


@pytest.mark.parametrize("index", list(Index))
@pytest.mark.parametrize("data", [outliers, plain, repeated, mirrored, one_sign, lopsided, tied])
def test_pruning_misses_nothing(data: object, index: Index) -> None:
    """Same channels, same prefix; peaks and rotation within the rounding of either path."""
    assert callable(data)
    for seed, size, steps in ((0, 32, 40), (1, 32, 128), (2, 128, 30), (3, 16, 20)):
        rows = data(seed).reshape(-1, size)
        base = base_of(size, seed)
        best, channels, peaks = slow_search(rows, base, steps, index)
        fit = greedy_rotation(rows, base, steps=steps, index=index)
        tie = tie_width(rows.double().norm(dim=1).max().item(), size, steps)
        assert fit.channels == tuple(channels)
        assert len(fit.peaks) == steps + 1
        assert all(abs(a - b) <= tie for a, b in zip(fit.peaks, peaks, strict=True))
        assert (fit.rotation - best).abs().max() <= tie_width(1.0, size, steps)


@pytest.mark.parametrize("index", list(Index))
@pytest.mark.parametrize("data", [outliers, repeated, mirrored, one_sign, tied, crowded])
def test_peaks_are_those_of_the_definition_to_the_bit(data: object, index: Index) -> None:
    """Though float32, a BLAS and chunks have looked first, at scales that no float32 holds."""
    assert callable(data)
    cases = (
        (0, 32, 40, 1.0),
        (1, 32, 10, 1e-60),
        (2, 128, 10, 1.0),
        (3, 16, 20, 1e60),
        (4, 2, 5, 1.0),
    )
    for seed, size, steps, scale in cases:
        rows = scale * data(seed, 128).double().reshape(-1, size)
        base = base_of(size, seed)
        best, channels, peaks = exact_search(rows, base, steps, index)
        fit = greedy_rotation(rows, base, steps=steps, index=index)
        assert fit.channels == tuple(channels)
        assert fit.peaks == tuple(peaks)
        assert torch.equal(fit.rotation, 1.5 * best - 0.5 * best @ best.T @ best)


def test_sums_are_taken_in_order() -> None:
    """1e16 + 1 - 1e16 is 0 from the left and 1 from elsewhere."""
    left = np.array([[1e16, 1.0, -1e16], [1e16, -1e16, 1.0]])
    assert sums_of_products(left, np.ones((2, 3))).tolist() == [0.0, 1.0]


def test_coarse_products_are_not_screened_by() -> None:
    """Where torch may multiply float32 by bfloat16, the search goes by float64. Whether it does is
    the CPU's affair, so that only the result is looked at."""
    rows, base = outliers(0).reshape(-1, 32), base_of(32)
    usual = greedy_rotation(rows, base, steps=30, index=Index.ROW)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        coarse = greedy_rotation(rows, base, steps=30, index=Index.ROW)
    finally:
        torch.set_float32_matmul_precision(before)
    assert coarse.channels == usual.channels
    assert coarse.peaks == usual.peaks


@pytest.mark.parametrize("size", [16, 32])
def test_rows_all_alike_and_one_row(size: int) -> None:
    """Every row of a chunk ties: only the first of them is looked at, and it is row 0."""
    one = plain(5).reshape(-1, size)[:1]
    alone = greedy_rotation(one, base_of(size), steps=20, index=Index.ROW)
    alike = greedy_rotation(one.expand(700, -1), base_of(size), steps=20, index=Index.ROW)
    assert alone.channels == alike.channels == (0,) * len(alone.channels)
    assert alone.peaks == alike.peaks


@pytest.mark.parametrize("index", list(Index))
def test_the_first_exchanged_channel(index: Index) -> None:
    """By hand: the outlier -9 stands in row 5, column 2, the largest entry is 3 in row 1."""
    rows = torch.zeros(7, 4)
    rows[5, 2], rows[1, 3] = -9.0, 3.0
    fit = greedy_rotation(rows, base_of(4), steps=1, index=index)
    assert fit.peaks[0] == 12.0
    assert fit.channels == (5 % 4 if index is Index.ROW else 2,)


@pytest.mark.parametrize("data", [outliers, plain, repeated, one_sign])
@pytest.mark.parametrize("size", [32, 128])
def test_the_best_prefix_never_raises_the_peak(data: object, size: int) -> None:
    """And the rotation that is returned has the peak of its prefix, which is the lowest."""
    assert callable(data)
    rows = data(11).reshape(-1, size).double()
    fit = greedy_rotation(rows, base_of(size, 11), steps=60, index=Index.ROW)
    rotated = rows @ fit.rotation
    tie = tie_width(rows.norm(dim=1).max().item(), size, 60)
    peak = (rotated.max() - rotated.min()).item()
    assert peak <= fit.peaks[0] + tie
    assert abs(peak - fit.peaks[len(fit.channels)]) <= tie
    assert abs(peak - min(fit.peaks)) <= 3 * tie


def test_the_peak_of_outlier_data_falls_by_much() -> None:
    """An outlier alone in its block falls by the factor sqrt(32) if it is spread evenly; half of
    that is asked for."""
    rows = outliers(3).reshape(-1, 32)
    fit = greedy_rotation(rows, base_of(32), steps=128, index=Index.COLUMN)
    assert min(fit.peaks) < fit.peaks[0] * 2 / math.sqrt(32)


@pytest.mark.parametrize(("size", "steps"), [(32, 256), (128, 256)])
def test_the_rotation_is_orthogonal(size: int, steps: int) -> None:
    fit = greedy_rotation(plain(7).reshape(-1, size), base_of(size), steps=steps, index=Index.ROW)
    eye = torch.eye(size, dtype=torch.float64)
    assert (fit.rotation.T @ fit.rotation - eye).abs().max() <= 1e-12


def test_zeros_need_no_rotation() -> None:
    fit = greedy_rotation(torch.zeros(50, 32), base_of(32), steps=5, index=Index.ROW)
    assert fit.channels == ()
    assert fit.peaks == (0.0,) * 6
    assert torch.equal(fit.rotation, torch.eye(32, dtype=torch.float64))
