"""Every number that a user may set, under the papers' symbols."""

import math
from dataclasses import dataclass

from dgfast.errors import UserError
from dgfast.guidance import (
    GUIDANCES,
    AdaptiveProjectedGuidance,
    Autoguidance,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    DynamicThreshold,
    FrequencyDecoupledGuidance,
    LowDensityGuidance,
    MagnitudeAwareGuidance,
    ObservationGuidance,
    PerturbedAttentionGuidance,
    PixelNorm,
    PredictedCleanGuidance,
    Renorm,
    Rescale,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialGuidance,
)
from dgfast.guidance.declaration import all_options, configure, require_on
from dgfast.solvers import DIFFUSIONS, LAST_STEPS, SOLVERS

DISCRETIZATIONS = ("edm", "vp", "ve", "iddpm")
SCHEDULES = ("linear", "vp", "ve")
SCALINGS = ("none", "vp")
VARIANCES = ("small", "large")
STATE_DTYPES = ("float64", "float32")
MOST_LEVELS = 10_000
"""Noise levels of a grid or of a network, far more than any was trained with: a file may ask for a thousand million."""
NOISES = ("cpu", "cuda")
"""Whose random numbers the seeds stand for: those of torch's generator on the CPU, or on CUDA."""
KEPT = ("npz", "png", "latents")
"""Formats in which a job keeps its images, see `outputs.FORMATS`."""
PRODUCTS = ("adm", "grid")
"""Files that are made of all its images, or of the first ones, in the end."""
GRID_IMAGES = 400
"""The grid shows at most so many images."""


@dataclass(frozen=True)
class SamplingConfig:
    """Grid and solver (EDM, arXiv 2206.00364, table 1, algorithms 1 and 2).

    Attributes:
        num_steps: noise levels above 0. Heun spends 2 num_steps - 1 score evaluations.
        solver: "heun" (order 2), "euler" (order 1), "dpmpp-2m" (DPM-Solver++(2M), arXiv 2211.01095, order 2), "ddpm"
            (ancestral, arXiv 2006.11239) or "ddim" (arXiv 2010.02502); for networks of flow matching also "flow-euler",
            "flow-heun", "flow-sde" and "flow-sde-heun" (arXiv 2401.08740), which take num_steps even steps in the time
            of the path and none of the settings of a grid of noise levels.
        respacing: the grid, for networks of discrete time: which of their own noise levels, in guided-diffusion's
            notation ("250", "ddim25", "10,10,5", "" for all). num_steps and discretization then say nothing.
        clip_denoised: keep the denoised images, before any gradient guidance, in [-1, 1].
        eta: noise of the ddim solver, 0 for none, 1 for as much as the posterior's.
        fixed_variance: of the ddpm solver where the network learns none, "small" (the posterior's) or "large" (beta).
        discretization: how noise levels are spaced: "edm", "vp", "ve" or "iddpm".
        schedule: sigma(t): "linear" t, "ve" sqrt(t), or "vp".
        scaling: s(t): "none" 1, or "vp" 1 / sqrt(1 + sigma^2).
        sigma_min, sigma_max: first and last non-zero noise level; None takes the discretisation's own.
        rho: exponent of the "edm" spacing.
        alpha: Heun's second point, as a share of the step (1: trapezoidal, 1/2: midpoint).
        S_churn: noise added anew over the whole run; S_min, S_max: the noise levels between which; S_noise: its
            standard deviation, 1 for what the theory says.
        state_dtype: type of the solver's state, its noise levels and the noise of its steps: "float64" as EDM's, or
            "float32" as EDM2's; seeds give other noise in another type.
        diffusion: how large the noise of flow-sde is at time t, see `flow_sde.diffusion`; diffusion_norm: a factor in
            it. last_step: what the last step is, without noise: "mean" (the SDE's), "euler" (the ODE's), "tweedie"
            (the denoised image) or "none" (no such step); last_size: its size in t.
        reverse: go from images to noise, see `Sampler.integrate`.
        epsilon_s: last time of the "vp" discretisation and schedule. C_1, C_2, M: iDDPM's grid.
    """

    num_steps: int = 18
    solver: str = "heun"
    discretization: str = "edm"
    schedule: str = "linear"
    scaling: str = "none"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    alpha: float = 1.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    epsilon_s: float = 1e-3
    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000
    respacing: str | None = None
    clip_denoised: bool = False
    eta: float = 0.0
    fixed_variance: str = "small"
    state_dtype: str = "float64"
    diffusion: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_size: float = 0.04
    reverse: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("solver", tuple(SOLVERS)),
            ("discretization", DISCRETIZATIONS),
            ("schedule", SCHEDULES),
            ("scaling", SCALINGS),
            ("fixed_variance", VARIANCES),
            ("state_dtype", STATE_DTYPES),
            ("diffusion", DIFFUSIONS),
            ("last_step", LAST_STEPS),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        counted = isinstance(self.num_steps, int) and isinstance(self.M, int)
        if not counted or self.M < 1 or max(self.num_steps, self.M) > MOST_LEVELS:
            raise UserError(
                f"num_steps (--steps) {self.num_steps} and M {self.M} must be whole numbers, M at least 1, "
                f"and at most {MOST_LEVELS:,}"
            )
        ends = [0 if end is None else end for end in (self.sigma_min, self.sigma_max)]
        if not all(map(math.isfinite, (*ends, self.C_1, self.C_2))) or not isinstance(self.clip_denoised, bool):
            raise UserError("sigma_min, sigma_max, C_1 and C_2 must be finite numbers, clip_denoised true or false")
        if not isinstance(self.respacing, str | None) or len(self.respacing or "") > 200:
            raise UserError(f"respacing {self.respacing!r:.80} is not a text such as 250, ddim25 or 10,10,5")
        if not 0 < self.epsilon_s < 1 or math.isnan(self.S_min) or math.isnan(self.S_max):
            raise UserError("epsilon_s must lie between 0 and 1, S_min and S_max must be numbers")
        if not self.rho > 0 or not 0 < self.alpha <= 1 or not self.S_churn >= 0 or not self.S_noise >= 0:
            raise UserError("rho must be above 0, alpha in (0, 1], S_churn and S_noise at least 0")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta {self.eta} must lie between 0 and 1")
        if not 0 <= self.diffusion_norm < math.inf or not 0 < self.last_size < 1 or not isinstance(self.reverse, bool):
            raise UserError("diffusion_norm must be at least 0, last_size between 0 and 1, reverse true or false")
        SOLVERS[self.solver].check(self)

    @property
    def score_evaluations(self) -> int:
        """Score-network forwards of one image, without guidance."""
        return SOLVERS[self.solver].evaluations(self.num_steps)

    def gamma(self, sigma: float) -> float:
        """Relative rise of the noise level before the step at `sigma` (EDM, algorithm 2)."""
        if not self.S_min <= sigma <= self.S_max:
            return 0.0
        return min(self.S_churn / self.num_steps, math.sqrt(2) - 1)


@dataclass(frozen=True)
class GuidanceConfig(
    DynamicThreshold.Options,
    Rescale.Options,
    Renorm.Options,
    PixelNorm.Options,
    CFGZeroStar.Options,
    TangentialGuidance.Options,
    MagnitudeAwareGuidance.Options,
    FrequencyDecoupledGuidance.Options,
    CFGPlusPlus.Options,
    AdaptiveProjectedGuidance.Options,
    SmoothedEnergyGuidance.Options,
    SkipLayerGuidance.Options,
    PerturbedAttentionGuidance.Options,
    ObservationGuidance.Options,
    PredictedCleanGuidance.Options,
    LowDensityGuidance.Options,
    Autoguidance.Options,
    ClassifierFreeGuidance.Options,
    ClassifierGuidance.Options,
    DiscriminatorGuidance.Options,
):
    """Options of all guidances, see the `Options` of each; the defaults guide nothing, which runs no network.

    It inherits them, so that its fields have their types and its readers the help of an editor; a guidance declared
    later adds its own (see `Guidance.__init_subclass__`). The last of the bases comes first.

    Raises:
        UserError: a value that an option may not have, or that is not the default while its guidance is off; options
            that contradict one another.
    """

    def __post_init__(self) -> None:
        for one in all_options():
            one.check(getattr(self, one.name))
        changed = [one for one in all_options() if getattr(self, one.name) != one.default]
        require_on(self, [one.name for one in changed if not one.of_network])
        for guidance in GUIDANCES:
            guidance.check(self)


configure(GuidanceConfig)
