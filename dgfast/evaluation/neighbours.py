"""Metrics of a sample of features against a sample of the reference's: of neighbours, and of a kernel.

Precision, recall (Kynkaanniemi et al., arXiv 1904.06991), density and coverage (Naeem et al., arXiv 2002.09797) by the
distances of prdc; the kernel distance KID (Binkowski et al., arXiv 1801.01401) by torchmetrics.
"""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

NEAREST_K = 5  # prdc's recommendation
FEWEST = NEAREST_K + 2
"""So many images have so many neighbours each, and one more."""
_KERNEL_SUBSET = 500
NEIGHBOURS = ("precision", "recall", "density", "coverage")


class Neighbours:
    """Metrics of neighbours to a reference, whose radii are computed once."""

    def __init__(self, real: Tensor) -> None:
        """
        Args:
            real: features float32 [M, D].
        """
        from prdc.prdc import compute_nearest_neighbour_distances

        self._real = real.numpy()
        self._radii = compute_nearest_neighbour_distances(self._real, NEAREST_K)

    def __call__(self, drawn: Tensor) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The metrics of features float32 [N, D], and of those that are means over generated images their terms [N].

        Recall and coverage are no such means: whether a real image is reached depends on all generated ones.
        """
        from prdc.prdc import compute_nearest_neighbour_distances, compute_pairwise_distance

        radii = compute_nearest_neighbour_distances(drawn.numpy(), NEAREST_K)
        distances = compute_pairwise_distance(self._real, drawn.numpy())
        in_real = distances < self._radii[:, None]
        terms = {"precision": in_real.any(axis=0).astype(float), "density": in_real.sum(axis=0) / NEAREST_K}
        values = {
            "precision": float(terms["precision"].mean()),
            "recall": float((distances < radii).any(axis=1).mean()),
            "density": float(terms["density"].mean()),
            "coverage": float((distances.min(axis=1) < self._radii).mean()),
        }
        return values, terms


def kernel_distance(real: Tensor, drawn: Tensor) -> float:
    """The mean of torchmetrics' kernel distance over random subsets of features float32 [M, D] and [N, D].

    In float64: the distance is a small difference of third powers.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    subset = min(_KERNEL_SUBSET, len(drawn) // 2, len(real) // 2)
    with warnings.catch_warnings():  # that it keeps all features, which are here already
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        kernel = KernelInceptionDistance(feature=_As(real.shape[1]), subset_size=subset)
    kernel.update(real.double(), real=True)
    kernel.update(drawn.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(kernel.compute()[0])


class _As(nn.Module):
    """Features in the place of images, as torchmetrics wants a network: their number is `num_features`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features
