"""How far apart two results of one function are: the one measure for parity reports and self-tests of all engines."""

from collections.abc import Mapping

from torch import Tensor

PREDICTS_NOISE = "predicts_noise"
"""Key of an exported file's metadata: "true" or "false"."""
_SHARE_OF_NOISE = 0.01


def relative_error(found: Tensor, reference: Tensor, least: Tensor | None = None) -> float:
    """The largest difference, as a share of the reference's largest value in the same sample.

    Of outputs of one number a sample it is relative to 1 where they are smaller. Infinite if a shape differs or
    anything is not a number.

    Args:
        least: sizes [B] to take the share of where the reference's are smaller, see `least_sizes`.
    """
    found, reference = found.detach().double().cpu(), reference.detach().double().cpu()
    if found.shape != reference.shape:
        return float("inf")
    if reference.dim() <= 1:
        scale = reference.abs().clamp(min=1)
    else:
        size = reference.abs().flatten(1).amax(1).clamp(min=1e-12)
        size = size if least is None else size.maximum(least.double().cpu())
        scale = size.view(-1, *[1] * (reference.dim() - 1))
    error = ((found - reference).abs() / scale).max()
    return float(error) if bool(error.isfinite()) else float("inf")


def least_sizes(predicts_noise: bool, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By output, the sizes [B] that errors are a share of where the outputs are smaller.

    A network that predicts the noise has its `denoised` from x - sigma F, which keeps the digits that x keeps, and no
    others: at high noise levels it is much smaller than x, and its error is not. So errors count as a share of a
    hundredth of the noisy image at least: a tolerance of 1e-4 allows 1e-6 of that.
    """
    if not predicts_noise or "x" not in inputs:
        return {}
    return {"denoised": _SHARE_OF_NOISE * inputs["x"].abs().flatten(1).amax(1)}
