"""DG's boosting, written down twice."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import noise_levels as nl
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.graph.agreement import relative_error
from dgfast.guidance import (
    OUTSIDE_WINDOW,
)
from dgfast.networks import Networks
from dgfast.sampler import Sampler

NetFactory = Callable[..., Any]


def boosted_sampler(
    net: nn.Module,
    discriminator: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    latents: Tensor,
    labels: Tensor,
    noises: list[Tensor],
    num_steps: int,
    weight: float,
    window: tuple[float, float],
) -> tuple[Tensor, list[Tensor]]:
    """DG's boosted sampler in plain words: boolean masks and one loop, after generate.py of the paper's code."""
    t_steps = [*nl.sigma_grid(SamplingConfig(num_steps=num_steps), 0.002, 80.0).tolist(), 0.0]
    x = latents.double() * t_steps[0]
    log_ratio = torch.full((len(x),), math.inf, dtype=torch.float64)
    ratios = []
    for i, (t, t_next) in enumerate(itertools.pairwise(t_steps)):
        t_hat = torch.full((len(x),), t, dtype=torch.float64)
        if i % 5 == 0:
            t_hat[log_ratio < 0] *= 1 + min(4 / num_steps, math.sqrt(2) - 1)
        x_hat = x + (t_hat**2 - t**2).sqrt().view(-1, 1, 1, 1) * noises[i]
        d = (x_hat - net(x_hat, t_hat, labels)) / t_hat.view(-1, 1, 1, 1)
        guide = torch.zeros_like(x)
        log_ratio = torch.full((len(x),), OUTSIDE_WINDOW, dtype=torch.float64)
        for k in range(len(x)):
            tau = nl.vp_time(t_hat[k])
            if not window[0] <= tau <= window[1]:
                continue
            alpha = (1 + t_hat[k] ** 2) ** -0.5
            u = (alpha * x_hat[k : k + 1]).float().requires_grad_()
            with torch.enable_grad():
                logit = discriminator(u, tau[None], labels[k : k + 1]).squeeze()
                log_ratio[k] = logit.detach()
                guide[k] = t_hat[k] ** 2 * alpha * torch.autograd.grad(logit, u)[0][0]
        if i % 2 == 0:
            guide[log_ratio < 0] *= 2
        d = d - weight * guide / t_hat.view(-1, 1, 1, 1)
        ratios.append(log_ratio)
        x_next = x_hat + (t_next - t_hat).view(-1, 1, 1, 1) * d
        if i < num_steps - 1:
            d_prime = (x_next - net(x_next, torch.full((len(x),), t_next), labels)) / t_next
            x_next = x_hat + (t_next - t_hat).view(-1, 1, 1, 1) * (d + d_prime) / 2
        x = x_next
    return x, ratios


@torch.no_grad()
def test_guidance_boosting_equals_the_published_loop(tiny_net: NetFactory, tiny_discriminator: NetFactory) -> None:
    steps, weight, window = 12, 1.5, (0.05, 0.95)
    net, discriminator, bias = tiny_net(label_dim=4), tiny_discriminator(num_classes=4), 0.0
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(6, 1, 8, 8, generator=generator)
    noises = [torch.randn(latents.shape, dtype=torch.float64, generator=generator) for _ in range(steps)]
    labels = F.one_hot(torch.tensor([0, 1, 2, 3, 0, 1]), 4).float()

    def balanced(u: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return discriminator(u, t, y) - bias  # so that both signs occur; a random net leans to one

    _, ratios = boosted_sampler(net, balanced, latents, labels, noises, steps, weight, window)
    bias = torch.stack([ratio for ratio in ratios if ratio.max() < 100]).median().item()
    reference, ratios = boosted_sampler(net, balanced, latents, labels, noises, steps, weight, window)
    churned = torch.stack([ratios[i - 1] < 0 for i in range(5, steps, 5)])
    assert churned.any() and not churned.all()  # some samples are churned anew, others are not

    config = GuidanceConfig(dg_weight=weight, dg_window=window, boosting=True)
    sampler = Sampler(Networks(net, discriminator=balanced), SamplingConfig(num_steps=steps), config)
    images = sampler.integrate(latents, labels, iter(noises).__next__)
    assert relative_error(images, reference) < 1e-4
    plain = Sampler(Networks(net, discriminator=balanced), sampler.sampling, GuidanceConfig(weight, dg_window=window))
    assert relative_error(plain.integrate(latents, labels), reference) > 1e-2
