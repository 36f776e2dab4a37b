"""ADM at toy size, and a raw network that is exact for Gaussian pixels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dgfast import noise_levels as nl
from dgfast.denoiser import DDPMPrecond

NetFactory = Callable[..., Any]
TINY: dict[str, Any] = {
    "image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "learn_sigma": True,
    "class_cond": True, "attention_resolutions": "4", "num_head_channels": 32, "use_scale_shift_norm": True,
    "resblock_updown": True, "use_new_attention_order": True,
}  # fmt: skip


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_hot(*classes: int, of: int = 1000) -> Tensor:
    return torch.eye(of)[list(classes)]


class Exact(nn.Module):
    """The perfect raw network for pixels of this mean and variance, and v that says where the variance lies."""

    def __init__(self, levels: Tensor, variance: float, mean: float, v: float | None, predict_xstart: bool) -> None:
        super().__init__()
        self.levels, self.variance, self.mean, self.v, self.predict_xstart = levels, variance, mean, v, predict_xstart
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, u: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        self.seen.append(timesteps)
        sigma = self.levels[timesteps.long()].view(-1, 1, 1, 1)
        x = u * (1 + sigma**2).sqrt()
        clean = (self.variance * x + sigma**2 * self.mean) / (self.variance + sigma**2)
        out = clean if self.predict_xstart else (x - clean) / sigma
        return out if self.v is None else torch.cat([out, torch.full_like(out, self.v)], dim=1)


def exact(
    schedule: str = "linear", variance: float = 0.25, mean: float = 0.3, v: float | None = None, **more: Any
) -> Any:
    predict_xstart = more.get("predict_xstart", False)
    raw = Exact(nl.ddpm_levels(schedule, 1000), variance, mean, v, predict_xstart)
    return DDPMPrecond(raw, 2, 1, 0, noise_schedule=schedule, learn_sigma=v is not None, **more)


def steps_of(schedule: str = "linear", respacing: str = "12") -> Any:
    """(sigma, sigma_next, log-variances) of an ancestral run."""
    sigmas = nl.respaced_levels(respacing, nl.ddpm_levels(schedule, 1000))
    return zip(sigmas, [*sigmas[1:], torch.tensor(0.0)], nl.posterior_log_variances(sigmas), strict=True)


def bounds_of(log_least: float, log_most: float, batch: int) -> tuple[Tensor, Tensor]:
    return torch.full((batch,), log_least).double(), torch.full((batch,), log_most).double()
