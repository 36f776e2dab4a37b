"""Seeds to noise and labels: image k depends on seed k alone, whatever the batch it is drawn in."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SeedStreams:
    """One generator a seed, on the CPU so that every device sees the same numbers.

    The order of draws is EDM's: latents, class labels, then the noise of each step.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Unit normal noise [len(seeds), *shape]."""
        draws = [torch.randn(tuple(shape), generator=g, dtype=dtype) for g in self._generators]
        return torch.stack(draws).to(device)

    def labels(self, count: int) -> Tensor:
        """Class indices below `count`, int64 [len(seeds)], on the CPU."""
        return torch.stack([torch.randint(count, (), generator=g) for g in self._generators])
