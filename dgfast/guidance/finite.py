"""What a number may be that a guidance is made with in Python; on command lines its `Option` says so."""

from __future__ import annotations

import math
from numbers import Real

from dgfast.errors import UserError


def require_finite(name: str, value: object, least: float = -math.inf) -> None:
    """A tensor passes: what it holds may be another number at each call.

    Raises:
        UserError: no number, NaN, infinite, or below `least`.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return
    if not isinstance(value, Real) or not math.isfinite(value) or value < least:
        bound = f", at least {least:g}" if math.isfinite(least) else ""
        raise UserError(f"{name} {value!r:.80} must be a finite number{bound}")
