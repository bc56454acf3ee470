"""Gradients at the sites of a layer, against inputs that are changed by hand."""

from collections.abc import Callable

import pytest
import torch

import tiny_models
from mxtorq.calibration.capture import LayerInput, first_layer_inputs
from mxtorq.calibration.gradients import BATCHES, capture_gradients
from mxtorq.errors import ModelError
from mxtorq.models import FAMILIES as UNBOUND
from mxtorq.models.family import Family, Site

Change = Callable[[str, torch.Tensor], torch.Tensor]


def first(
    family: Family, model: torch.nn.Module, windows: int = 2, length: int = 12
) -> tuple[torch.nn.Module, dict[str, Site], list[LayerInput]]:
    """A layer, its sites, and a batch of each window."""
    inputs = [
        item
        for ids in tiny_models.tokens(windows, length).split(1)
        for item in first_layer_inputs(model, family, ids)
    ]
    sites = {family.site_name(0, site): site for site in family.sites}
    return model.get_submodule(f"{family.layers}.0"), sites, inputs


def output(
    layer: torch.nn.Module,
    item: LayerInput,
    at_inputs: dict[str, torch.Tensor] | None = None,
    at_outputs: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """What the layer gives once something is added to what modules get, or to what they give."""
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda module, args, more=more: (args[0] + more.view_as(args[0]), *args[1:])
        )
        for path, more in (at_inputs or {}).items()
    ]
    hooks += [
        layer.get_submodule(path).register_forward_hook(
            lambda module, args, found, more=more: found + more.view_as(found)
        )
        for path, more in (at_outputs or {}).items()
    ]
    with torch.enable_grad():
        found = layer(item.hidden, **item.arguments)
    for hook in hooks:
        hook.remove()
    return found[0] if isinstance(found, tuple) else found


def reached(layer: torch.nn.Module, item: LayerInput, paths: list[str]) -> dict[str, torch.Tensor]:
    """Zeros as large as what modules get, those that are called."""
    shapes: dict[str, torch.Tensor] = {}
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: shapes.update({path: torch.zeros_like(args[0])})
        )
        for path in paths
    ]
    layer(item.hidden, **item.arguments)
    for hook in hooks:
        hook.remove()
    return shapes


def probe(layer: torch.nn.Module, item: LayerInput, seed: int) -> torch.Tensor:
    """The direction r of a batch."""
    plain = output(layer, item).detach()
    random = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed))
    return (random / plain.float().square().mean(-1, keepdim=True).sqrt()).to(plain.dtype)


def readers(site: Site) -> list[str]:
    """Whose inputs, each by itself, an error at a site reaches."""
    return [site.tap] if site.tap else list(site.linears)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to a rounding to float32, and sums in float64 of some thousand terms in another order."""
    bound = 2.0**-24 * expected.abs() + 2.0**13 * 2.0**-53 * expected.abs().max()
    return bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_rows_are_the_gradients_of_the_output_along_random_directions(name: str) -> None:
    """A leaf is added to what every linear of a site gets, and to nothing else: a router reads
    what its experts read, and stays as it is."""
    family = tiny_models.FAMILIES[name]
    layer, sites, inputs = first(family, tiny_models.build_fp64(name))
    found = capture_gradients(layer, sites, inputs, seed=5)
    assert list(found) == list(sites)
    for full_name, site in sites.items():
        expected, squares = [], torch.zeros(0)
        for number, item in enumerate(inputs):
            r = probe(layer, item, 5 + number)
            shapes = reached(layer, item, readers(site))
            if site.experts and not site.tap:  # each has tokens of its own
                leaves = {path: zero.requires_grad_(True) for path, zero in shapes.items()}
            else:
                leaf = next(iter(shapes.values())).requires_grad_(True)
                leaves = dict.fromkeys(shapes, leaf)
            value = (r * output(layer, item, leaves)).sum()
            of_each = {id(each): each for each in leaves.values()}
            parts = torch.autograd.grad(value, list(of_each.values()))
            expected += [part.flatten(0, -2) for part in parts]

            called = reached(layer, item, list(site.linears))
            outs = {
                path: torch.zeros(
                    *zero.shape[:-1], layer.get_submodule(path).out_features, dtype=zero.dtype
                ).requires_grad_(True)
                for path, zero in called.items()
            }
            value = (r * output(layer, item, at_outputs=outs)).sum()
            grads = dict(zip(outs, torch.autograd.grad(value, list(outs.values())), strict=True))
            sums = [
                grads[path].flatten(0, -2).square().sum(0)
                if path in grads
                else torch.zeros(layer.get_submodule(path).out_features, dtype=torch.float64)
                for path in site.linears
            ]
            squares = torch.cat(sums) + (squares if len(squares) else 0.0)
        rows = torch.cat(expected)
        assert found[full_name].rows.shape == rows.shape
        assert len(rows) == sum(item.tokens for item in inputs) * site.passes
        assert near(found[full_name].rows, rows), full_name
        assert near(found[full_name].output_weights, squares / len(rows)), full_name


def test_rows_are_what_finite_differences_give() -> None:
    """With steps h and h / 2: a difference is off by c h^2 + O(h^4), so that the second one is
    off by a third of what both differ by; and by what the function's own rounding makes of it."""
    family = tiny_models.FAMILIES["llama"]
    layer, sites, inputs = first(family, tiny_models.build_fp64("llama"), windows=1)
    found = capture_gradients(layer, sites, inputs, seed=2)
    r = probe(layer, inputs[0], 2)
    draw = torch.Generator().manual_seed(0)
    for name, site in sites.items():
        shapes = reached(layer, inputs[0], readers(site))
        shape = next(iter(shapes.values())).shape
        step = torch.randn(shape, generator=draw, dtype=torch.float64)

        def slope(h: float, step: torch.Tensor = step, site: Site = site) -> float:
            ahead, back = (
                (r * output(layer, inputs[0], dict.fromkeys(readers(site), sign * h * step))).sum()
                for sign in (1, -1)
            )
            return (ahead - back).item() / (2 * h)

        wide, narrow = slope(1e-3), slope(5e-4)
        exact = (found[name].rows.double() * step.flatten(0, -2)).sum().item()
        size = (r * output(layer, inputs[0])).abs().sum().item()
        rounding = 2.0**13 * 2.0**-53 * size / 5e-4
        stored = 2.0**-24 * (found[name].rows.abs() * step.flatten(0, -2).abs()).sum().item()
        assert abs(narrow - exact) <= abs(wide - narrow) + rounding + stored
        assert abs(wide - narrow) + rounding + stored < 1e-3 * abs(exact)  # so that this says much


def test_the_mean_square_is_what_an_error_does_to_the_output() -> None:
    """e g^T is normal with the variance sum_t |(J e)_t|^2 / mean h_t^2, so that the sum of N
    squares over it is chi-squared: its mean is off by 5 sqrt(2 / N) once in a million times."""
    family = tiny_models.FAMILIES["qwen3"]
    layer, sites, inputs = first(family, tiny_models.build_fp64("qwen3"), windows=1, length=8)
    (item,), probes, h = inputs, 200, 1e-4
    draw = torch.Generator().manual_seed(1)
    plain = output(layer, item)
    errors, expected = {}, {}
    for name, site in sites.items():
        shape = next(iter(reached(layer, item, readers(site)).values())).shape
        errors[name] = torch.randn(shape, generator=draw, dtype=torch.float64)
        ahead, back = (
            output(layer, item, dict.fromkeys(readers(site), sign * h * errors[name]))
            for sign in (1, -1)
        )
        along = (ahead - back) / (2 * h)
        expected[name] = (along.square().sum(-1) / plain.square().mean(-1)).sum().item()
    found = dict.fromkeys(sites, 0.0)
    for seed in range(probes):
        for name, each in capture_gradients(layer, sites, inputs, seed).items():
            found[name] += (each.rows.double() * errors[name].flatten(0, -2)).sum().item() ** 2
    for name in sites:
        assert abs(found[name] / probes / expected[name] - 1) <= 5 * (2 / probes) ** 0.5


def test_only_the_first_batches_count() -> None:
    family = tiny_models.FAMILIES["llama"]
    layer, sites, inputs = first(family, tiny_models.build("llama"), windows=BATCHES + 2)
    some = capture_gradients(layer, sites, inputs[:BATCHES], seed=0)
    for name, each in capture_gradients(layer, sites, inputs, seed=0).items():
        assert torch.equal(each.rows, some[name].rows)
        assert torch.equal(each.output_weights, some[name].output_weights)


@pytest.mark.parametrize(("tokens", "windows"), [(None, 3), (24, 2), (35, 2), (1, 1)])
def test_some_tokens_of_a_batch_are_its_first_windows(tokens: int | None, windows: int) -> None:
    family, model = UNBOUND["qwen3"], tiny_models.build("qwen3")
    layer, sites, _ = first(family, model)
    ids = tiny_models.tokens(3, 12)
    whole = first_layer_inputs(model, family, ids)
    few = first_layer_inputs(model, family, ids[:windows])
    found = capture_gradients(layer, sites, whole, 0, tokens=tokens)
    expected = capture_gradients(layer, sites, few, 0)
    for name in sites:
        assert found[name].rows.shape == expected[name].rows.shape
        # The same windows and directions; products of more rows may be summed in another order.
        assert torch.allclose(found[name].rows, expected[name].rows, rtol=1e-4, atol=1e-6)


def test_outputs_are_looked_at_where_they_are_asked_for() -> None:
    family = tiny_models.FAMILIES["llama"]
    layer, sites, inputs = first(family, tiny_models.build("llama"))
    both = capture_gradients(layer, sites, inputs, seed=0)
    for name, each in capture_gradients(layer, sites, inputs, 0, weighs_outputs=False).items():
        assert torch.equal(each.rows, both[name].rows)
        assert len(each.output_weights) == 0 < len(both[name].output_weights)


def test_an_expert_that_nobody_goes_to_is_worth_nothing() -> None:
    """The router's rows v, -v, u, -u, 0, 0: two of the first four are always above the last two."""
    model = tiny_models.build("qwen3_moe", num_local_experts=6)
    gate = model.get_submodule("model.layers.0.mlp.gate").weight
    gate[1], gate[3], gate[4:] = -gate[0], -gate[2], 0.0
    family = UNBOUND["qwen3_moe"].bound(model.config)
    layer, sites, inputs = first(family, model)
    found = capture_gradients(layer, sites, inputs, seed=0)
    for name, site in sites.items():
        if site.experts:
            worth = found[name].output_weights.view(6, -1)
            assert (worth[4:] == 0).all()
            assert (worth[:4] > 0).any(1).all()
            assert len(found[name].rows) == 24 * site.passes


def test_nothing_stays_behind() -> None:
    """Neither hooks, also when a layer raises, nor gradients of parameters."""
    family = tiny_models.FAMILIES["llama"]
    model = tiny_models.build("llama")
    layer, sites, inputs = first(family, model)
    layer.requires_grad_(True)
    before = [item.hidden.clone() for item in inputs]
    capture_gradients(layer, sites, inputs, seed=0)
    wrong = LayerInput(inputs[0].hidden[..., :40], inputs[0].arguments)
    with pytest.raises(RuntimeError):
        capture_gradients(layer, sites, [wrong], seed=0)
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(map(torch.equal, before, (item.hidden for item in inputs)))
    assert not any(item.hidden.requires_grad for item in inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_are_refused_by_site(bad: float) -> None:
    family = tiny_models.FAMILIES["llama"]
    layer, sites, inputs = first(family, tiny_models.build("llama"))
    inputs[1].hidden[0, 3, 7] = bad
    with pytest.raises(ModelError, match=r"model\.layers\.0\.qkv_in"):
        capture_gradients(layer, sites, inputs, seed=0)


def test_a_token_whose_output_is_zero_says_nothing() -> None:
    """Its part of the residual stream has no size to be measured by."""
    family = tiny_models.FAMILIES["mistral"]
    layer, sites, inputs = first(family, tiny_models.build("mistral"), windows=1)
    inputs[0].hidden.zero_()
    for each in capture_gradients(layer, sites, inputs, seed=0).values():
        assert (each.rows == 0).all()
        assert (each.output_weights == 0).all()
