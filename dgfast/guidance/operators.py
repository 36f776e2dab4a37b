"""Linear operators of images: `Mask`, and what is asked of those that others wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError, one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dgfast.guidance.likelihood import Operator


@dataclass(frozen=True, eq=False)
class Mask:
    """The operator that leaves some pixels and makes the others 0.

    Attributes:
        where: 1 for what is observed, else 0: [H, W], [C, H, W], or [B, C, H, W] for one a sample.
    """

    where: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        if self.where.dim() == 4 and len(self.where) not in (1, len(images)):
            raise UserError(f"the mask is one a sample, of {len(self.where)} images; of these {len(images)} it is not")
        return images * self.where.to(images)

    def fitted(self, shape: Sequence[int], device: torch.device) -> Mask:
        """The same mask on that device as [1 or B, C, H, W], for images of this shape, [C, H, W].

        Raises:
            UserError: it has another size, other numbers than 0 and 1, or nothing that is observed.
        """
        import torch

        if not isinstance(self.where, torch.Tensor):
            raise UserError(f"the mask is a {type(self.where).__name__}; give a tensor")
        size, samples = [*self.where.shape], self.where.shape[:1] if self.where.dim() == 4 else (1,)
        if size[-3:] not in ([*shape], [1, *shape[1:]], [*shape[1:]]) or self.where.dim() > 4:
            raise UserError(f"the mask has the shape {size}; give {[*shape]} or {[*shape[1:]]}, or one a sample")
        if not bool(((self.where == 0) | (self.where == 1)).all()) or not bool(self.where.any()):
            raise UserError("the mask must have 1 for what is observed and 0 for what is not, and observe something")
        return Mask(self.where.to(device).expand(*samples, *shape))


def tried(operator: Operator, shape: Sequence[int], device: torch.device) -> Tensor:
    """What the operator makes of two images of that shape, [C, H, W].

    Raises:
        UserError: it does not take them, does not make one observation of each, is not linear, or has no gradient.
    """
    import torch

    images = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.enable_grad():
            made, mixed = operator(images.requires_grad_()), operator(images[:1] + 2 * images[1:])
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the operator takes no images of shape {list(shape)}: {one_line(error)}") from error
    if not isinstance(made, torch.Tensor) or made.dim() < 2 or len(made) != 2:
        form = list(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
        raise UserError(f"the operator must make one observation an image, [2, ...] of two images; it made {form}")
    if made.is_complex():
        raise UserError("the operator makes complex numbers: return torch.view_as_real of them, and observe that")
    has_gradient, made, mixed = made.requires_grad, made.detach(), mixed.detach()
    if float((made[:1] + 2 * made[1:] - mixed).abs().max()) > 1e-4 * float(made.abs().max()):
        raise UserError("the operator is not linear: a loss can be anything, use LossGuidance")
    if not bool(made.any()):
        raise UserError("the operator makes 0 of every image: it observes nothing")
    if not has_gradient:
        raise UserError("no gradient goes back through the operator: write it in functions of torch alone")
    return made
