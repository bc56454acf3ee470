"""Perplexity is its definition, and nothing depends on the batches."""

import math

import pytest
import torch

import tiny_models
from mxtorq.errors import ModelError
from mxtorq.evaluation.fidelity import output_error, same_stream
from mxtorq.evaluation.perplexity import percentile, perplexity


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


def test_windows_hold_the_sums_of_their_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if it were evaluated alone, whatever the batches; the mean of all is the figure."""
    monkeypatch.setattr("mxtorq.evaluation.perplexity._ROWS", 7)
    monkeypatch.setattr("mxtorq.calibration.capture.BATCH_TOKENS", 48)
    model, other = tiny_models.build("llama"), tiny_models.build("llama", seed=1)
    windows = tiny_models.tokens(5, 24)
    found = perplexity(model, windows, reference=other)
    assert set(found.windows) == {"nll", "kl", "agreement"}
    bound = 23 * 2 * 64 * 320 * torch.finfo(torch.float32).eps  # as below, of 23 predictions
    for at, window in enumerate(windows):
        alone = perplexity(model, window[None], reference=other)
        for name, sums in found.windows.items():
            assert abs(sums[at] - alone.windows[name][0]) <= (0 if name == "agreement" else bound)
    for name, sums in found.windows.items():
        assert getattr(found, name) == sum(sums) / (5 * 23)
    assert set(perplexity(model, windows).windows) == {"nll"}


def test_agreement_and_the_percentile_are_their_definitions() -> None:
    model, other = tiny_models.build("llama"), tiny_models.build("llama", seed=1)
    with torch.no_grad():  # near enough to agree at times
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.9)
    windows = tiny_models.tokens(5, 24)
    mine, theirs = (each(input_ids=windows).logits[:, :-1].flatten(0, 1) for each in (model, other))
    same = int((mine.argmax(-1) == theirs.argmax(-1)).sum())
    assert 0 < same < 115
    found = perplexity(model, windows, reference=other)
    assert found.agreement == same / 115
    p, q = theirs.log_softmax(-1), mine.log_softmax(-1)
    kl = sorted((p.exp() * (p - q)).double().sum(-1).float().tolist())
    # The smallest with at least 99 % of the 115 not above it is the 114th.
    bound = 2 * 64 * 320 * torch.finfo(torch.float32).eps
    assert found.kl_p99 is not None
    assert abs(found.kl_p99 - kl[113]) <= bound
    assert kl[113] < kl[114]


@pytest.mark.parametrize(("count", "expected"), [(1, 1.0), (99, 99.0), (100, 99.0), (101, 100.0)])
def test_a_percentile_is_a_value_that_occurs(count: int, expected: float) -> None:
    values = torch.arange(count, 0, -1, dtype=torch.float32)
    assert percentile(values, 99) == expected


def test_the_residual_stream_is_compared_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxtorq.calibration.capture.BATCH_TOKENS", 48)
    model, reference = tiny_models.build("qwen3"), tiny_models.build("qwen3")
    model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1.25)
    windows = tiny_models.tokens(5, 24)
    found = perplexity(model, windows, reference=reference, layers="model.layers").layer_errors
    assert list(found) == ["model.layers.0", "model.layers.1"]
    assert found["model.layers.0"] == 0.0
    seen: list[torch.Tensor] = []
    for each in (model, reference):  # an independent way to the same states
        last = each.get_submodule("model.layers.1")
        hook = last.register_forward_hook(lambda m, a, output: seen.append(output))
        each(input_ids=windows)
        hook.remove()
    mine, theirs = (each.double() for each in seen)
    error = float((mine - theirs).square().sum() / theirs.square().sum())
    assert error > 0.001
    # Float32 states of other batch sizes: each differs by some hundred roundings of its size.
    assert math.isclose(found["model.layers.1"], error, rel_tol=1e-3)
    for module in (*model.modules(), *reference.modules()):
        assert not module._forward_hooks
    assert perplexity(model, windows, reference=reference).layer_errors == {}


def test_rotated_streams_are_told_by_their_embeddings() -> None:
    model, reference = tiny_models.build("qwen3"), tiny_models.build("qwen3")
    assert same_stream(model, reference, "model.embed_tokens")
    model.get_submodule("model.embed_tokens").weight[3, 3] += 0.5
    assert not same_stream(model, reference, "model.embed_tokens")


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
