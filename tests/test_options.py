"""Values that options turn from text into numbers."""

import pytest

from mxtorq.errors import UsageError
from mxtorq.options import bytes_of


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("512MB", 512 * 10**6),
        ("2GiB", 2**31),
        ("1.5 gb", 1_500_000_000),
        ("0MB", 0),
        ("1024B", 1024),
        ("0.1kB", 100),
        (None, None),
    ],
)
def test_sizes(text: str | None, size: int | None) -> None:
    assert bytes_of("--activation-memory", text) == size


@pytest.mark.parametrize("text", ["", "4", "GB", "-4GB", "4 XB", "4GBs", "1e9B", "4.GB", "inf GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--activation-memory 4GB"):
        bytes_of("--activation-memory", text)
