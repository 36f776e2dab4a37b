"""A Gaussian prior and a linear observation: every guidance by an observation has a closed form there."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from dgfast import Sampler, SamplingConfig
from dgfast.guidance import ObservationGuidance, guided_denoiser
from dgfast.networks import Networks
from dgfast.solvers import ancestral_step
from tests.support.golden import Golden
from tests.support.guidance import column

TOL = 1e-8


class AsPublished(ObservationGuidance):
    """With the gamma that it was given, safe or not."""

    def fitted(self, shape: Any, device: Any) -> Self:
        return self


class Prior:
    """N(mean, S), mean [n] and S [n, n], as the score network of images of n pixels."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 1, 1, 0, 0.0, math.inf

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.covariance = mean, covariance
        self.values, self.vectors = torch.linalg.eigh(covariance)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        share = self.values / (self.values + sigma[:, None] ** 2)
        moved = ((x.flatten(1) - self.mean) @ self.vectors * share) @ self.vectors.T
        return (self.mean + moved).view_as(x)

    def jacobian(self, sigma: Tensor) -> Tensor:
        return self.vectors * (self.values / (self.values + sigma**2)) @ self.vectors.T

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass
class Observed:
    """y = A x0 + std e of such images."""

    prior: Prior
    matrix: Tensor
    y: Tensor
    std: Tensor

    def operator(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.matrix.T

    def guidance(self, **how: Any) -> ObservationGuidance:
        return AsPublished(self.operator, self.y, self.std, **how)

    def exact(self) -> ObservationGuidance:
        """As many steps of GMRES as the observation has entries."""
        return self.guidance(method="mmps", iterations=len(self.y))

    def guided(self, x: Tensor, sigma: Tensor, **how: Any) -> Tensor:
        return guided_denoiser(self.prior, [self.guidance(**how)])(x, sigma, None)[0]

    def variance(self, sigma: Tensor) -> Tensor:
        """Of y, given x: [m, m]."""
        spread = self.matrix @ self.prior.jacobian(sigma) @ self.matrix.T
        return torch.diag(self.std**2) + sigma**2 * spread

    def log_likelihood(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(y | x) [B], every sample at one noise level."""
        mean = self.operator(self.prior(x, sigma.expand(len(x)), None))
        return torch.distributions.MultivariateNormal(mean, self.variance(sigma)).log_prob(self.y)

    def posterior(self) -> Prior:
        """Of x0, given y."""
        weighted = self.matrix.T / self.std**2
        inverse = torch.linalg.inv(self.prior.covariance)
        covariance = torch.linalg.inv(inverse + weighted @ self.matrix)
        return Prior(covariance @ (inverse @ self.prior.mean + weighted @ self.y), (covariance + covariance.T) / 2)


def judge_posterior(golden: Golden) -> None:
    t = golden.tensor
    observed = Observed(Prior(t("mean"), t("covariance")), t("A"), t("y"), t("std_y"))
    _judge_calls(golden, observed)
    _judge_runs(golden, observed)
    _judge_twisted_step(golden, observed)


def _judge_calls(golden: Golden, observed: Observed) -> None:
    """The guided denoiser of each method at each noise level."""
    x, levels, gammas = golden.tensor("x"), golden.tensor("sigma"), golden.tensor("gamma").tolist()
    steps = {"iterations": len(observed.y)}
    tau = math.sqrt(golden.meta["config"]["pigdm_tau2"])
    methods: dict[str, dict[str, Any]] = {
        "exact": {"method": "mmps", **steps},
        "mmps_gmres1": {"method": "mmps"},
        "mmps_gmres2": {"method": "mmps", "iterations": 2},
        "tmpd": {"method": "tmpd"},
        "pigdm": {"method": "pigdm", **steps},
        "pigdm_tau": {"method": "pigdm", "data_std": tau, **steps},
        "dps_likelihood": {"gamma": 0.0},
        "dps_score": {"method": "dps", "weight": float(golden.tensor("zeta"))},
        "sda_detached": {"gamma": gammas[0], "through_network": False},
    }
    sigmas = levels[:, None].expand(-1, x.shape[1])

    def rows(**how: Any) -> Tensor:
        return torch.stack([observed.guided(a, s, **how) for a, s in zip(x, sigmas, strict=True)])

    plain = torch.stack([observed.prior(a, s, None) for a, s in zip(x, sigmas, strict=True)])
    golden.judge("D", plain, TOL)
    for key, how in methods.items():
        golden.judge(key, rows(**how), TOL)
    golden.judge("sda", torch.stack([rows(gamma=gamma) for gamma in gammas], 1), TOL)
    toward = rows(method="dps", weight=1.0) - plain
    golden.judge("dps_norm_gradient", -toward / levels.view(-1, *[1] * (x.dim() - 1)) ** 2, TOL)
    residuals = torch.stack([observed.y - observed.operator(d) for d in plain])
    golden.judge("dps_norm", residuals.norm(dim=-1), TOL)
    likelihoods = [observed.log_likelihood(a, s) for a, s in zip(x, levels, strict=True)]
    golden.judge("log_likelihood", torch.stack(likelihoods), TOL)


def _judge_runs(golden: Golden, observed: Observed) -> None:
    """Whole runs of Heun, and what they tend to."""
    posterior, latents = observed.posterior(), golden.tensor("latents")
    golden.judge("posterior_mean", posterior.mean, TOL)
    golden.judge("posterior_covariance", posterior.covariance, TOL)
    shrunk = (posterior.values / (posterior.values + 80.0**2)).sqrt()
    offset = (80.0 * latents.flatten(1) - posterior.mean) @ posterior.vectors * shrunk
    golden.judge("flow/exact", (posterior.mean + offset @ posterior.vectors.T).view_as(latents), TOL)
    kinds = {"plain": None, "exact": observed.exact(), "sda": observed.guidance(gamma=float(golden.tensor("gamma")[1]))}
    for key in [key for key in golden.arrays if key.startswith("heun")]:
        steps, _, name = key.removeprefix("heun").partition("/")
        sampling = SamplingConfig(num_steps=int(steps), sigma_min=0.002, sigma_max=80.0)
        kind = kinds[name]
        sampler = Sampler(Networks(observed.prior), sampling, [] if kind is None else [kind])
        golden.judge(key, sampler.integrate(latents), TOL)


def _judge_twisted_step(golden: Golden, observed: Observed) -> None:
    """One ancestral step of a twisted particle filter (arXiv 2306.17775), by the exact likelihood."""
    x, eps = golden.tensor("x")[1], golden.tensor("tds/eps")
    sigma, low = golden.tensor("sigma")[1:3]
    levels = sigma.expand(len(x))
    plain, exact = (
        observed.prior(x, levels, None),
        guided_denoiser(observed.prior, [observed.exact()])(x, levels, None)[0],
    )
    ratio = (low / sigma) ** 2
    variance = low**2 * (1 - ratio)
    at, to = (column(level.expand(len(x))) for level in (sigma, low))
    in_vp = torch.full_like(x, float(variance / (1 + low**2)))
    x_next = ancestral_step(x, exact, torch.zeros_like(x), in_vp, at, to, eps)
    golden.judge("tds/x_next", x_next, TOL)

    def log_density(mean_of: Tensor) -> Tensor:
        return -((x_next - mean_of - ratio * (x - mean_of)) ** 2).flatten(1).sum(1) / (2 * variance)

    gained = observed.log_likelihood(x_next, low) - observed.log_likelihood(x, sigma)
    golden.judge("tds/log_weight", log_density(plain) - log_density(exact) + gained, TOL)
