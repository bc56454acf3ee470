"""How well block transforms balance inputs against weights at each kind of site of a model.

    python benchmarks/moments.py babyllama-tok361 --calibration calibration.jsonl --json out.json

For a block with second moments A of the inputs and B of the weight's rows, errors of W4A4 grow with
tr(T^T A T) tr(T^-1 B T^-T) (WUSH, arXiv 2512.00956). Printed is the sum over blocks of the root of
that product, over its value without a transform: below 1 a transform helps, and WUSH's is the least
that any can reach. Unquantized activations feed each layer.
"""

import argparse
from collections import defaultdict
from statistics import fmean

import torch
from torch import Tensor

from mxtorq import beginnings
from mxtorq.calibration.capture import advance_, capture_sites, first_layer_inputs
from mxtorq.config import Recipe, parse_method
from mxtorq.transforms.block_matrices import BlockMatrices
from mxtorq.transforms.wush import input_moments, weight_moments
from record import add_outputs, heading, provenance, table, write

PACKAGES = ("mxtorq", "torch", "transformers", "numpy")
METHODS = ("wush", "wush:hadamard=false", "hires:interaction=false:balance=false", "hires")


def cost(matrices: Tensor, inputs: Tensor, weights: Tensor) -> float:
    """Sum over blocks of the root of tr(T^T A T) tr(T^-1 B T^-T)."""
    inverse = torch.linalg.inv(matrices)
    there = matrices.mT @ inputs @ matrices
    back = inverse @ weights @ inverse.mT
    traces = [moments.diagonal(dim1=1, dim2=2).sum(1) for moments in (there, back)]
    return float((traces[0] * traces[1]).sqrt().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    add_outputs(parser)
    options = parser.parse_args()

    recipe = Recipe(
        method=parse_method("identity"),
        calibration=options.calibration,
        calibration_tokens=options.calibration_tokens,
    )
    source = beginnings.load_model(options.model, None, 0, "cpu")
    family, windows = source.family, beginnings.calibrate(source, recipe)
    inputs = first_layer_inputs(source.model, family, windows.ids)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index, layer in enumerate(source.model.get_submodule(family.layers).children()):
        sites = {family.site_name(index, site): site for site in family.sites}
        for name, site in capture_sites(layer, sites, inputs, 0).items():
            moments = input_moments(site), weight_moments(site)
            plain = cost(torch.eye(32, dtype=torch.float64), *moments)
            for method in options.methods:
                fitted = parse_method(method).fit(site, 0)
                assert isinstance(fitted, BlockMatrices), f"{method} is no block transform"
                kind = name.rpartition(".")[2]
                found[method][kind].append(cost(fitted.matrices, *moments) / plain)
        advance_(layer, inputs)

    kinds = [str(site.name) for site in family.sites]
    rows = [[m, *(f"{fmean(found[m][kind]):.3f}" for kind in kinds)] for m in options.methods]
    record = {**provenance(PACKAGES), "rows": {m: dict(found[m]) for m in found}}
    write(options, record, f"{heading(record)}\n\n{table(['method', *kinds], rows, 1)}")


if __name__ == "__main__":
    main()
