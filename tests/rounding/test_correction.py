"""The correction of weights for what rounding does to inputs, against brute least squares."""

import pytest
import torch
from torch import Tensor

from mxtorq.errors import FormatError, UsageError
from mxtorq.formats.e8m0 import ScaleRule
from mxtorq.kernels.dispatch import fake_quantize
from mxtorq.rounding.correction import CORRECTION_BLOCK, correct_, correction
from mxtorq.rounding.gptq import GPTQ, Inputs

TOKENS, WIDTH = 4096, 64


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    """Correlated inputs, and the same rounded under floor, which cuts and shrinks."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=draw) / 8
    mixing.diagonal().add_(torch.linspace(0.2, 3, WIDTH))
    x = torch.randn(TOKENS, WIDTH, generator=draw) @ mixing
    return x.double(), fake_quantize(x, ScaleRule.FLOOR).double()


def moments(x: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = len(x)
    return x.T @ x / n, rounded.T @ rounded / n, x.T @ rounded / n


def parts(x: Tensor, rounded: Tensor, weights: Tensor, fitted: Tensor) -> tuple[float, float]:
    """The power of what is a linear map of the signal in the outputs' error, and of the rest."""
    error = x @ weights.T - rounded @ fitted.T
    of_signal = x @ torch.linalg.lstsq(x, error).solution
    return of_signal.square().mean().item(), (error - of_signal).square().mean().item()


def test_without_coherence_it_is_the_least_squares_fit_to_the_outputs() -> None:
    x, rounded = inputs(0)
    weights = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    found = weights @ correction(*moments(x, rounded), ridge=1e-12, coherence=0.0)
    expected = torch.linalg.lstsq(rounded, x @ weights.T).solution.T
    # Normal equations lose the square of the condition, the ridge 1e-12 of it.
    bound = 1e-12 * torch.linalg.cond(rounded).item() ** 2 * WIDTH * weights.norm().item()
    assert (found - expected).norm().item() < bound
    assert (found - weights).norm().item() > 100 * bound


@pytest.mark.parametrize("coherence", [0.0, 1.0, 3.0, 30.0])
def test_it_minimises_noise_and_the_weighted_error_of_the_signal(coherence: float) -> None:
    """No small change of the fitted weights makes the weighted sum smaller."""
    x, rounded = inputs(2)
    draw = torch.Generator().manual_seed(3)
    weights = torch.randn(8, WIDTH, generator=draw).double()
    fitted = weights @ correction(*moments(x, rounded), ridge=1e-9, coherence=coherence)

    def cost(candidate: Tensor) -> float:
        signal, noise = parts(x, rounded, weights, candidate)
        return (1 + coherence) * signal + noise

    least = cost(fitted)
    for _ in range(20):
        step = torch.randn(fitted.shape, generator=draw).double() * 0.01
        # What a ridge of 1e-9 and H + 1e-4 of its mean move is far below a step of 1 %.
        assert cost(fitted + step) > least
        assert cost(fitted - step) > least


def test_coherence_trades_the_error_of_the_signal_for_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mxtorq.rounding.correction._SOLID", 0.0)
    x, rounded = inputs(4)
    weights = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(5)).double()
    found = [
        parts(
            x, rounded, weights, weights @ correction(*moments(x, rounded), ridge=1e-9, coherence=k)
        )
        for k in (0.0, 1.0, 3.0, 10.0, 1000.0)
    ]
    signal, noise = zip(*found, strict=True)
    assert list(signal) == sorted(signal, reverse=True)
    assert list(noise) == sorted(noise)
    # The one that leaves the signal alone, G M = I, costs its noise: no minimiser costs more.
    regression = torch.linalg.lstsq(x, rounded).solution
    unbiased = weights @ torch.linalg.inv(regression).T
    left, most = parts(x, rounded, weights, unbiased)
    assert left < 1e-20
    assert 1001 * signal[-1] + noise[-1] <= most


def test_errors_of_many_layers_add_up_as_the_formula_says() -> None:
    """Errors that are a map of one signal add in amplitude, independent ones in power: of n copies
    of a site with roundings of its own, k = n - 1 gives the least error of the sum."""
    draw = torch.Generator().manual_seed(6)
    n, x = 8, inputs(7)[0]
    gain = 0.8  # what a rounding that cuts much would leave of the signal
    noisy = [gain * x + 0.7 * torch.randn(x.shape, generator=draw).double() for _ in range(n)]
    weights = torch.randn(8, WIDTH, generator=draw).double()

    def total(coherence: float) -> float:
        error = torch.zeros(TOKENS, 8, dtype=torch.float64)
        for each in noisy:
            matrix = correction(*moments(x, each), ridge=1e-9, coherence=coherence)
            error += x @ weights.T - each @ (weights @ matrix).T
        return error.square().mean().item()

    figures = {k: total(k) for k in (0.0, 1.0, n - 1.0, 1000.0)}
    assert min(figures, key=figures.__getitem__) == n - 1.0, figures


def test_a_large_ridge_leaves_weights_alone_and_unseen_channels_are_harmless() -> None:
    x, rounded = inputs(8)
    matrix = correction(*moments(x, rounded), ridge=1e9, coherence=3.0)
    assert (matrix - torch.eye(WIDTH)).abs().max().item() < 1e-8
    x[:, 5], rounded[:, 5] = 0.0, 0.0
    matrix = correction(*moments(x, rounded), ridge=1e-3, coherence=3.0)
    unseen = torch.eye(WIDTH, dtype=torch.float64)[5]
    assert torch.allclose(matrix[5], unseen, atol=1e-12)
    assert torch.allclose(matrix[:, 5], unseen, atol=1e-12)
    zeros = torch.zeros(3, WIDTH, WIDTH, dtype=torch.float64)
    assert torch.equal(correction(*zeros, ridge=1e-3, coherence=3.0), torch.eye(WIDTH).double())


@pytest.mark.parametrize("width", [32, CORRECTION_BLOCK, 2 * CORRECTION_BLOCK + 96])
def test_weights_are_corrected_in_float64_block_by_block(width: int) -> None:
    draw = torch.Generator().manual_seed(9)
    weights = torch.randn(70, width, generator=draw)
    sides = [min(CORRECTION_BLOCK, width - start) for start in range(0, width, CORRECTION_BLOCK)]
    matrices = [torch.randn(side, side, generator=draw).double() for side in sides]
    matrix = torch.block_diag(*matrices)
    expected, sizes = weights.double() @ matrix, weights.abs().double() @ matrix.abs()
    correct_(weights, matrices)
    # To float32 once, from sums in float64 whose error is far below 2^-40 of their magnitudes.
    assert ((weights - expected).abs() <= 2.0**-24 * expected.abs() + 2.0**-40 * sizes).all()


def test_a_correction_needs_a_matrix_for_each_block() -> None:
    with pytest.raises(ValueError, match="shorter"):
        correct_(
            torch.randn(4, CORRECTION_BLOCK + 32),
            [torch.eye(CORRECTION_BLOCK, dtype=torch.float64)],
        )


def test_moments_of_nothing_real_are_refused() -> None:
    x, rounded = inputs(10)
    plain, after, cross = moments(x, rounded)
    with pytest.raises(FormatError, match="ridge"):
        correction(plain, after - 2 * plain, cross, ridge=1e-3, coherence=0.0)
    plain[0, 0] = -1.0
    with pytest.raises(FormatError, match="ridge"):
        correction(plain, after, cross, ridge=1.0, coherence=1.0)


@pytest.mark.parametrize("options", [{"ridge": 0.0}, {"ridge": -1.0}, {"coherence": float("nan")}])
def test_penalties_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        GPTQ(inputs=Inputs.CORRECTED, **options)


@pytest.mark.parametrize("inputs", [Inputs.PLAIN, Inputs.ROUNDED])
@pytest.mark.parametrize("options", [{"ridge": 0.1}, {"coherence": 1.0}])
def test_penalties_of_a_correction_that_is_not_made_are_refused(
    inputs: Inputs, options: dict[str, float]
) -> None:
    assert GPTQ(inputs=inputs, ridge=0.03, coherence=3.0) == GPTQ(inputs=inputs)
    with pytest.raises(UsageError, match="pass inputs=corrected, or leave"):
        GPTQ(inputs=inputs, **options)
