"""What methods that cut the features into blocks of their own size must refuse.

Blocks lie side by side, so every width must be a multiple of them. And they must nest with the MX
block of 32, or a rotation would straddle two scales for no reason.
"""

import math
from collections.abc import Mapping

from mxtorq.errors import UsageError
from mxtorq.formats.spec import BLOCK
from mxtorq.models.family import SiteName


def require_nesting(method: str, block: int) -> None:
    """Refuse a block size that neither divides 32 nor is a multiple of it.

    Raises:
        UsageError: with sizes that nest.
    """
    if block < 2 or (block % BLOCK and BLOCK % block):
        raise UsageError(
            asked=f"{method} with blocks of {block} features",
            found=f"a size that does not nest with the MX block of {BLOCK}",
            why="blocks would straddle the blocks that share a scale",
            todo="choose 16, 32, 64 or 128",
        )


def require_whole_blocks(
    method: str,
    block: int,
    widths: Mapping[SiteName, int] | Mapping[str, int],
    option: str = "block",
) -> None:
    """Refuse widths that blocks do not fill.

    Args:
        method: who asks, for the message.
        block: features a block.
        widths: the width of each input, by name.
        option: what the method calls its block size.

    Raises:
        UsageError: with the largest divisor of ``block`` that would fit every width.
    """
    fitting = math.gcd(block, *widths.values())
    unfit = [f"{name} has {width}" for name, width in widths.items() if width % block]
    if unfit:
        raise UsageError(
            asked=f"{method} with blocks of {block} features",
            found=f"{', '.join(unfit)} features",
            why="the features do not divide into whole blocks",
            todo=f"choose {option}={fitting}"
            if fitting > 1
            else "no smaller block fits either: use `identity` or `torq`",
        )
