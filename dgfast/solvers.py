"""Solvers of the probability-flow ODE and its stochastic relatives: callables in, x out.

All of them step the state x(t) = s(t) (clean + sigma(t) noise) in the time t of a `Coordinates`; t has the shape
[B, 1, 1, 1], because boosting gives every sample a noise level of its own. They do not know what guidance is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dgfast import ops
from dgfast.noise_levels import Coordinates
from dgfast.vp import vp_alpha

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> the denoised images


def churn(x: Tensor, t: Tensor, t_hat: Tensor, noise: Tensor, S_noise: Tensor | float, coords: Coordinates) -> Tensor:
    """Raise the noise level of x from sigma(t) to sigma(t_hat) with fresh unit noise (EDM, algorithm 2, line 6)."""
    added = (coords.sigma(t_hat) ** 2 - coords.sigma(t) ** 2).clip(min=0).sqrt()
    return ops.churn(x, noise, coords.s(t_hat) / coords.s(t), added * coords.s(t_hat) * S_noise)


def euler_step(x: Tensor, denoised: Tensor, t: Tensor, t_next: Tensor, coords: Coordinates) -> Tensor:
    """First order: follow the slope at (x, t)."""
    return ops.euler_update(x, denoised, *coords.slope(t), t_next - t)[0]


def heun_step(
    x: Tensor, denoised: Tensor, t: Tensor, t_next: Tensor, denoise: Denoise, coords: Coordinates, alpha: float = 1.0
) -> Tensor:
    """Second order: average the slope at (x, t) with that at a share `alpha` of the step (EDM, algorithm 3)."""
    t_prime = t + alpha * (t_next - t)
    x_prime, d, _ = ops.euler_update(x, denoised, *coords.slope(t), t_prime - t)
    second = denoise(x_prime, t_prime)
    return ops.heun_update(x, d, x_prime, second, *coords.slope(t_prime), t_next - t, 0.5 / alpha)[0]


def dpmpp_2m_step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, previous: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Second order from two steps' denoised images, exact in the linear part (arXiv 2211.01095, algorithm 2).

    Args:
        previous: the last step's denoised images and noise levels; None on the first step, which is of first order.

    The step to sigma_next = 0 ends at `denoised` itself, as in the published code's last step of first order.
    """
    if previous is not None:
        last_denoised, last_sigma = previous
        h, h_last = (sigma / sigma_next).log(), (last_sigma / sigma).log()
        ratio = torch.where(sigma_next > 0, h / (2 * h_last), 0.0)  # 1 / (2 r); infinite h marks the last step
        denoised = denoised + ratio * (denoised - last_denoised)
    shrink = sigma_next / sigma
    return shrink * x + (1 - shrink) * denoised


def ancestral_step(
    x: Tensor, denoised: Tensor, shift: Tensor, variance: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor
) -> Tensor:
    """A draw from DDPM's p(x_next | x), without noise in the step to sigma_next = 0 (arXiv 2006.11239, algorithm 2).

    Args:
        shift: what guidance adds to the mean. variance: of the step. Both [B, C, H, W], in VP coordinates, where
            images have about unit variance.
        noise: unit normal [B, C, H, W].
    """
    mean = denoised + (sigma_next / sigma) ** 2 * (x - denoised)
    spread = torch.where(sigma_next > 0, variance.sqrt(), 0.0)
    return mean + (shift + spread * noise) / vp_alpha(sigma_next)


def ddim_step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None, eta: float
) -> Tensor:
    """Toward the denoised images, with `eta` times the posterior's standard deviation of fresh noise.

    arXiv 2010.02502, equation 12; without noise it is Euler's step in sigma.
    """
    if noise is None:
        return denoised + sigma_next / sigma * (x - denoised)
    spread = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
    kept = (sigma_next**2 - spread**2).sqrt()
    return denoised + kept / sigma * (x - denoised) + spread * noise
