"""Every noise level in dgfast: grids of sigma, and the coordinates a solver may use; the map to VP is `dgfast.vp`.

sigma is the standard deviation of the noise on images in about [-1, 1] (EDM's convention, arXiv 2206.00364). Pure
functions, meant for float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dgfast.config import MOST_LEVELS, SamplingConfig
from dgfast.errors import UserError
from dgfast.vp import COSINE_S
from dgfast.vp import TIME_SCHEDULES as TIME_SCHEDULES
from dgfast.vp import cosine_time as cosine_time
from dgfast.vp import vp_alpha as vp_alpha
from dgfast.vp import vp_sigma as vp_sigma
from dgfast.vp import vp_time as vp_time


def log_uniform_sigma(u: Tensor, tau_min: float = 1e-5) -> Tensor:
    """Training noise levels of DG's discriminator from u in [0, 1].

    DG draws tau with density proportional to g^2 / sigma_vp^2 on [tau_min, 1]; in sigma that is log-uniform between
    sigma(tau_min) and sigma(1), which for the default are 0.00100 and 152.17.
    """
    low, high = (vp_sigma(torch.tensor(tau, dtype=torch.float64)).log() for tau in (tau_min, 1.0))
    return (low + u.double() * (high - low)).exp()


# Coordinates of the solver --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Coordinates:
    """Time t and signal scale s(t) in which a solver steps: x(t) = s(t) (clean + sigma(t) noise) (EDM, equation 4)."""

    sigma: Callable[[Tensor], Tensor]
    sigma_deriv: Callable[[Tensor], Tensor]
    sigma_inv: Callable[[Tensor], Tensor]
    s: Callable[[Tensor], Tensor]
    s_deriv: Callable[[Tensor], Tensor]

    def slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a, b of dx/dt = a x - b D, the probability-flow ODE (EDM, equation 4; the score is (D - x / s) / sigma^2)."""
        s, relative = self.s(t), self.sigma_deriv(t) / self.sigma(t)
        return relative + self.s_deriv(t) / s, relative * s


def coordinates(config: SamplingConfig, sigma_min: float, sigma_max: float) -> Coordinates:
    """The coordinates that `config.schedule` and `config.scaling` name, for a grid between the two noise levels."""
    if config.schedule == "vp":
        beta_d, beta_min = _vp_betas(sigma_min, sigma_max, config.epsilon_s)

        def sigma(t: Tensor) -> Tensor:
            return (0.5 * beta_d * t**2 + beta_min * t).expm1().sqrt()

        def sigma_deriv(t: Tensor) -> Tensor:
            return 0.5 * (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t))

        def sigma_inv(level: Tensor) -> Tensor:
            return ((beta_min**2 + 2 * beta_d * (level**2).log1p()).sqrt() - beta_min) / beta_d

    elif config.schedule == "ve":

        def sigma(t: Tensor) -> Tensor:
            return t.sqrt()

        def sigma_deriv(t: Tensor) -> Tensor:
            return 0.5 / t.sqrt()

        def sigma_inv(level: Tensor) -> Tensor:
            return level**2

    else:

        def sigma(t: Tensor) -> Tensor:
            return t

        def sigma_deriv(t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def sigma_inv(level: Tensor) -> Tensor:
            return level

    if config.scaling == "vp":

        def s(t: Tensor) -> Tensor:
            return vp_alpha(sigma(t))

        def s_deriv(t: Tensor) -> Tensor:
            return -sigma(t) * sigma_deriv(t) * s(t) ** 3

    else:

        def s(t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def s_deriv(t: Tensor) -> Tensor:
            return torch.zeros_like(t)

    return Coordinates(sigma, sigma_deriv, sigma_inv, s, s_deriv)


def _vp_betas(sigma_min: float, sigma_max: float, epsilon_s: float) -> tuple[float, float]:
    """beta_d and beta_min for which sigma(epsilon_s) and sigma(1) are the two levels (EDM, appendix C.3)."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    return beta_d, high - 0.5 * beta_d


# Grids ----------------------------------------------------------------------------------------------------------------
_VP_SIGMA_MIN = math.sqrt(math.expm1(0.5 * 19.9 * 1e-3**2 + 0.1 * 1e-3))
_VP_SIGMA_MAX = math.sqrt(math.expm1(0.5 * 19.9 + 0.1))
_DEFAULT_BOUNDS = {
    "edm": (0.002, 80.0),
    "iddpm": (0.002, 81.0),
    "ve": (0.02, 100.0),
    "vp": (_VP_SIGMA_MIN, _VP_SIGMA_MAX),
}


def sigma_bounds(config: SamplingConfig, net_min: float, net_max: float) -> tuple[float, float]:
    """Smallest and largest non-zero noise level: the user's or the discretisation's, within what the net knows.

    Raises:
        UserError: the smallest is not below the largest.
    """
    default_min, default_max = _DEFAULT_BOUNDS[config.discretization]
    low = max(default_min if config.sigma_min is None else config.sigma_min, net_min)
    high = min(default_max if config.sigma_max is None else config.sigma_max, net_max)
    if not 0 < low < high:
        raise UserError(
            f"--sigma-min {low:g} must lie above 0 and below --sigma-max {high:g} "
            f"(this network knows sigma from {net_min:g} to {net_max:g})"
        )
    return low, high


def sigma_grid(config: SamplingConfig, sigma_min: float, sigma_max: float) -> Tensor:
    """The `config.num_steps` noise levels of the named discretisation, falling, without the final 0 (EDM, table 1).

    Raises:
        UserError: fewer than two steps, or a grid that does not fall or has too few levels.
    """
    n = config.num_steps
    if n < 2:
        raise UserError(f"--steps {n}: a grid needs at least 2 steps")
    ramp = torch.arange(n, dtype=torch.float64) / (n - 1)
    if config.discretization == "vp":
        beta_d, beta_min = _vp_betas(sigma_min, sigma_max, config.epsilon_s)
        t = 1 + ramp * (config.epsilon_s - 1)
        sigmas = (0.5 * beta_d * t**2 + beta_min * t).expm1().sqrt()
    elif config.discretization == "ve":
        sigmas = sigma_max * (sigma_min / sigma_max) ** ramp
    elif config.discretization == "iddpm":
        levels = iddpm_levels(config.C_1, config.C_2, config.M)
        levels = levels[(levels >= sigma_min) & (levels <= sigma_max)]
        if len(levels) < n:
            raise UserError(
                f"--grid iddpm has {len(levels)} levels from {sigma_min:g} to {sigma_max:g}; lower --steps {n}"
            )
        sigmas = levels[((len(levels) - 1) * ramp).round().long()]
    else:
        inverse = 1 / config.rho
        try:
            sigmas = (sigma_max**inverse + ramp * (sigma_min**inverse - sigma_max**inverse)) ** config.rho
        except OverflowError as error:
            raise UserError(f"--rho {config.rho:g}: sigma^(1/rho) is no number any more; raise --rho") from error
    if not bool((sigmas.diff() < 0).all()):
        raise UserError(
            f"--grid {config.discretization} does not fall in {n} steps from {sigma_max:g} to {sigma_min:g}; "
            "change --steps, --sigma-min or --sigma-max"
        )
    return sigmas


def iddpm_levels(C_1: float, C_2: float, M: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """iDDPM's cosine levels in EDM's sigma, largest first and 0 last: [M + 1] (EDM, table 1).

    The grid takes them in float64, the network in float32. Both rest on alpha_bar in float32, as the official code's
    do: in float64 the network's smallest level would lie above the grid's, and its bounds would cut that level off. On
    the CPU, even if built on meta.

    Raises:
        ValueError: more levels than any network has.
    """
    if not 1 <= M <= MOST_LEVELS:
        raise ValueError(f"M {M} must lie between 1 and {MOST_LEVELS:,}")
    alpha_bar = (0.5 * math.pi * torch.arange(M + 1, dtype=torch.float32, device="cpu") / M / (C_2 + 1)).sin() ** 2
    u = torch.zeros(M + 1, dtype=dtype, device="cpu")
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (alpha_bar[j - 1] / alpha_bar[j]).clip(min=C_1) - 1).sqrt()
    return u


# DDPM -----------------------------------------------------------------------------------------------------------------
NOISE_SCHEDULES = ("linear", "cosine")


def ddpm_levels(noise_schedule: str, steps: int) -> Tensor:
    """sigma of the `steps` timesteps of DDPM's discrete process, rising: [steps].

    "linear": beta from 1e-4 to 0.02 for 1000 steps, scaled to as much noise for others (arXiv 2006.11239). "cosine":
    beta from the cosine alpha_bar, at most 0.999 (arXiv 2102.09672, equation 17). On the CPU, even if built on meta.

    Raises:
        ValueError: unknown schedule, too few steps for it, or more than any network has.
    """
    if noise_schedule not in NOISE_SCHEDULES or not 1 <= steps <= MOST_LEVELS:
        raise ValueError(f"noise_schedule {noise_schedule!r} with {steps} steps; use {' or '.join(NOISE_SCHEDULES)}")
    if noise_schedule == "linear":
        scale = 1000 / steps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64, device="cpu")
    else:
        time = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        alpha_bar = ((time + COSINE_S) / (1 + COSINE_S) * math.pi / 2).cos() ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clip(max=0.999)
    if not bool((betas < 1).all()):
        raise ValueError(f"noise_schedule {noise_schedule} needs more than {steps} steps: its beta would reach 1")
    return levels_of_betas(betas)


def levels_of_betas(betas: Tensor) -> Tensor:
    """sigma of each timestep of a process of these variances beta [steps], rising: [steps].

    Raises:
        ValueError: a beta that does not lie between 0 and 1, or more of them than any network has.
    """
    if not len(betas) <= MOST_LEVELS or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"its betas must lie between 0 and 1, and be at most {MOST_LEVELS:,}")
    alpha_bar = (1 - betas).cumprod(0)
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def respaced_timesteps(respacing: str, steps: int) -> list[int]:
    """The timesteps, rising, that `respacing` keeps of 0 to steps - 1, by guided-diffusion's rules.

    "250": so many, evenly from first to last. "10,10,5": so many in each of as many equal sections. "ddim25": so many
    at one whole stride from 0 on (arXiv 2010.02502). "": all.

    Raises:
        UserError: not such a text, no such stride, or more than a section holds.
    """
    if not respacing:
        return list(range(steps))
    ddim = respacing.startswith("ddim")
    counts = respacing.removeprefix("ddim").split(",")
    if not all(count.isdecimal() and int(count) for count in counts) or (ddim and len(counts) > 1):
        raise UserError(f"--respacing {respacing}: expected counts such as 250, ddim25 or 10,10,5")
    if ddim:
        return _strided(int(counts[0]), steps)
    kept: list[int] = []
    start = 0
    for section, count in enumerate(int(count) for count in counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if size < count:
            raise UserError(f"--respacing {respacing}: a section of {size} of {steps} timesteps has no {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed up, not multiplied: which way the published code rounds halves hangs on it.
        kept += [start + round(at) for at in accumulate([0.0] + [stride] * (count - 1))]
        start += size
    return kept


def respaced_levels(respacing: str, levels: Tensor) -> Tensor:
    """The noise levels that `respacing` keeps of a network's own, which rise with its timesteps; highest first.

    Raises:
        UserError: see `respaced_timesteps`.
    """
    return levels[respaced_timesteps(respacing, len(levels))].flip(0)


def _strided(count: int, steps: int) -> list[int]:
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise UserError(f"--respacing ddim{count}: no whole stride leaves {count} of {steps} timesteps")


def posterior_log_variances(sigmas: Tensor) -> Tensor:
    """Logarithms of the least and the most variance of each ancestral step through falling `sigmas`: [N, 2].

    In VP coordinates: the variance of q(x_next | x, clean), for data without any spread, and beta, for data of unit
    variance (arXiv 2102.09672, section 3.1). The last step, to sigma 0, has least variance 0; as published, the
    next-to-last's stands for it where a logarithm must be interpolated.
    """
    following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
    beta = (sigmas**2 - following**2) / (1 + sigmas**2)
    least = vp_alpha(following) ** 2 * following**2 * (1 - (following / sigmas) ** 2)
    least[-1] = least[-2] if len(sigmas) > 1 else beta[-1]
    return torch.stack([least.log(), beta.log()], dim=1)
