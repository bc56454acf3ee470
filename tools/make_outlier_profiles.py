"""Make src/mxtorq/embedded/outlier_profiles.json from per-channel activation statistics.

    python tools/make_outlier_profiles.py llama-3.2-1b.absmax.npz qwen3-0.6b.meansq.npz

Each input is an .npz with one array a linear, keyed by the linear's name: the largest magnitude
(``*.absmax.npz``) or the mean square (``*.meansq.npz``) of every input channel. Kept are, for each
layer and site, quantiles of the channels' size over the median channel's size: enough to give
another model the same spread of channels, and nothing of the original's order.
"""

import argparse
import json
from pathlib import Path

import numpy as np

SITES = {
    "qkv_in": "self_attn.q_proj",
    "o_in": "self_attn.o_proj",
    "gate_up_in": "mlp.gate_proj",
    "down_in": "mlp.down_proj",
}
QUANTILES = np.unique(
    np.concatenate([np.linspace(0, 0.96, 25), 1 - np.logspace(-1.5, -4, 16), [1]])
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("statistics", nargs="+", type=Path)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "src/mxtorq/embedded/outlier_profiles.json",
    )
    args = parser.parse_args()
    profiles = {}
    for path in args.statistics:
        name, kind, _ = path.name.rsplit(".", 2)
        arrays = np.load(path)
        depth = 1 + max(int(key.split(".")[2]) for key in arrays.files if "layers." in key)
        layers = []
        for layer in range(depth):
            sites = {}
            for site, linear in SITES.items():
                size = arrays[f"model.layers.{layer}.{linear}"].astype(np.float64)
                size = np.sqrt(size) if kind == "meansq" else size
                shape = np.quantile(size / np.median(size), QUANTILES)
                sites[site] = [float(f"{value:.3g}") for value in shape]
            layers.append(sites)
        profiles[name] = {
            "statistic": "absmax" if kind == "absmax" else "root mean square",
            "quantiles": [round(float(q), 6) for q in QUANTILES],
            "layers": layers,
        }
    args.out.write_text(json.dumps(profiles, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
