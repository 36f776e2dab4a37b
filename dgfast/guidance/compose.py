"""The guided denoiser: one pure function of a denoiser and its guidances.

It is a partial of a function here and no closure, for `graph.key` can write that down: its graph is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dgfast.guidance.declaration import Guidance, Repair
from dgfast.guidance.gradient import OUTSIDE_WINDOW, denoiser_gate

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
GuidedDenoiser = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
GuidedPosterior = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]

Prediction = tuple[Tensor, Tensor | None]
"""Denoised images, and v of a network with learned variance, see `DDPMPrecond.with_variance`."""
Correction = tuple[Tensor, Tensor, Tensor | None]
"""Direction, gate and log-ratio, see `Guidance.correct`."""


def guided_denoiser(denoiser: Denoiser, guidances: Sequence[Guidance], clip: bool = False) -> GuidedDenoiser:
    """The function (x, sigma, class_labels) -> (denoised, log_ratio) that every runtime executes.

    x are noisy images [B, C, H, W] with noise of standard deviation sigma [B]; class_labels [B, label_dim] or None.
    denoised [B, C, H, W] has the type of x; log_ratio [B] is the discriminator's, or `OUTSIDE_WINDOW` without one.

    Args:
        clip: keep the denoised images in [-1, 1]: after the guidances that mix denoisers, before those by gradients
            and through the denoiser, as ADM does.
    """
    return partial(_guided_denoiser, denoiser, tuple(guidances), clip)


def guided_posterior(denoiser: Denoiser, guidances: Sequence[Guidance], clip: bool = False) -> GuidedPosterior:
    """The function (x, sigma, class_labels, log_least, log_most) -> (denoised, shift, variance, log_ratio).

    What an ancestral step needs, in one pure function as `guided_denoiser` is. log_least and log_most [B] are the
    logarithms between which a network with learned variance chooses; log_least is the variance's where it learns none.
    denoised [B, C, H, W] holds the guidances that mix denoisers. The gradient guidances are in the shift, in ADM's form
    variance w grad_u l (arXiv 2105.05233, algorithm 1); shift and variance [B, C, H, W] are in VP coordinates.
    """
    return partial(_guided_posterior, denoiser, tuple(guidances), clip)


def corrected(denoised: Tensor, direction: Tensor, gate: Tensor) -> Tensor:
    """denoised + gate direction [B, C, H, W] for one gate [B] a sample, in the type of `denoised`.

    It is computed in the wider type of `denoised` and the gate, whichever the direction's is.
    """
    gate = gate.view(-1, 1, 1, 1).to(torch.promote_types(denoised.dtype, gate.dtype))
    return (denoised + gate * direction).to(denoised.dtype)


def _guided_denoiser(
    denoiser: Denoiser, guidances: Sequence[Guidance], clip: bool, x: Tensor, sigma: Tensor, class_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    (plain, _), through = predicted(
        lambda x: (denoiser(x, sigma, class_labels), None), guidances, x, sigma, class_labels
    )
    denoised = mixed = with_mixing(plain, guidances, x, sigma, class_labels, clip)
    log_ratio = torch.full_like(sigma, OUTSIDE_WINDOW)
    for direction, gate, ratio in (*through, *gradient_corrections(mixed, guidances, x, sigma, class_labels)):
        denoised = corrected(denoised, direction, gate)
        log_ratio = log_ratio if ratio is None else ratio.to(log_ratio.dtype)
    return denoised, log_ratio


def _guided_posterior(
    denoiser: Denoiser, guidances: Sequence[Guidance], clip: bool, x: Tensor, sigma: Tensor,
    class_labels: Tensor | None, log_least: Tensor, log_most: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def predict(x: Tensor) -> Prediction:
        with_variance = getattr(denoiser, "with_variance", None)
        if with_variance is None:
            return denoiser(x, sigma, class_labels), None
        prediction: Prediction = with_variance(x, sigma, class_labels)
        return prediction

    (plain, v), through = predicted(predict, guidances, x, sigma, class_labels)
    denoised = mixed = with_mixing(plain, guidances, x, sigma, class_labels, clip)
    for direction, gate, _ in through:
        denoised = corrected(denoised, direction, gate)
    variance = _variance(v, log_least, log_most).to(x.dtype).expand_as(x)
    shift, log_ratio = torch.zeros_like(x), torch.full_like(sigma, OUTSIDE_WINDOW)
    for direction, gate, ratio in gradient_corrections(mixed, guidances, x, sigma, class_labels):
        weight = (gate / denoiser_gate(sigma)).view(-1, 1, 1, 1).to(x.dtype)
        shift = shift + variance * weight * direction
        log_ratio = log_ratio if ratio is None else ratio.to(log_ratio.dtype)
    return denoised, shift, variance, log_ratio


def predicted(
    predict: Callable[[Tensor], Prediction],
    guidances: Sequence[Guidance],
    x: Tensor,
    sigma: Tensor,
    class_labels: Tensor | None,
) -> tuple[Prediction, list[Correction]]:
    """What the network predicts, in the type of x, and what the guidances through it say of that: one forward for all.

    Those that take no gradient through it see nothing of the graph that the others need.
    """
    through = [guidance for guidance in guidances if guidance.backwards]
    if not through:
        plain, v = predict(x)
        return (plain.to(x.dtype), v), []
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        plain, v = predict(x)
        plain = plain.to(x.dtype)
        corrections = [guidance.correct(x, sigma, class_labels, plain) for guidance in through]
    return (plain.detach(), v if v is None else v.detach()), corrections


def with_mixing(
    plain: Tensor, guidances: Sequence[Guidance], x: Tensor, sigma: Tensor, class_labels: Tensor | None,
    clip: bool = False, begun: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The denoised images under the guidances that mix, and repaired; `begun` holds what others have mixed before."""
    denoised = plain if begun is None else begun
    for guidance in guidances:
        if not (guidance.gradients or guidance.backwards or isinstance(guidance, Repair)):
            direction, gate, _ = guidance.correct(x, sigma, class_labels, plain)
            denoised = corrected(denoised, direction, gate)
    for guidance in guidances:
        if isinstance(guidance, Repair):
            denoised = guidance.repaired(x, sigma, denoised, plain)
    return denoised.clamp(-1, 1) if clip else denoised


def gradient_corrections(
    denoised: Tensor, guidances: Sequence[Guidance], x: Tensor, sigma: Tensor, class_labels: Tensor | None
) -> Iterator[Correction]:
    """What the gradient guidances say, all of them to the same denoised images."""
    for guidance in guidances:
        if guidance.gradients:
            yield guidance.correct(x, sigma, class_labels, denoised)


def _variance(v: Tensor | None, log_least: Tensor, log_most: Tensor) -> Tensor:
    """The ancestral step's variance, from the network's v (arXiv 2102.09672, equation 15) where it gives one."""
    least, most = (bound.view(-1, 1, 1, 1) for bound in (log_least, log_most))
    return (least if v is None else least + (v + 1) / 2 * (most - least)).exp()
