"""Families as data: each describes the real transformers module, and unknown ones are refused."""

import pytest
from torch import nn

import tiny_models
from mxtorq.errors import ModelError
from mxtorq.models import FAMILIES
from mxtorq.models.family import SiteName, find_family


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_exists_and_every_linear_belongs_to_one_site(name: str) -> None:
    family = tiny_models.FAMILIES[name]
    model = tiny_models.build(name)
    assert type(model).__name__ == family.architecture
    for path in (family.embedding, family.rotary, family.final_norm, family.head):
        model.get_submodule(path)
    layers = list(model.get_submodule(family.layers).children())
    assert len(layers) == 2
    named = [path for site in family.sites for path in site.linears]
    there = [path for path, module in layers[0].named_modules() if isinstance(module, nn.Linear)]
    assert sorted(named) == sorted(there)
    assert [site.name for site in family.sites] == list(SiteName)
    for site in family.sites:
        for path in (*site.sources, *site.kept_readers, *site.taps):
            layers[0].get_submodule(path)
        widths = {layers[0].get_submodule(path).in_features for path in site.linears}
        assert len(widths) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_linears_of_a_site_really_share_their_input(name: str) -> None:
    family = tiny_models.FAMILIES[name]
    model = tiny_models.build(name)
    layer = model.get_submodule(f"{family.layers}.1")
    seen: dict[str, object] = {}
    for site in family.sites:
        for path in site.linears:
            layer.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path: seen.update({path: args[0].clone()})
            )
    model(input_ids=tiny_models.tokens(8, 32))
    for site in family.sites:
        for group in site.groups:
            first, *others = (seen[path] for path in group)
            assert all((first == other).all() for other in others)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_residual_stream_is_read_and_written_where_it_says(name: str) -> None:
    """What a layer adds to its input is the sum of the writers' outputs, and the input of each
    reader is its norm's output; the other sites read something else."""
    family, seen = tiny_models.FAMILIES[name], {}
    model = tiny_models.build(name)
    layer = model.get_submodule(f"{family.layers}.1")
    # What experts write is weighted by the router before it is added.
    experts = family.experts.module if family.experts else ""
    writers = [path for path in family.residual_writers if not path.startswith(f"{experts}.")]
    writers += [experts] if experts else []
    assert len(writers) == 2
    paths = [*writers, *(site.source for site in family.sites)]
    hooks = {path: layer.get_submodule(path) for path in paths}
    for path, module in hooks.items():
        module.register_forward_hook(lambda m, args, out, path=path: seen.update({path: out}))
    readers = {site.name: layer.get_submodule(site.taps[0]) for site in family.sites}
    for path, module in readers.items():
        module.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: args[0]}))
    layer.register_forward_hook(lambda m, args, out: seen.update({"in": args[0], "out": out}))
    model(input_ids=tiny_models.tokens(8, 32))
    written = seen["in"]
    for path in writers:
        written = written + seen[path].view_as(written)
    assert (written == seen["out"]).all()
    for site in family.sites:
        read = seen[site.name]
        assert site.reads_residual == (read.data_ptr() == seen[site.source].data_ptr())
    assert family.site(SiteName.O_IN).linears == family.residual_writers[:1]


def test_every_family_has_a_tiny_model() -> None:
    assert FAMILIES.keys() == tiny_models.CONFIGS.keys()


def test_an_unknown_family_names_the_nearest_and_its_sites() -> None:
    with pytest.raises(ModelError) as caught:
        find_family({"model_type": "qwen4", "architectures": ["Qwen4ForCausalLM"]}, FAMILIES)
    message = str(caught.value)
    assert "'qwen4'" in message
    assert "nearest family is 'qwen" in message
    assert "self_attn.q_proj" in message


def test_a_config_without_a_type_is_refused() -> None:
    with pytest.raises(ModelError, match="None"):
        find_family({}, FAMILIES)
