"""Perplexity is its definition, and nothing depends on the batches."""

import math

import pytest
import torch

import tiny_models
from mxtorq.errors import ModelError
from mxtorq.evaluation.fidelity import output_error
from mxtorq.evaluation.perplexity import perplexity


def test_it_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token from float64 log-softmax, windows apart from each other."""
    monkeypatch.setattr("mxtorq.evaluation.perplexity._ROWS", 7)
    monkeypatch.setattr("mxtorq.calibration.capture.BATCH_TOKENS", 48)
    model, windows = tiny_models.build("llama"), tiny_models.tokens(5, 24)
    losses = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0].double()
        for at in range(1, 24):
            losses.append(-torch.log_softmax(logits[at - 1], -1)[window[at]].item())
    found = perplexity(model, windows)
    assert found.predictions == len(losses) == 5 * 23
    # float32 logits and log-softmax, of magnitude below 64, on both sides of a batch split
    assert abs(found.nll - sum(losses) / len(losses)) <= 64 * 320 * torch.finfo(torch.float32).eps
    assert found.value == math.exp(found.nll)


def test_a_uniform_model_has_the_vocabulary_s_size() -> None:
    model = tiny_models.build("qwen3")
    model.get_submodule("model.norm").weight.zero_()
    found = perplexity(model, tiny_models.tokens(2, 16))
    assert math.isclose(found.value, 320, rel_tol=1e-5)


def test_kl_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxtorq.evaluation.perplexity._ROWS", 7)
    model, other = tiny_models.build("llama"), tiny_models.build("llama", seed=1)
    windows = tiny_models.tokens(3, 24)
    p, q = (
        torch.log_softmax(each(input_ids=windows).logits[:, :-1].double(), -1)
        for each in (other, model)
    )
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    found = perplexity(model, windows, reference=other).kl
    assert found is not None
    # float32 log-probabilities of magnitude below 64, weighted by probabilities that sum to 1
    assert abs(found - expected) <= 2 * 64 * 320 * torch.finfo(torch.float32).eps
    assert perplexity(model, windows, reference=model).kl == 0.0
    assert perplexity(model, windows).kl is None


def test_progress_counts_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxtorq.calibration.capture.BATCH_TOKENS", 32)
    calls: list[tuple[int, int]] = []
    perplexity(
        tiny_models.build("llama"), tiny_models.tokens(5, 16), lambda *step: calls.append(step)
    )
    assert calls == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_a_broken_model_is_an_error() -> None:
    model = tiny_models.build("llama")
    model.get_submodule("model.norm").weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN or Inf"):
        perplexity(model, tiny_models.tokens(1, 16))


def test_output_error_is_relative_and_ignores_biases() -> None:
    torch.manual_seed(0)
    original = torch.nn.Linear(8, 4)
    worse = torch.nn.Linear(8, 4)
    worse.weight.data = original.weight.data * 1.1
    worse.bias.data = original.bias.data
    x = torch.randn(50, 8)
    assert output_error([(x, original, original)]) <= 1e-12
    assert math.isclose(output_error([(x, original, worse)]), 0.01, rel_tol=1e-4)
    both = output_error([(x, original, original), (x, original, worse)])
    assert math.isclose(both, 0.005, rel_tol=1e-4)
    assert output_error([(torch.zeros(3, 8), original, original)]) == 0.0
