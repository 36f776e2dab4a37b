"""How far apart two results of one function are: the one measure for parity reports and self-tests of all engines."""

from collections.abc import Mapping

import torch
from torch import Tensor

PREDICTS_NOISE = "predicts_noise"
"""Key of an exported file's metadata: "true" or "false"."""
LEAST = "least"
"""The same: JSON, by output the size [] of `relative_error` in the self-test of a function without samples."""
_SHARE_OF_NOISE = 0.01


def relative_error(result: Tensor, reference: Tensor, least: Tensor | None = None) -> float:
    """The largest difference, as a share of the reference's largest value in the same sample.

    Of outputs of one number a sample it is relative to 1 where they are smaller. Infinite if a shape differs or
    anything is not a number.

    Args:
        least: sizes [B] to take the share of where the reference's are smaller, see `least_sizes`; or one size [], of a
            result without samples, which is then judged by its own largest value.
    """
    if least is not None and not least.dim() and result.shape == reference.shape:
        result, reference, least = result.reshape(1, -1), reference.reshape(1, -1), least.reshape(1)
    result, reference = result.detach().double().cpu(), reference.detach().double().cpu()
    if result.shape != reference.shape:
        return float("inf")
    if reference.dim() <= 1:
        scale = reference.abs().clamp(min=1)
    else:
        size = reference.abs().flatten(1).amax(1).clamp(min=1e-12)
        size = size if least is None else size.maximum(least.double().cpu())
        scale = size.view(-1, *[1] * (reference.dim() - 1))
    error = ((result - reference).abs() / scale).max()
    return float(error) if bool(error.isfinite()) else float("inf")


def least_sizes(predicts_noise: bool, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By output, the sizes [B] that errors are a share of where the outputs are smaller.

    Two outputs are differences of images of the noisy image's size, and keep the digits that it keeps, no others:
    `denoised` of a network that predicts the noise, x - sigma F, and `x_next` of a step that takes most of the noise
    away, x + (sigma_next - sigma) (x - D) / sigma. At high noise levels they are much smaller than x, and their errors
    are not. So these count as a share of a hundredth of the noisy image at least: 1e-4 allows 1e-6 of that.
    """
    if "x" not in inputs:
        return {}
    least = _SHARE_OF_NOISE * inputs["x"].abs().flatten(1).amax(1)
    return {"x_next": least} | ({"denoised": least} if predicts_noise else {})


def least_said(said: object) -> dict[str, Tensor]:
    """What a file says under `LEAST`, parsed.

    Raises:
        TypeError, ValueError: it is no table of numbers.
    """
    if not isinstance(said, Mapping) or not all(isinstance(size, float) and size >= 0 for size in said.values()):
        raise ValueError("sizes that are no numbers")
    return {str(name): torch.tensor(size, dtype=torch.float64) for name, size in said.items()}
