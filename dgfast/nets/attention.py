"""How the layers of self-attention attend: what a guidance changes that runs a network differently from itself."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries, keys, values), each [B, heads, tokens, channels], tokens row by row -> what every token gets."""


def dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by scaled dot products (arXiv 1706.03762). Layers have it as their attribute `attend`.

    None in its place leaves the attention's branch out.
    """
    return F.scaled_dot_product_attention(q, k, v)
