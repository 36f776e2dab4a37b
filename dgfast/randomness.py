"""Seeds to noise and labels: image k depends on seed k alone, whatever the batch it is drawn in."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from dgfast.errors import UserError

SEEDS = 1 << 32
"""Seeds lie below it: EDM's generator takes them modulo 2^32, where two seeds would give one image."""


class SeedStreams:
    """One generator a seed, on the CPU so that every device sees the same numbers.

    The order of draws is EDM's: latents, class labels, then the noise of each step.

    Raises:
        UserError: a seed that is no whole number from 0 to 2^32 - 1.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(_checked(seed)) for seed in seeds]

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Unit normal noise [len(seeds), *shape]."""
        draws = [torch.randn(tuple(shape), generator=g, dtype=dtype) for g in self._generators]
        return torch.stack(draws).to(device)

    def labels(self, count: int) -> Tensor:
        """Class indices below `count`, int64 [len(seeds)], on the CPU."""
        return torch.stack([torch.randint(count, (), generator=g) for g in self._generators])


def _checked(seed: int) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < SEEDS:
        raise UserError(f"seed {seed!r:.40} is no whole number from 0 to 4294967295")
    return number
