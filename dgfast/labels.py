"""Class indices to the rows that networks read."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.errors import UserError


def one_hot(labels: Sequence[int] | Tensor | None, count: int, classes: int, device: torch.device) -> Tensor | None:
    """Rows [count, classes], float32, of class indices [count]; None for none.

    Raises:
        UserError: labels where there are no classes, not whole numbers, out of range or of another number.
    """
    if labels is None:
        return None
    if not classes:
        raise UserError("this network is unconditional; leave the labels out")
    indices = torch.as_tensor(labels, device=device)
    if indices.is_floating_point():
        raise UserError("labels are class indices: whole numbers")
    indices = indices.long()
    if indices.shape != (count,):
        raise UserError(f"{indices.numel()} labels for {count} images; give one label an image")
    wrong = indices[(indices < 0) | (indices >= classes)]
    if len(wrong):
        raise UserError(f"label {int(wrong[0])} is out of range; this network knows classes 0 to {classes - 1}")
    return F.one_hot(indices, classes).float()
