"""How the layers of self-attention attend: what a guidance changes that runs a network differently from itself."""

from collections.abc import Callable

from torch import Tensor

from dgfast import ops

Attend = Callable[[Tensor], Tensor]
"""Queries, keys and values [3, B, heads, tokens, channels], tokens row by row -> what every token gets, [B, ...]."""


def dot_product(qkv: Tensor) -> Tensor:
    """Attention by scaled dot products (arXiv 1706.03762). Layers have it as their attribute `attend`.

    None in its place leaves the attention's branch out.
    """
    return ops.attention(qkv)
