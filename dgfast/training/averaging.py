"""Averages of the weights of a run, none of which holds on to the random weights that it starts from.

torch's own exponential average starts at the first weights and keeps decay^steps of them: 8 % after 2,500 steps of
0.999.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dgfast.errors import UserError

Tensors = tuple[Tensor, ...] | list[Tensor]
_WIDEST = 12**-0.5  # of k = 0, the plain mean of all steps


def averaged(nets: nn.Module, decay: float, width: float | None) -> AveragedModel:
    """The average of `nets` over a run: EDM2's power function of that relative width, or exponential without one.

    Raises:
        UserError: no average has that decay or width.
    """
    kept = kept_share(decay, width)

    @torch.no_grad()
    def update(averages: Tensors, weights: Tensors, averaged_so_far: Tensor | int) -> None:
        if not averages[0].is_floating_point():  # a count of batches; torch hands over one type at a time
            torch._foreach_copy_(averages, weights)
            return
        torch._foreach_lerp_(averages, weights, 1 - kept(int(averaged_so_far) + 1))

    return AveragedModel(nets, multi_avg_fn=update, use_buffers=True)


def kept_share(decay: float, width: float | None) -> Callable[[int], float]:
    """Share of the average that stays at step n = 1, 2, ...

    Raises:
        UserError: no average has that decay or width.
    """
    if width is not None:
        return power_function(exponent(width))
    if not 0 <= decay < 1:
        raise UserError(f"--ema {decay:g}: an exponential average has a decay from 0 to below 1")
    return exponential(decay)


def exponential(decay: float) -> Callable[[int], float]:
    """Share of the average that stays at step n = 1, 2, ...: weights of step i count with decay^(n - i), sum 1.

    Adam's correction of its moments (arXiv 1412.6980, section 3), as a share.
    """
    return lambda n: 1 - (1 - decay) / (1 - decay**n)


def power_function(k: float) -> Callable[[int], float]:
    """Share of the average that stays at step n: weights of step i count with about (i / n)^k.

    EDM2 (arXiv 2312.02696, equation 127). The average widens as the run goes on.
    """
    return lambda n: (1 - 1 / n) ** (k + 1)


def exponent(width: float) -> float:
    """k of the power function whose standard deviation is `width`, as a share of the run.

    It is the largest root of width^2 = (k + 1) / ((k + 2)^2 (k + 3)) (EDM2, equation 126).

    Raises:
        UserError: no k > 0 has that width.
    """
    if not 0 < width < _WIDEST:
        raise UserError(
            f"--ema-rel {width:g}: a power-function average has a relative width between 0 and {_WIDEST:.3f}"
        )
    share = width**-2
    return float(np.roots([1, 7, 16 - share, 12 - share]).real.max())
