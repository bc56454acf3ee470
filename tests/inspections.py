"""A small record of an inspection: one kind of site, two layers, two methods."""

from mxtorq.reports.inspection import (
    Channel,
    Harm,
    Inspection,
    Pair,
    Picture,
    SiteRecord,
    Token,
)


def picture(loud: float = 1.0, zeros: int = 2, error: float = 0.01) -> Picture:
    """Two rows of 64 features."""
    rest = 128 - zeros
    return Picture(
        rows=2,
        block_variances=[1.0, loud],
        position_variances=[1.0] * 32,
        code_counts=[zeros, rest - 7 * (rest // 8), *[rest // 8] * 6, 0, rest // 8, *[0] * 6],
        cut=3,
        scale_exponents={"-2": 3, "1": 1},
        relative_error=error,
        worst_channels=[Channel(index=5, share=0.25)],
    )


def site(name: str, loud: float) -> SiteRecord:
    return SiteRecord(
        site=f"m.{name}.qkv_in",
        kind="qkv_in",
        width=64,
        linears=["m.q", "m.k"],
        massive_tokens=[Token(window=0, position=3, text="[b]|", ratio=7.5)],
        methods={
            "identity": Pair(inputs=picture(loud, zeros=40), weights=picture(), output_error=0.001),
            "torq": Pair(
                inputs=picture(1.0, zeros=16, error=0.001), weights=picture(2.0), output_error=0.01
            ),
        },
    )


INSPECTION = Inspection(
    model="[x]",
    family="llama",
    methods=["identity", "torq"],
    scale_rule="floor",
    seed=0,
    outliers=None,
    calibration={"source": "c", "tokens": 1234},
    sites=[site("0", 3.0), site("1", 7.0)],
    residual_tokens={"m.0": [Token(window=1, position=2, text="a", ratio=1.5)], "m.1": []},
    harm=[
        Harm(site="m.1.qkv_in", method="torq", kl=0.5, agreement=0.5),
        Harm(site="m.0.qkv_in", method="identity", kl=0.25, agreement=0.5),
        Harm(site="m.1.qkv_in", method="identity", kl=0.125, agreement=0.5),
        Harm(site="m.0.qkv_in", method="torq", kl=0.0625, agreement=0.5),
    ],
    evaluation={"source": "e", "tokens": 99},
    versions={"mxtorq": "0"},
    command="mxtorq inspect x",
)
