"""DuQuant's zigzag permutation: outlier channels are dealt to the blocks in turn.

Channels are sorted by magnitude and dealt like cards (arXiv 2406.01721), to blocks 1, 2, ..., K,
then K, ..., 2, 1, and so on: the block that came last in one round comes first in the next. Inside
a block the order is the one of dealing, which is descending, as in the released code.

How even that is, for sorted magnitudes v_0 >= v_1 >= ...: in a pair of rounds the earlier of two
blocks gains at most the spread of the first round over the later one and loses at most the spread
of the second. Those are sums of neighbouring differences, and rounds do not overlap. So the sums of
two blocks differ by at most v_0 - v_last, and by at most (K - 1) delta for each pair of rounds,
delta being the largest difference of neighbours.

DuQuant++ leaves it out: with a scale for every MX block, blocks need not be alike.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def zigzag_order(magnitudes: Float[Tensor, " d"], block: int) -> Int64[Tensor, " d"]:
    """The order of channels after the deal; equal magnitudes keep their order.

    Args:
        magnitudes: the largest |x| of each channel.
        block: channels a block; it divides the number of channels.
    """
    ranks = torch.argsort(magnitudes.cpu(), descending=True, stable=True)
    rounds = ranks.reshape(block, -1).clone()  # one round of the deal a row, one block a column
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()
