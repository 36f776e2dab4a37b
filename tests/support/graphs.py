"""Guided functions whose graphs are named and kept."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.graph import Function
from dgfast.graph import cache as graph_cache
from dgfast.guidance import DiscriminatorGuidance, guided_denoiser

Example = tuple[Tensor | None, ...]
Whole = tuple[Tensor, Tensor, Tensor]
Nets = dict[str, Any]
GUIDANCE: dict[str, Any] = {"weight": 2.0, "window": (0.1, 0.9)}


def example(batch: int = 2, dtype: torch.dtype = torch.float64, classes: int = 3) -> Whole:
    x = torch.randn(batch, 1, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(batch))
    return x, torch.linspace(0.5, 3, batch, dtype=dtype), F.one_hot(torch.arange(batch) % classes, classes).float()


def guided(chosen: Nets, net: Any = None, kind: Any = DiscriminatorGuidance, **changes: Any) -> Function:
    net = chosen["net"] if net is None else net
    return guided_denoiser(net, [kind(**{"discriminator": chosen["discriminator"], **GUIDANCE, **changes})])


def key(function: Function, arguments: Example | None = None) -> str | None:
    path, _ = graph_cache._named(function, arguments or example())
    return None if path is None else path.stem
