"""The likelihood of a linear Gaussian observation y = A x0 + e, given a noisy image: the pure functions.

Every method is the score J^T A^T v with a weight v [B, ...] of the innovation r = y - A D, in which they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Operator = Callable[[Tensor], Tensor]

_MOST_ITERATIONS, _SETTLED = 200, 1e-6


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One number a sample [B] as [B, 1, ...], of the rank and type of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


def unit(residual: Tensor) -> Tensor:
    """The residual [B, ...] over its norm, of each sample by itself; one that is zero stays zero."""
    return _over(residual, per_sample(_inner(residual, residual).sqrt(), residual))


def solved(apply: Callable[[Tensor], tuple[Tensor, Tensor]], right: Tensor, steps: int) -> Tensor:
    """K v for M v = right [B, ...], by so many steps from v = 0: GMRES's v, of each sample by itself.

    It is written as generalised conjugate residuals (Eisenstat, Elman and Schultz, 1983), which has the same v where M
    is positive definite, and the same operations for every input. K v comes along with M v: where K is a backward
    pass, the last one is saved.

    Args:
        apply: v -> (K v, M v), both linear.
    """
    import torch

    residual, found = right, torch.zeros(())
    before: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(steps):
        wanted, image = apply(residual)
        for old_wanted, old_image, square in before:
            share = _over(_inner(image, old_image), square)
            wanted = wanted - per_sample(share, wanted) * old_wanted
            image = image - per_sample(share, image) * old_image
        square = _inner(image, image)
        share = _over(_inner(residual, image), square)
        part = per_sample(share, wanted) * wanted
        found = part if not before else found + part
        residual = residual - per_sample(share, image) * image
        before.append((wanted, image, square))
    return found


def squared_norm(operator: Operator, shape: Sequence[int], device: torch.device) -> float:
    """|A|^2, the largest eigenvalue of A A^T, by power iteration on images of this shape, [C, H, W]."""
    import torch

    image = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    value = before = 0.0
    for _ in range(_MOST_ITERATIONS):
        with torch.enable_grad():
            image = (image / image.norm()).requires_grad_()
            made = operator(image)
            (image,) = torch.autograd.grad(made, image, made.detach())
        value = float(made.detach().double().square().sum())
        if value <= before * (1 + _SETTLED) or not value:
            break
        before = value
    return value


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the samples: [B]."""
    return (a * b).flatten(1).sum(1)


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b for b >= 0, and 0 where b is 0."""
    import torch

    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)
